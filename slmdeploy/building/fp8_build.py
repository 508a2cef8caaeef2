"""Building for the engine tensorrt: a portable graph becomes one for a compiler, judged by its numbers.

    rotate, smooth -> count what the linear layers read -> scales -> try the head by itself -> quantise, make float16
    of the rest, check the contract, write -> where quality fails, leave the most sensitive layers unquantised ->
    compile

The result says under ``verification`` what was done and what was not, and has no speed. ONNX Runtime computes the graph
on the CPU as it is written; a compiler that fuses sums in another order rounds a little differently. Encoders have the
same steps in fp8_encoder.py. Knows the order of things; numbers are fp8.py's and half.py's, the rules of a valid graph
contract.py's, limits gate.py's, and compiling is tensorrt.py's.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from slmdeploy.building.calibration import inputs_of
from slmdeploy.building.contract import require_valid
from slmdeploy.building.fp8 import activation_scale, fp8_product, half_scale, quantize_linears, too_narrow
from slmdeploy.building.fp8_attention import attention_inputs, quantize_attention
from slmdeploy.building.fp8_encoder import FP8, KEPT, build_fp8_encoder
from slmdeploy.building.gate import Quality, judge, overspent, parity_gate
from slmdeploy.building.half import to_half
from slmdeploy.building.onnxruntime import (
    MODEL,
    SCORE,
    copy_companions,
    keep_only_scoring,
    open_build,
    read_model,
    write_models,
    write_runtime,
)
from slmdeploy.building.ort_providers import check_for_provider, mark_for_provider
from slmdeploy.building.quantize import EMBEDDING, HEAD, parts
from slmdeploy.building.reference import Reference
from slmdeploy.building.rotation import rotate
from slmdeploy.building.smooth import smooth
from slmdeploy.building.tensorrt import Compiled, compile_graph
from slmdeploy.building.tensorrt_checks import (
    capabilities_for,
    check_graph,
    check_target,
    through_provider,
    why_not_compiled,
)
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress
from slmdeploy.runtime.bundle import FOR_OTHERS, read_runtime
from slmdeploy.runtime.encoder_config import is_encoder
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.tensorrt_api import PRODUCTS
from slmdeploy.specs import Profile, Target, Workload

_LEFT_SHARE = 0.25
"""Share of the linear layers that may be left as they were before a build counts as failed."""
_SCREENING_TOKENS = 1024
_SELF_LIMIT = 0.15
"""How far an FP8 build may be from itself: where sums of another order fall on the other side between two codes, a
number changes by an eighth at most (0.07 measured on the shipped teacher); a misplaced token is off by all of it."""
_HALF_LIMIT = 0.02
"""The same for float16, which rounds at the end of every operator."""


def build_for_tensorrt(
    graph: Path,
    folder: Path,
    profile: Profile,
    target: Target | None,
    data: Path | None,
    workload: Workload | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write the build of ``graph`` for TensorRT to ``folder``, compiled where that can be done here; its result.

    Raises InputError for a graph or a target that the profile is not for, where its compiler could be installed and is
    not, and where that refuses the graph; GateError when the result breaks the contract.
    """
    check_target(profile, target)
    uncompiled = why_not_compiled(profile, target)
    check_graph(graph, profile)
    if through_provider(profile):
        check_for_provider(graph)
    if is_encoder(graph):
        result = build_fp8_encoder(graph, folder, profile, data, (_SELF_LIMIT, _HALF_LIMIT), progress)
    else:
        with tempfile.TemporaryDirectory(prefix="slmdeploy-prepared-") as place:
            reference = _prepared(Reference(graph, data), Path(place), profile)
            result = _build(reference, folder, profile, progress)
        if read_runtime(folder).tasks == ("score",):
            keep_only_scoring(folder)
    return result | _compiled(result, folder, profile, target, workload, uncompiled, progress)


def _compiled(
    result: dict[str, Any],
    folder: Path,
    profile: Profile,
    target: Target | None,
    workload: Workload | None,
    uncompiled: str | None,
    progress: Progress,
) -> dict[str, Any]:
    """What is added to a result by compiling the graph in ``folder``, or by ``uncompiled``, why it is not."""
    if profile.compiler is not None and through_provider(profile):
        uncompiled = mark_for_provider(folder, profile.compiler, workload)
    if uncompiled is not None:
        return {"compiled": None, "verification": _verification(result, profile, uncompiled)}
    assert profile.compiler is not None
    progress.start(f"compile with {PRODUCTS[profile.compiler.module].title}", None, "plans")
    compiled = compile_graph(folder, profile.compiler, capabilities_for(profile, target), workload)
    progress.finish()
    return {"compiled": compiled.recorded(), "verification": _verification(result, profile, compiled)}


def _build(reference: Reference, folder: Path, profile: Profile, progress: Progress) -> dict[str, Any]:
    graph = reference.graph
    if profile.fp8.attention and not attention_inputs(read_model(graph).graph):
        raise InputError(
            f"{graph} has attention as one operator, which profile {profile.name!r} cannot quantise: export it with "
            "--opset 21, or set attention = false"
        )
    bench = _Bench(reference, profile, folder)
    if profile.weights.scheme == FP8 and not bench.layers:
        raise InputError(
            f"{graph} has no linear layer whose sides are both 16 or more, so profile {profile.name!r} has nothing to "
            "quantise: use a profile whose scheme is fp32"
        )
    progress.start(FP8, None, "trials")
    try:
        model, quality = _settle(bench, progress)
    finally:
        progress.finish()
    gates = judge(quality, profile.gate)
    parity, gates["parity"] = parity_gate(model, _SELF_LIMIT if bench.layers else _HALF_LIMIT)
    return {
        "passed": all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "quality": quality.recorded() | {"sequences": bench.reference.origin},
        "calibration": bench.reference.calibrated_on if bench.layers else None,
        "parity": parity,
        "speed": None,
        "parts": dict.fromkeys(bench.layers, FP8),
        "kept": bench.kept,
    }


def _prepared(reference: Reference, place: Path, profile: Profile) -> Reference:
    """The reference, or that of a copy in ``place`` that computes the same from turned or smoother values."""
    if profile.fp8.rotate:
        model = read_model(reference.graph)
        rotate(model)
        reference = _copy_of(reference, model, place / "rotated")
    if profile.fp8.smooth:
        model = read_model(reference.graph)
        smooth(model, inputs_of(reference.graph, reference.calibration_text), product=fp8_product)
        reference = _copy_of(reference, model, place / "smoothed")
    return reference


def _copy_of(reference: Reference, model: ir.Model, folder: Path) -> Reference:
    folder.mkdir()
    copy_companions(reference.graph, folder)
    write_runtime(reference.graph, folder)
    write_models({MODEL: model}, folder)
    return reference.of(folder)


def _verification(result: dict[str, Any], profile: Profile, compiled: Compiled | str) -> dict[str, str]:
    """How far the build was proved: each rung of the ladder in docs/tensorrt.md with how, or that it was not.

    ``compiled`` is a sentence where it was not.
    """
    fp8 = profile.weights.scheme == FP8
    plan = compiled.sentence() if isinstance(compiled, Compiled) else f"no: {compiled}"
    rung = f"compiled ({compiled.recipe.title})" if isinstance(compiled, Compiled) else "not compiled"
    checked = ["contract checked"] if fp8 else []
    return {
        "summary": ", ".join([*checked, rung, "executed on CPU (numerics)", "not executed on GPU"]),
        "contract": f"checked: {len(result['parts'])} FP8 products" if fp8 else "none: the graph has no FP8",
        "compiled": plan,
        "executed_on_cpu": f"yes, for its numbers: onnxruntime {onnxruntime.__version__}, basic optimisation",
        "executed_on_gpu": "no",
    }


@dataclass
class _Bench:
    """One graph while it is being built: which layers are FP8 so far, and which are not and why."""

    reference: Reference
    profile: Profile
    folder: Path
    kept: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        fp8 = self.profile.weights.scheme == FP8
        linears = _linears(read_model(self.reference.graph)) if fp8 else {}
        narrow = [name for name, node in linears.items() if node.inputs[1] is not None and too_narrow(node.inputs[1])]
        self.layers = [name for name in linears if name not in narrow]
        for name in narrow:
            self._note(name, None, "a side is under 16, which FP8 products do not take")
        if HEAD in self.layers and read_runtime(self.reference.graph).tasks == ("score",):
            self.layers.remove(HEAD)
            self._note(HEAD, None, "of a scorer's head the label rows are left, fewer than FP8 products take")

    @cached_property
    def scales(self) -> dict[str, np.float32]:
        """Of each value that linear layers read."""
        rule, attention = self.profile.fp8.activation_scale, self.profile.fp8.attention
        besides = attention_inputs(read_model(self.reference.graph).graph) if attention else ()
        return {name: activation_scale(found, rule) for name, found in self.reference.counts(besides).items()}

    def write(self, folder: Path, names: list[str]) -> Model:
        """The graph with these layers in FP8 in ``folder``, checked and opened."""
        graph, half = self.reference.graph, self.profile.compute == "fp16"
        scales = self.scales if names else {}
        models = {MODEL: self._changed(read_model(graph), names, scales)}
        if (graph / SCORE).is_file():
            scoring = ir.load(graph / SCORE)
            known = scales | _same_scales(scoring, read_model(graph), scales)
            models[SCORE] = self._changed(scoring, [name for name in names if name != HEAD], known)
        copy_companions(graph, folder)
        for name in FOR_OTHERS:
            (folder / name).unlink(missing_ok=True)
        session = self.profile.session.model_dump(mode="json") | {"parallel_items": False}
        precision = self.profile.weights.scheme if names else self.profile.compute
        cache = "float16" if half else "float32"
        write_runtime(graph, folder, precision=precision, session=session, numerics_only=True, cache=cache)
        write_models(models, folder)
        return open_build(folder, self.profile)

    def _changed(self, model: ir.Model, names: list[str], scales: Mapping[str, np.float32]) -> ir.Model:
        """``model`` with these layers in FP8 and the rest in what the profile computes in, checked."""
        half = self.profile.compute == "fp16"
        if names:
            nodes, settled = _linears(model), half_scale if half else None
            layers = {name: nodes[name] for name in names}
            quantize_linears(model.graph, layers, scales, self.profile.fp8, settled)
            if self.profile.fp8.attention:
                quantize_attention(model.graph, scales, settled)
        if half:
            to_half(model)
        if names:
            require_valid(model)
        return model

    def alone(self, name: str, tokens: int | None = None) -> Quality:
        """Quality when only this layer is FP8."""
        with tempfile.TemporaryDirectory(prefix="slmdeploy-fp8-") as folder:
            return self.reference.comparison.quality(self.write(Path(folder), [name]), tokens=tokens)

    def all(self) -> tuple[Model, Quality]:
        """The build as it stands, and its quality."""
        model = self.write(self.folder, self.layers)
        return model, self.reference.comparison.quality(model)

    def leave(self, name: str, kl: float, reason: str) -> None:
        """Leave a layer as it was exported, and remember why."""
        self.layers.remove(name)
        self._note(name, kl, reason)

    def _note(self, name: str, kl: float | None, reason: str) -> None:
        self.kept.append({"part": name, "wanted": FP8, "form": KEPT, "kl_alone": kl, "reason": reason})


def _same_scales(scoring: ir.Model, generating: ir.Model, scales: Mapping[str, np.float32]) -> dict[str, np.float32]:
    """The scales of what the layers of a scoring graph read: those of the same layers, some read chosen rows of it."""
    named = {name: node.inputs[0].name for name, node in _linears(generating).items() if node.inputs[0] is not None}
    return {
        str(node.inputs[0].name): scales[str(named[name])]
        for name, node in _linears(scoring).items()
        if node.inputs[0] is not None and named[name] in scales
    }


def _linears(model: ir.Model) -> dict[str, ir.Node]:
    return {name: node for name, node in parts(model).items() if name != EMBEDDING}


def _settle(bench: _Bench, progress: Progress) -> tuple[Model, Quality]:
    """Leave out the head where it alone costs too much, then the most sensitive layers until the gate passes."""
    if HEAD in bench.layers and len(bench.layers) > 1:
        quality = bench.alone(HEAD)
        progress.advance(note=f"{HEAD} {quality.kl:.4f}")
        if spent := overspent(quality, bench.profile.gate):
            bench.leave(HEAD, quality.kl, spent)
    model, quality = bench.all()
    if _passes(quality, bench.profile):
        return model, quality
    names = [name for name in bench.layers if name != HEAD]
    alone = []
    for name in names:
        alone.append((bench.alone(name, _SCREENING_TOKENS).kl, name))
        progress.advance(note=f"{name} {alone[-1][0]:.4f}")
    alone.sort(reverse=True)
    budget, left = int(len(names) * _LEFT_SHARE), 0
    while left < budget and not _passes(quality, bench.profile):
        step = min(max(1, left), budget - left)
        for kl, name in alone[left : left + step]:
            bench.leave(name, kl, "among the most sensitive layers of a build outside its gate")
        left += step
        model, quality = bench.all()
    return model, quality


def _passes(quality: Quality, profile: Profile) -> bool:
    return all(gate["passed"] for gate in judge(quality, profile.gate).values())
