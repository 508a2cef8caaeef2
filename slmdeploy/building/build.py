"""The verb `build`: a graph compiled under a profile for a target, judged against its own fp32 graph.

    check what the profile requires -> plan the form of each part -> try embedding and head, each by itself ->
    quantise and write -> where quality fails, keep the most sensitive layers in higher precision -> time it

Every step's outcome goes into the manifest's result: forms, layers kept and why, quality, speed, gates. A build outside
its gate is still written, with ``passed`` false, so that its figures can be looked at; selection refuses it. Knows the
order of things and no arithmetic: that is in w8a8.py, blockwise.py and gate.py. A form for each phase: phases.py.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.building.cuda import build_for_cuda
from slmdeploy.building.encoder_build import compile_encoder
from slmdeploy.building.fp8_build import build_for_tensorrt
from slmdeploy.building.gate import (
    Comparison,
    Quality,
    judge,
    overspent,
    parity_gate,
    speed_gate,
    standard_gate,
)
from slmdeploy.building.onnxruntime import (
    check_requirements,
    keep_only_scoring,
    open_build,
    read_model,
    write_folder,
)
from slmdeploy.building.openvino import compile_openvino
from slmdeploy.building.phases import STEPS, Settle, compile_phases, of_one_form, phases_of, precision_of, settle
from slmdeploy.building.prepacking import prepack
from slmdeploy.building.preparing import prepared, refuse_for_encoders
from slmdeploy.building.quantize import EMBEDDING, HEAD, describe, higher, parts, plan_for, quantize, rounded
from slmdeploy.building.reference import Reference
from slmdeploy.building.rewriting import weight_array
from slmdeploy.building.rounding import Rounding, method_for
from slmdeploy.building.standard_graph import STANDARD
from slmdeploy.building.static_w8a8 import Range
from slmdeploy.errors import InputError
from slmdeploy.progress import SILENT, Progress
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.encoder_config import is_encoder
from slmdeploy.runtime.model import Model
from slmdeploy.specs import Profile, Target, Weights, Workload

_PROMOTED_SHARE = 0.25
"""Share of the quantised linear layers that may be kept in higher precision before a build counts as failed."""
_SCREENING_TOKENS = 1024


def build(
    graph: Path,
    *,
    profile: Profile,
    target: Target | None = None,
    out: Path,
    data: Path | None = None,
    workload: Workload | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Compile the graph folder ``graph`` under ``profile`` for ``target`` (None: this machine) and write it to ``out``.

    ``data`` is a folder whose validation split the quality gate runs on; without it the fp32 graph writes its own text.
    ``workload`` says for which lengths a compiler should choose its kernels; of the engine tensorrt alone.
    The result has ``passed``, ``gates``, ``quality``, ``parity``, ``speed``, ``scoring``, ``prefill``, ``parts``,
    ``kept``, ``singular``, ``prepared``, and ``forms`` where phases have forms of their own: docs/quantisation.md. A
    build of the engine tensorrt is a graph for its compiler and has ``verification`` instead of ``speed``:
    docs/tensorrt.md. Raises InputError when the target lacks what the profile requires, the graph has nothing to
    quantise or the data nothing to measure on, CorruptArtifactError for a damaged graph, OutputExistsError, and
    GateError when the result is no valid model.
    """
    check_requirements(profile, target)
    open_artifact(graph, "graph")
    encodes = is_encoder(graph)
    plan = {"profile": profile.model_dump(mode="json"), "target": target.name if target else None}
    if workload is not None:
        if profile.engine != "tensorrt":
            raise InputError(f"profile {profile.name!r} compiles nothing for a workload: leave --workload out")
        plan["workload"] = workload.model_dump(mode="json", exclude_none=True)
    inputs = {"graph": graph} | ({"data": data} if data else {})
    with writing(out, kind="build", plan=plan, inputs=inputs, force=force) as draft:
        if profile.engine == "openvino":
            draft.result |= compile_openvino(graph, draft.path, profile, data, progress or SILENT)
        elif profile.engine == "tensorrt":
            bar = progress or SILENT
            draft.result |= build_for_tensorrt(graph, draft.path, profile, target, data, workload, bar)
        elif profile.engine == "cuda":
            draft.result |= build_for_cuda(graph, draft.path, profile, data)
        elif encodes:
            refuse_for_encoders(profile)
            precision = precision_of({STEPS: profile.weights})
            draft.result |= compile_encoder(graph, draft.path, profile, precision, data, progress or SILENT)
        else:
            result = _compile(graph, draft.path, profile, data, progress or SILENT)
            draft.result |= _with_standard(draft.path, result)
            if read_runtime(draft.path).tasks == ("score",):
                keep_only_scoring(draft.path)
        if profile.prepacked:
            draft.result["prepacked"] = prepack(draft.path)
    return open_artifact(out, "build")


@dataclass
class _Bench:
    """One graph under one profile while it is being built: what it is compared with, and what was decided so far."""

    graph: Path
    profile: Profile
    comparison: Comparison
    plan: dict[str, Weights]
    progress: Progress
    ranges: dict[str, Range] = field(default_factory=dict)
    rounding: Rounding | None = None
    singular: list[str] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path, plan: dict[str, Weights]) -> Model:
        """The graph under ``plan`` in ``folder``, opened; nothing of an earlier one is left there."""
        model = read_model(self.graph)
        quantize(model, plan, self.ranges, self.rounding)
        precision = precision_of({STEPS: self.profile.weights})
        write_folder(model, self.graph, folder, precision=precision, session=self.profile.session)
        return open_build(folder, self.profile)

    def alone(self, name: str, tokens: int | None = None) -> Quality:
        """Quality when only this part has its planned form."""
        with tempfile.TemporaryDirectory(prefix="slmdeploy-build-") as folder:
            quality = self.comparison.quality(self.write(Path(folder), {name: self.plan[name]}), tokens=tokens)
        self.progress.advance(note=f"{name} {quality.kl:.4f}")
        return quality

    def keep(self, name: str, kl: float, reason: str) -> None:
        """Give a part its next more precise form and remember why."""
        wanted, form = self.plan[name], higher(self.plan[name])
        self.plan[name] = form
        self.kept.append(
            {"part": name, "wanted": describe(wanted), "form": describe(form), "kl_alone": kl, "reason": reason}
        )


def _compile(graph: Path, folder: Path, profile: Profile, data: Path | None, progress: Progress) -> dict[str, Any]:
    def compile_form(reference: Reference, folder: Path, profile: Profile, settle: Settle) -> dict[str, Any]:
        return _compile_form(reference, folder, profile, progress, settle)

    forms = phases_of(profile, read_runtime(graph).tasks)
    with prepared(Reference(graph, data, profile.rounding), profile) as (reference, done):
        if len(forms) == 1:
            result = compile_form(reference, folder, of_one_form(profile, *forms.values()), settle)
        else:
            result = compile_phases(reference, folder, profile, forms, compile_form)
    return result | {"prepared": done}


def _with_standard(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The result of a build, with the comparison of its standard.onnx where it has one."""
    if not (folder / STANDARD).is_file():
        return result
    rungs, gate = standard_gate(folder)
    gates = result["gates"] | {"standard": gate}
    return result | {
        "passed": result["passed"] and gate["passed"],
        "gates": gates,
        "parity": result["parity"] + rungs,
    }


def _compile_form(
    reference: Reference, folder: Path, profile: Profile, progress: Progress, settle: Settle
) -> dict[str, Any]:
    """A build whose phases all have the form ``profile.weights``; ``settle`` decides how it runs."""
    source = read_model(reference.graph)
    plan = plan_for(profile, source)
    if not plan:
        precision = precision_of({STEPS: profile.weights})
        write_folder(source, reference.graph, folder, precision=precision, session=profile.session)
        model = open_build(folder, profile)
        return _as_it_is(profile, model) | settle(folder, profile)
    static = any(form.scheme == "w8a8-static" for form in plan.values())
    ranges = reference.ranges if static else {}
    bench = _Bench(reference.graph, profile, reference.comparison, plan, progress, ranges)
    reference.release()  # what follows opens graphs of the same size
    calibrated = _round(bench, source, reference) or static
    reference.release()  # of what rounding has left
    _settle_tables(bench)
    model = bench.write(folder, bench.plan)
    quality = bench.comparison.quality(model)
    if not _passes(quality, profile):
        model, quality = _promote(bench, folder, model, quality)
    gates = judge(quality, profile.gate)
    parity, gates["parity"] = parity_gate(model)
    chosen = settle(folder, profile)
    speed, gates["speed"] = speed_gate(reference.model, open_build(folder, profile))
    return {
        "passed": all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "quality": quality.recorded() | {"sequences": reference.origin},
        "calibration": reference.calibrated_on if calibrated else None,
        "singular": bench.singular,
        "parity": parity,
        "speed": speed,
        "parts": {name: describe(form) for name, form in bench.plan.items() if form.scheme != "fp32"},
        "kept": bench.kept,
    } | chosen


def _as_it_is(profile: Profile, model: Model) -> dict[str, Any]:
    """The result of a build that changes nothing: equal to its reference by construction; only parity is measured."""
    quality = Quality(kl=0.0, top1_agreement=1.0, ppl_ratio=1.0, positions=0)
    parity, gate = parity_gate(model)
    return {
        "passed": gate["passed"],
        "gates": judge(quality, profile.gate) | {"parity": gate},
        "quality": quality.recorded() | {"sequences": "none: the graph is unchanged"},
        "calibration": None,
        "singular": [],
        "parity": parity,
        "speed": None,
        "parts": {},
        "kept": [],
    }


def _round(bench: _Bench, source: ir.Model, reference: Reference) -> bool:
    """Round layers by what they read (rounding.py), which all trials then share; False: all are rounded alone.

    Graphs of other interfaces cannot be run for it: their layers are rounded for themselves.
    """
    forms = {name: form for name, form in bench.plan.items() if name != EMBEDDING}
    layers = [name for name, form in forms.items() if method_for(bench.profile.rounding, form.bits) != "nearest"]
    if not layers or read_runtime(reference.graph).interface != "shared":
        return False
    bench.rounding, nodes = reference.rounding, parts(source)
    tokens = sum(map(len, reference.calibration_text))
    bench.singular = [name for name in layers if _inputs(nodes[name]) > tokens]
    bench.progress.start("rounding of weights", len(layers), "layers")
    for name in layers:
        if forms[name].scheme == "weight-only":  # those of W8A8 are when their halves are known
            rounded(nodes[name], forms[name], bench.rounding)
        bench.progress.advance()
    bench.progress.finish()
    return True


def _inputs(node: ir.Node) -> int:
    """How many numbers a linear layer reads per token."""
    weight = node.inputs[1]
    assert weight is not None
    return len(weight_array(weight))


def _settle_tables(bench: _Bench) -> None:
    """Embedding and head take a more precise form where one of them alone spends too much of what a gate allows."""
    tables = [name for name in (EMBEDDING, HEAD) if name in bench.plan]
    bench.progress.start("embedding and head", None, "trials")
    for name in tables:
        while bench.plan[name].scheme != "fp32":
            quality = bench.alone(name)
            if not (spent := overspent(quality, bench.profile.gate)):
                break
            bench.keep(name, quality.kl, spent)
    bench.progress.finish()


def _passes(quality: Quality, profile: Profile) -> bool:
    return all(gate["passed"] for gate in judge(quality, profile.gate).values())


def _promote(bench: _Bench, folder: Path, model: Model, quality: Quality) -> tuple[Model, Quality]:
    """Raise the precision of the most sensitive layers, 1, 2, 4, … of them, until the gate passes or a quarter is."""
    names = [name for name, form in bench.plan.items() if name not in (EMBEDDING, HEAD) and form.scheme != "fp32"]
    bench.progress.start("sensitivity of each layer", len(names), "layers")
    alone = sorted(((bench.alone(name, _SCREENING_TOKENS).kl, name) for name in names), reverse=True)
    bench.progress.finish()
    budget, raised = int(len(names) * _PROMOTED_SHARE), 0
    while raised < budget and not _passes(quality, bench.profile):
        step = min(max(1, raised), budget - raised)
        for kl, name in alone[raised : raised + step]:
            bench.keep(name, kl, "among the most sensitive layers of a build outside its gate")
        raised += step
        model = bench.write(folder, bench.plan)
        quality = bench.comparison.quality(model)
    return model, quality
