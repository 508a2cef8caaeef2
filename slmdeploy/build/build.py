"""The verb `build`: a graph compiled under a profile for a target, judged against its own fp32 graph.

    check what the profile requires -> plan the form of each part -> try embedding and head, each by itself ->
    quantise and write -> where quality fails, keep the most sensitive layers in higher precision -> time it

Every step's outcome goes into the manifest's result: forms, layers kept and why, quality, speed, gates. A build outside
its gate is still written, with ``passed`` false, so that its figures can be looked at; selection refuses it. Knows the
order of things and no arithmetic: that is in w8a8.py, blockwise.py and gate.py.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmdeploy.artifacts import Artifact, open_artifact, refuse_existing, writing
from slmdeploy.build.gate import Quality, Sequences, as_dict, judge, measure_quality, sequences_for, speed_gate
from slmdeploy.build.onnxruntime import check_requirements, open_build, open_folder, read_model, write_folder
from slmdeploy.build.quantize import EMBEDDING, HEAD, describe, higher, plan_for, quantize
from slmdeploy.progress import SILENT, Progress
from slmdeploy.runtime.model import Model
from slmdeploy.specs import Profile, Target, Weights

_TABLE_SHARE = 0.5
"""Share of the profile's KL limit that the embedding or the head may use up by itself."""
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
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Compile the graph folder ``graph`` under ``profile`` for ``target`` (None: this machine) and write it to ``out``.

    ``data`` is a folder whose validation split the quality gate runs on; without it the fp32 graph writes its own text.
    The result has ``passed``, ``gates``, ``quality``, ``speed``, ``parts`` and ``kept`` (docs/quantisation.md).
    Raises InputError when the target lacks what the profile requires, when the graph has nothing to quantise or the data
    nothing to measure on, CorruptArtifactError for a damaged graph and OutputExistsError.
    """
    check_requirements(profile, target)
    refuse_existing(out, force)
    open_artifact(graph, "graph")
    plan = {"profile": profile.model_dump(mode="json"), "target": target.name if target else None}
    inputs = {"graph": graph} | ({"data": data} if data else {})
    with writing(out, kind="build", plan=plan, inputs=inputs, force=force) as draft:
        draft.result |= _compile(graph, draft.path, profile, data, progress or SILENT)
    return open_artifact(out, "build")


@dataclass
class _Bench:
    """One graph under one profile while it is being built: the fp32 reference, the text, and what was decided so far."""

    graph: Path
    profile: Profile
    reference: Model
    sequences: Sequences
    plan: dict[str, Weights]
    progress: Progress
    kept: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def variant(self, plan: dict[str, Weights]) -> Iterator[Model]:
        """The graph under another plan, in a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="slmdeploy-build-") as name:
            folder = Path(name)
            _write(self.graph, folder, self.profile, plan)
            yield open_build(folder, self.profile)

    def kl_of(self, name: str, sequences: Sequences) -> float:
        """KL in nats per token when only this part has its planned form."""
        with self.variant({name: self.plan[name]}) as model:
            kl = measure_quality(self.reference, model, sequences).kl
        self.progress.advance(note=f"{name} {kl:.4f}")
        return kl

    def keep(self, name: str, kl: float, reason: str) -> None:
        """Give a part its next more precise form and remember why."""
        wanted, form = self.plan[name], higher(self.plan[name])
        self.plan[name] = form
        self.kept.append(
            {"part": name, "wanted": describe(wanted), "form": describe(form), "kl_alone": kl, "reason": reason}
        )


def _write(graph: Path, folder: Path, profile: Profile, plan: dict[str, Weights]) -> None:
    model = read_model(graph)
    quantize(model, plan)
    write_folder(model, graph, folder, precision=precision_of(profile), session=profile.session)


def precision_of(profile: Profile) -> str:
    """The word for the profile's precision in runtime.json and reports: fp32, w8a8, int8 or int4."""
    weights = profile.weights
    return f"int{weights.bits}" if weights.scheme == "weight-only" else weights.scheme


def _compile(graph: Path, folder: Path, profile: Profile, data: Path | None, progress: Progress) -> dict[str, Any]:
    plan = plan_for(profile, read_model(graph))
    reference = open_folder(graph)
    sequences, source = sequences_for(reference, data)
    bench = _Bench(graph, profile, reference, sequences, plan, progress)
    _settle_tables(bench)
    quality = _measure(bench)
    if not _passes(quality, profile):
        quality = _promote(bench, quality)
    _write(graph, folder, profile, bench.plan)
    model = open_build(folder, profile)
    gates = judge(quality, profile.gate)
    speed = None
    if plan:
        speed, gates["speed"] = speed_gate(reference, model)
    return {
        "passed": all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "quality": as_dict(quality) | {"sequences": source},
        "speed": speed,
        "parts": {name: describe(form) for name, form in bench.plan.items() if form.scheme != "fp32"},
        "kept": bench.kept,
    }


def _settle_tables(bench: _Bench) -> None:
    """Embedding and head stay fp32 where one of them alone spends too much of the allowed KL."""
    tables = [name for name in (EMBEDDING, HEAD) if name in bench.plan]
    limit = bench.profile.gate.max_kl * _TABLE_SHARE
    bench.progress.start("embedding and head", len(tables), "parts")
    for name in tables:
        kl = bench.kl_of(name, bench.sequences)
        while kl > limit and bench.plan[name].scheme != "fp32":
            bench.keep(name, kl, f"KL {kl:.4g} alone exceeds {limit:.4g}")
            kl = bench.kl_of(name, bench.sequences)
    bench.progress.finish()


def _measure(bench: _Bench) -> Quality:
    with bench.variant(bench.plan) as model:
        return measure_quality(bench.reference, model, bench.sequences)


def _passes(quality: Quality, profile: Profile) -> bool:
    return all(gate["passed"] for gate in judge(quality, profile.gate).values())


def _promote(bench: _Bench, quality: Quality) -> Quality:
    """Raise the precision of the most sensitive layers, 1, 2, 4, … of them, until the gate passes or a quarter is raised."""
    names = [name for name, form in bench.plan.items() if name not in (EMBEDDING, HEAD) and form.scheme != "fp32"]
    bench.progress.start("sensitivity of each layer", len(names), "layers")
    few = _first_tokens(bench.sequences)
    alone = sorted(((bench.kl_of(name, few), name) for name in names), reverse=True)
    bench.progress.finish()
    budget, raised = int(len(names) * _PROMOTED_SHARE), 0
    while raised < budget and not _passes(quality, bench.profile):
        step = min(max(1, raised), budget - raised)
        for kl, name in alone[raised : raised + step]:
            bench.keep(name, kl, "among the most sensitive layers of a build outside its gate")
        raised += step
        quality = _measure(bench)
    return quality


def _first_tokens(sequences: Sequences) -> Sequences:
    chosen: list[list[int]] = []
    for sequence in sequences:
        if sum(map(len, chosen)) >= _SCREENING_TOKENS:
            break
        chosen.append(list(sequence))
    return chosen
