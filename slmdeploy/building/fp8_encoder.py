"""Building an encoder for the engine tensorrt: a portable graph becomes one for a compiler, judged by its numbers.

    count what the linear layers read -> quantise, make float16 of the rest, check the contract, write -> where quality
    fails, leave the most sensitive layers unquantised -> a padded batch against its rows

What fp8_build.py's steps are for decoders, with the gates of encoder_gate.py; verification and compiling are done
there, for both. Pooler and classifier are one row per text and stay float16. Knows the order of things; numbers are
fp8.py's and half.py's.
"""

import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slmdeploy.building.contract import OLDEST_OPSET, require_valid
from slmdeploy.building.encoder_build import open_encoder_build
from slmdeploy.building.encoder_gate import EncoderComparison, Quality, judge, output_of, parity_gate, rows_for
from slmdeploy.building.encoder_parts import linears
from slmdeploy.building.encoder_ranges import counts_of
from slmdeploy.building.fp8 import activation_scale, half_scale, quantize_linears, too_narrow
from slmdeploy.building.half import to_half
from slmdeploy.building.onnxruntime import MODEL, copy_companions, read_model, write_models, write_runtime
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress
from slmdeploy.runtime.encoder_config import EncoderConfig, read_encoder
from slmdeploy.runtime.encoding import Encoder, Row
from slmdeploy.specs import Profile

FP8, KEPT = "fp8", "as exported"
_LEFT_SHARE = 0.25
"""Share of the linear layers that may be left as they were before a build counts as failed."""
_STANDARD_DOMAINS = {"", "ai.onnx"}


def check_encoder(graph: Path, profile: Profile) -> None:
    """Raise InputError unless the encoder in ``graph`` and ``profile`` fit this engine."""
    opsets = read_model(graph).graph.opset_imports
    if set(opsets) - _STANDARD_DOMAINS or opsets.get("", 0) < OLDEST_OPSET:
        raise InputError(
            f"{graph} has operators of ONNX Runtime's own or of an old opset, and profile {profile.name!r} builds from "
            "standard ones: export it with --dialect portable"
        )
    for name in ("attention", "smooth", "rotate"):
        if getattr(profile.fp8, name):
            raise InputError(f"fp8.{name} is for decoders, and {graph} is an encoder's: leave it out of the profile")


def build_fp8_encoder(
    graph: Path, folder: Path, profile: Profile, data: Path | None, limits: tuple[float, float], progress: Progress
) -> dict[str, Any]:
    """Write the graph of the encoder in ``graph`` under ``profile`` to ``folder``; the result of its build.

    ``limits``: how far it may be from itself in a padded batch, with FP8 and without. Raises InputError where there is
    nothing to quantise or no text to measure on, GateError for a graph that breaks the contract or does not load.
    """
    config = read_encoder(graph)
    rows, origin = rows_for(graph, config, data)
    # What scales come from says nothing of how good they are elsewhere.
    seen, judged = rows[::2], rows[1::2] or rows
    reference = Encoder(graph, config, profile.session.threads)
    bench = _Bench(graph, folder, profile, config, seen, EncoderComparison(reference, judged, output_of(config)))
    if profile.weights.scheme == FP8 and not bench.layers:
        raise InputError(
            f"{graph} has no linear layer whose sides are both 16 or more, so profile {profile.name!r} has nothing to "
            "quantise: use a profile whose scheme is fp32"
        )
    progress.start(FP8, None, "trials")
    try:
        encoder, quality = _settle(bench, progress)
    finally:
        progress.finish()
    gates = judge(quality, profile.gate)
    parity, gates["parity"] = parity_gate(encoder, config, limits[0] if bench.layers else limits[1])
    return {
        "passed": all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "quality": quality.recorded() | {"texts": origin},
        "calibration": f"{len(seen)} rows of {origin}" if bench.layers else None,
        "parity": parity,
        "speed": None,
        "parts": dict.fromkeys(bench.layers, FP8),
        "kept": bench.kept,
    }


@dataclass
class _Bench:
    """One graph while it is being built: which layers are FP8 so far, and which are not and why."""

    graph: Path
    folder: Path
    profile: Profile
    config: EncoderConfig
    seen: list[Row]
    comparison: EncoderComparison
    kept: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        found = linears(read_model(self.graph)) if self.profile.weights.scheme == FP8 else {}
        narrow = [name for name, node in found.items() if node.inputs[1] is not None and too_narrow(node.inputs[1])]
        self.layers = [name for name in found if name not in narrow]
        for name in narrow:
            self._note(name, None, "a side is under 16, which FP8 products do not take")

    @cached_property
    def scales(self) -> dict[str, np.float32]:
        """Of each value that linear layers read."""
        counts = counts_of(read_model(self.graph), self.config, self.seen)
        return {name: activation_scale(found, self.profile.fp8.activation_scale) for name, found in counts.items()}

    def write(self, folder: Path, names: list[str]) -> Encoder:
        """The graph with these layers in FP8 in ``folder``, checked and opened."""
        model, half = read_model(self.graph), self.profile.compute == "fp16"
        if names:
            nodes = linears(model)
            layers = {name: nodes[name] for name in names}
            quantize_linears(model.graph, layers, self.scales, self.profile.fp8, half_scale if half else None)
        if half:
            to_half(model)
        if names:
            require_valid(model)
        copy_companions(self.graph, folder)
        session = self.profile.session.model_dump(mode="json")
        precision = self.profile.weights.scheme if names else self.profile.compute
        write_runtime(self.graph, folder, precision=precision, session=session, numerics_only=True)
        write_models({MODEL: model}, folder)
        return open_encoder_build(folder, self.profile)

    def alone(self, name: str) -> Quality:
        """Quality when only this layer is FP8."""
        with tempfile.TemporaryDirectory(prefix="slmdeploy-fp8-") as folder:
            return self.comparison.quality(self.write(Path(folder), [name]))

    def all(self) -> tuple[Encoder, Quality]:
        """The build as it stands, and its quality."""
        encoder = self.write(self.folder, self.layers)
        return encoder, self.comparison.quality(encoder)

    def leave(self, name: str, loss: float) -> None:
        """Leave a layer as it was exported, and remember why."""
        self.layers.remove(name)
        self._note(name, loss, "among the most sensitive layers of a build outside its gate")

    def _note(self, name: str, loss: float | None, reason: str) -> None:
        self.kept.append({"part": name, "wanted": FP8, "form": KEPT, "loss_alone": loss, "reason": reason})


def _settle(bench: _Bench, progress: Progress) -> tuple[Encoder, Quality]:
    """All layers, then without the most sensitive ones, 1, 2, 4, … of them, until the gate passes or a quarter is."""
    encoder, quality = bench.all()
    if _passes(quality, bench.profile) or not bench.layers:
        return encoder, quality
    alone = []
    for name in bench.layers:
        alone.append((bench.alone(name).loss, name))
        progress.advance(note=f"{name} {alone[-1][0]:.4g}")
    alone.sort(reverse=True)
    budget, left = int(len(alone) * _LEFT_SHARE), 0
    while left < budget and not _passes(quality, bench.profile):
        step = min(max(1, left), budget - left)
        for loss, name in alone[left : left + step]:
            bench.leave(name, loss)
        left += step
        encoder, quality = bench.all()
    return encoder, quality


def _passes(quality: Quality, profile: Profile) -> bool:
    return all(gate["passed"] for gate in judge(quality, profile.gate).values())
