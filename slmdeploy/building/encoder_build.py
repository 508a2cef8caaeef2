"""Building an encoder: its graph fused and quantised under a profile, judged against the graph it was made of.

    fuse, if outputs stay as they are -> plan the form of each part -> quantise and write -> where quality fails, keep
    the most sensitive parts in higher precision -> a padded batch against its rows -> time it

What build.py's `_compile` is for decoders; the result has `passed`, `gates`, `quality`, `parity`, `speed`, `fused`,
`parts` and `kept` (docs/quantisation.md). Knows the order of things; what is done to a graph is in encoder_fusion.py
and encoder_parts.py, what is measured in encoder_gate.py.
"""

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from slmdeploy.building.encoder_fusion import fuse
from slmdeploy.building.encoder_gate import (
    EncoderComparison,
    Quality,
    judge,
    largest_difference,
    output_of,
    parity_gate,
    rows_for,
    speed_gate,
)
from slmdeploy.building.encoder_parts import plan_for, quantize
from slmdeploy.building.encoder_ranges import ranges_of
from slmdeploy.building.gate import finite
from slmdeploy.building.onnxruntime import MODEL, copy_companions, read_model, write_models, write_runtime
from slmdeploy.building.quantize import describe, higher
from slmdeploy.building.static_w8a8 import Range
from slmdeploy.errors import CorruptArtifactError, GateError
from slmdeploy.progress import Progress
from slmdeploy.runtime.encoder_config import EncoderConfig, read_encoder
from slmdeploy.runtime.encoding import Encoder
from slmdeploy.specs import Profile, Weights

FUSION_LIMIT = 1e-4
"""How far fusion may move an output in float32, as a share of its largest magnitude where that is above 1."""
_PROMOTED_SHARE = 0.25
"""Share of the quantised parts that may be kept in higher precision before a build counts as failed."""


def compile_encoder(
    graph: Path, folder: Path, profile: Profile, precision: str, data: Path | None, progress: Progress
) -> dict[str, Any]:
    """Write the build of the encoder in ``graph`` to ``folder`` and return its result.

    Raises InputError when there is nothing to quantise or the data holds no text, CorruptArtifactError for a damaged
    graph and GateError when the build is no valid model.
    """
    config = read_encoder(graph)
    reference = Encoder(graph, config, profile.session.threads)
    rows, origin = rows_for(graph, config, data)
    static = profile.weights.scheme == "w8a8-static"
    # What ranges come from says nothing of how good they are elsewhere.
    seen, judged = (rows[::2], rows[1::2] or rows) if static else ([], rows)
    comparison = EncoderComparison(reference, judged, output_of(config))
    fused = _measured_fusion(graph, reference, config)
    plan = plan_for(profile, read_model(graph))
    bench = _Bench(graph, profile, precision, comparison, progress, plan, fused=fused["used"])
    if static:
        bench.ranges = ranges_of(bench.model(), config, seen)
    encoder = bench.write(folder, bench.plan)
    quality = comparison.quality(encoder)
    if not _passes(quality, profile):
        encoder, quality = _promote(bench, folder, encoder, quality)
    gates = judge(quality, profile.gate)
    parity, gates["parity"] = parity_gate(encoder, config)
    speed, gate = speed_gate(reference, encoder, config)
    if bench.plan:  # the fp32 build is the fallback: it may be as fast as its graph and no more
        gates["speed"] = gate
    return {
        "passed": all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "quality": quality.recorded() | {"texts": origin},
        "parity": parity,
        "speed": speed,
        "fused": fused,
        "parts": {name: describe(form) for name, form in bench.plan.items() if form.scheme != "fp32"},
        "kept": bench.kept,
    }


@dataclass
class _Bench:
    """One graph under one profile while it is being built, and what was decided so far."""

    graph: Path
    profile: Profile
    precision: str
    comparison: EncoderComparison
    progress: Progress
    plan: dict[str, Weights]
    fused: bool
    ranges: dict[str, Range] = field(default_factory=dict)
    kept: list[dict[str, Any]] = field(default_factory=list)

    def model(self) -> ir.Model:
        """The graph in float32, fused where that is used."""
        model = read_model(self.graph)
        if self.fused:
            fuse(model)
        return model

    def write(self, folder: Path, plan: dict[str, Weights]) -> Encoder:
        """The graph under ``plan`` in ``folder``, opened."""
        model = self.model()
        quantize(model, plan, self.ranges)
        write_encoder_folder(model, self.graph, folder, profile=self.profile, precision=self.precision)
        return open_encoder_build(folder, self.profile)

    def quality_of(self, name: str) -> Quality:
        """Quality when only this part has its planned form."""
        with tempfile.TemporaryDirectory(prefix="slmdeploy-build-") as folder:
            quality = self.comparison.quality(self.write(Path(folder), {name: self.plan[name]}))
        self.progress.advance(note=f"{name} {quality.loss:.4g}")
        return quality

    def keep(self, name: str, loss: float) -> None:
        """Give a part its next more precise form and remember why."""
        wanted, form = self.plan[name], higher(self.plan[name])
        self.plan[name] = form
        reason = "among the most sensitive parts of a build outside its gate"
        self.kept.append(
            {"part": name, "wanted": describe(wanted), "form": describe(form), "loss_alone": loss, "reason": reason}
        )


def _measured_fusion(graph: Path, reference: Encoder, config: EncoderConfig) -> dict[str, Any]:
    """What fusion does to the graph and how far its outputs move in float32; ``used`` is False where that is too far.

    A form that ONNX Runtime refuses is not used either: the graph stays as it was exported, and the record says why.
    """
    model = read_model(graph)
    changed = asdict(fuse(model))
    if not any(changed.values()):
        return changed | {"used": False, "difference": None, "refused": None}
    with tempfile.TemporaryDirectory(prefix="slmdeploy-build-") as folder:
        write_models({MODEL: model}, Path(folder))
        try:
            difference = largest_difference(reference, Encoder(Path(folder), config, config.threads), config)
        except CorruptArtifactError as error:
            return changed | {"used": False, "difference": None, "refused": str(error)[:300]}
    used = difference <= FUSION_LIMIT
    refused = None if used else f"outputs move by more than {FUSION_LIMIT:g}"
    return changed | {"used": used, "difference": finite(difference), "refused": refused}


def write_encoder_folder(model: ir.Model, graph: Path, folder: Path, *, profile: Profile, precision: str) -> None:
    """Write ``model``, made from the encoder in ``graph``, into ``folder`` with all that goes along with it."""
    copy_companions(graph, folder)
    write_runtime(graph, folder, precision=precision, session=profile.session.model_dump(mode="json"))
    write_models({MODEL: model}, folder)


def open_encoder_build(folder: Path, profile: Profile) -> Encoder:
    """Open what has just been written; GateError when it is no valid model."""
    config: EncoderConfig = read_encoder(folder)
    try:
        return Encoder(folder, config, config.threads)
    except CorruptArtifactError as error:
        raise GateError(f"profile {profile.name!r} gives no valid graph, so nothing is written: {error}") from error


def _passes(quality: Quality, profile: Profile) -> bool:
    return all(gate["passed"] for gate in judge(quality, profile.gate).values())


def _promote(bench: _Bench, folder: Path, encoder: Encoder, quality: Quality) -> tuple[Encoder, Quality]:
    """Raise the precision of the most sensitive parts, 1, 2, 4, … of them, until the gate passes or a quarter is."""
    bench.progress.start("sensitivity of each part", len(bench.plan), "parts")
    alone = sorted(((bench.quality_of(name).loss, name) for name in bench.plan), reverse=True)
    bench.progress.finish()
    budget, raised = int(len(alone) * _PROMOTED_SHARE), 0
    while raised < budget and not _passes(quality, bench.profile):
        step = min(max(1, raised), budget - raised)
        for loss, name in alone[raised : raised + step]:
            bench.keep(name, loss)
        raised += step
        encoder = bench.write(folder, bench.plan)
        quality = bench.comparison.quality(encoder)
    return encoder, quality
