"""Building for the engine tensorrt: a portable decoder becomes an FP8 graph for its compiler, judged by its numbers.

    count what the linear layers read -> scales -> try the head by itself -> quantise, check the contract, write ->
    where quality fails, leave the most sensitive layers as they were exported

Nothing is compiled: the result says under ``verification`` what was done and what was not, and has no speed. ONNX
Runtime computes the graph on the CPU as it is written; a compiler that fuses sums in another order rounds a little
differently. Attention, norms and the embedding keep the graph's precision. Knows the order of things; numbers are
fp8.py's, the rules of a valid graph contract.py's and limits gate.py's.
"""

import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from slmdeploy.building.contract import require_valid
from slmdeploy.building.fp8 import activation_scale, quantize_linears, too_narrow
from slmdeploy.building.gate import Quality, judge, overspent, parity_gate
from slmdeploy.building.onnxruntime import MODEL, copy_companions, open_build, read_model, write_models, write_runtime
from slmdeploy.building.quantize import EMBEDDING, HEAD, parts
from slmdeploy.building.reference import Reference
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress
from slmdeploy.runtime.bundle import FOR_OTHERS, read_runtime
from slmdeploy.runtime.encoder_config import is_encoder
from slmdeploy.runtime.model import Model
from slmdeploy.specs import Profile, Target

FP8, KEPT = "fp8", "as exported"
_LEAST_COMPUTE_CAPABILITY = (8, 9)
_LEFT_SHARE = 0.25
"""Share of the linear layers that may be left as they were before a build counts as failed."""
_SCREENING_TOKENS = 1024
_SELF_LIMIT = 0.15
"""How far an FP8 build may be from itself: where sums of another order fall on the other side between two codes, a
number changes by an eighth at most (0.04 measured on the shipped teacher); a misplaced token is off by all of it."""


def compile_fp8(
    graph: Path, folder: Path, profile: Profile, target: Target | None, data: Path | None, progress: Progress
) -> dict[str, Any]:
    """Write the FP8 build of ``graph`` to ``folder`` and return its result.

    Raises InputError for a graph or a target that FP8 is not for, and GateError when the result breaks the contract.
    """
    _check_target(profile, target)
    _check_graph(graph, profile)
    bench = _Bench(Reference(graph, data), profile, folder)
    if not bench.layers:
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
    parity, gates["parity"] = parity_gate(model, _SELF_LIMIT)
    return {
        "passed": all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "quality": quality.recorded() | {"sequences": bench.reference.origin},
        "calibration": bench.reference.calibrated_on,
        "parity": parity,
        "speed": None,
        "parts": dict.fromkeys(bench.layers, FP8),
        "kept": bench.kept,
        "verification": _verification(bench),
    }


def _check_target(profile: Profile, target: Target | None) -> None:
    found = target.compute_capability if target else None
    if found is not None and tuple(map(int, found.split("."))) < _LEAST_COMPUTE_CAPABILITY:
        raise InputError(
            f"profile {profile.name!r} needs compute capability 8.9 for FP8, and target {target and target.name!r} has "
            f"{found}: choose another profile or target"
        )


def _check_graph(graph: Path, profile: Profile) -> None:
    what = "an encoder's" if is_encoder(graph) else f"of the {read_runtime(graph).interface} interface"
    if what != "of the standard interface":
        raise InputError(
            f"{graph} is {what}, and profile {profile.name!r} builds from decoders of the standard interface: "
            "export it with --dialect portable --task generate, opset 21 or 23"
        )


def _verification(bench: "_Bench") -> dict[str, str]:
    """How far the build was proved: each rung of the ladder in docs/tensorrt.md with how, or that it was not."""
    return {
        "summary": "contract checked, executed on CPU (numerics); not compiled",
        "contract": f"checked: {len(bench.layers)} FP8 products",
        "compiled": "no",
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
        linears = _linears(read_model(self.reference.graph))
        narrow = [name for name, node in linears.items() if node.inputs[1] is not None and too_narrow(node.inputs[1])]
        self.layers = [name for name in linears if name not in narrow]
        for name in narrow:
            self._note(name, None, "a side is under 16, which FP8 products do not take")

    @cached_property
    def scales(self) -> dict[str, np.float32]:
        """Of each value that linear layers read."""
        rule = self.profile.fp8.activation_scale
        return {name: activation_scale(counts, rule) for name, counts in self.reference.counts.items()}

    def write(self, folder: Path, names: list[str]) -> Model:
        """The graph with these layers in FP8 in ``folder``, checked and opened."""
        graph = self.reference.graph
        model = read_model(graph)
        nodes = _linears(model)
        quantize_linears(model.graph, {name: nodes[name] for name in names}, self.scales, self.profile.fp8)
        require_valid(model)
        copy_companions(graph, folder)
        for name in FOR_OTHERS:
            (folder / name).unlink(missing_ok=True)
        session = self.profile.session.model_dump(mode="json") | {"parallel_items": False}
        write_runtime(graph, folder, precision=FP8, session=session, numerics_only=True)
        write_models({MODEL: model}, folder)
        return open_build(folder, self.profile)

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
