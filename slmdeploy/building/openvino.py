"""Building for the engine openvino: a graph becomes openvino_model.xml, quantised by nncf, judged as all builds are.

    read the graph -> make a decoder stateful -> quantise -> write -> for each precision that this machine computes in:
    quality, parity, speed -> keep the fastest that passes, the most exact where none does

Which precision is fast differs by machine and phase (bfloat16 doubles prefill with AMX and slows steps), so it is tried
and not assumed; `result.precisions` has the figures of all. Knows the order of things; the graph is openvino_graph.py's
business, numbers are openvino_quantize.py's, and how good is good enough is gate.py's and encoder_gate.py's.
"""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from slmdeploy.building import encoder_gate
from slmdeploy.building.gate import judge, parity_gate, speed_gate
from slmdeploy.building.onnxruntime import MODEL, copy_companions, write_runtime
from slmdeploy.building.openvino_encoder import unpack
from slmdeploy.building.openvino_graph import read_graph, stateful_decoder
from slmdeploy.building.openvino_quantize import compress_weights, parts, quantize
from slmdeploy.building.phases import precision_of
from slmdeploy.building.reference import Reference
from slmdeploy.errors import CorruptArtifactError, GateError, InputError
from slmdeploy.extras import require
from slmdeploy.progress import Progress
from slmdeploy.runtime.bundle import FOR_OTHERS, PRECISIONS, read_runtime
from slmdeploy.runtime.encoder_config import is_encoder, read_encoder
from slmdeploy.runtime.encoder_model import open_encoder
from slmdeploy.runtime.encoding import Encoder, feed
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.openvino_session import GRAPH
from slmdeploy.runtime.text import load_tokenizer
from slmdeploy.specs import Profile, Weights

Trial = dict[str, Any]


def compile_openvino(
    graph: Path, folder: Path, profile: Profile, data: Path | None, progress: Progress
) -> dict[str, Any]:
    """Write the build of ``graph`` to ``folder`` and return its result.

    Raises MissingExtraError without the extra `openvino`, InputError for a graph that OpenVINO cannot run this way, and
    GateError when the build is no valid model.
    """
    require("openvino", "openvino", "nncf")
    copy_companions(graph, folder)
    for name in FOR_OTHERS:
        (folder / name).unlink(missing_ok=True)
    progress.start("openvino", None, "steps")
    try:
        return (_compile_encoder if is_encoder(graph) else _compile_decoder)(graph, folder, profile, data, progress)
    finally:
        progress.finish()


def _compile_decoder(
    graph: Path, folder: Path, profile: Profile, data: Path | None, progress: Progress
) -> dict[str, Any]:
    if read_runtime(graph).interface != "shared":
        raise InputError(
            f"{graph} is not of dialect 'ort', which profile {profile.name!r} builds from: export it with "
            "--dialect ort, or use a profile of the engine onnxruntime"
        )
    if profile.weights.scheme == "w8a8":
        raise InputError(f"profile {profile.name!r} has scheme w8a8, which the engine openvino has for encoders alone")
    reference = Reference(graph, data)
    model = stateful_decoder(graph / MODEL)
    if profile.weights.scheme == "weight-only":
        model = compress_weights(model, profile.weights)
    _save(model, folder)
    precision = precision_of({"generating": profile.weights})

    def attempt(compute: str) -> Trial:
        _write_runtime(graph, folder, profile, precision, compute, interface="stateful")
        config = read_runtime(folder)
        candidate = Model(folder, config, load_tokenizer(folder), config.threads)
        candidate.prefill([0])
        quality = reference.comparison.quality(candidate)
        gates = judge(quality, profile.gate)
        parity, gates["parity"] = parity_gate(candidate)
        speed, gates["speed"] = speed_gate(reference.model, candidate)
        return _trial(quality.recorded() | {"sequences": reference.origin}, gates, parity, speed)

    chosen, trials = _fastest(profile, attempt, progress)
    _write_runtime(graph, folder, profile, precision, chosen, interface="stateful")
    return _result(chosen, trials, parts(model))


def _compile_encoder(
    graph: Path, folder: Path, profile: Profile, data: Path | None, progress: Progress
) -> dict[str, Any]:
    config, form = read_encoder(graph), profile.encoder or profile.weights
    reference = Encoder(graph, config, profile.session.threads)
    rows, origin = encoder_gate.rows_for(graph, config, data)
    # What the ranges of activations come from says nothing of how good they are elsewhere.
    seen, judged = rows[::2], rows[1::2] or rows
    comparison = encoder_gate.EncoderComparison(reference, judged, encoder_gate.output_of(config))
    model = _quantised_encoder(graph, form, [feed([row], config) for row in seen])
    _save(model, folder)

    def attempt(compute: str) -> Trial:
        _write_runtime(graph, folder, profile, precision_of({"": form}), compute)
        found = read_encoder(folder)
        candidate = open_encoder(folder, found, found.threads)
        quality = comparison.quality(candidate)
        gates = encoder_gate.judge(quality, profile.gate)
        parity, gates["parity"] = encoder_gate.parity_gate(candidate, found)
        speed, gates["speed"] = encoder_gate.speed_gate(reference, candidate, found)
        return _trial(quality.recorded() | {"texts": origin}, gates, parity, speed)

    chosen, trials = _fastest(profile, attempt, progress)
    _write_runtime(graph, folder, profile, precision_of({"": form}), chosen)
    return _result(chosen, trials, parts(model))


def _quantised_encoder(graph: Path, form: Weights, feeds: list[dict[str, np.ndarray[Any, np.dtype[np.int64]]]]) -> Any:
    model = unpack(read_graph(graph / MODEL))
    if form.scheme == "w8a8":
        return quantize(model, feeds)
    return compress_weights(model, form) if form.scheme == "weight-only" else model


def _save(model: Any, folder: Path) -> None:
    import openvino

    openvino.save_model(model, str(folder / GRAPH), compress_to_fp16=False)


def _write_runtime(
    graph: Path, folder: Path, profile: Profile, precision: str, compute: str, **changes: object
) -> None:
    session = profile.session.model_dump(mode="json")
    if "interface" in changes:  # a decoder's
        session["parallel_items"] = False
    write_runtime(
        graph, folder, precision=precision, session=session, openvino={"inference_precision": compute}, **changes
    )


def _trial(quality: dict[str, Any], gates: dict[str, Any], parity: list[dict[str, Any]], speed: Any) -> Trial:
    passed = all(gate["passed"] for gate in gates.values())
    return {"passed": passed, "gates": gates, "quality": quality, "parity": parity, "speed": speed}


def _fastest(profile: Profile, attempt: Callable[[str], Trial], progress: Progress) -> tuple[str, dict[str, Trial]]:
    """The precision of the fastest trial that passed, phases counting alike, and all trials.

    Where none passed it is the fastest of all: the build is a failed one then, whichever it has.
    """
    import openvino

    native = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    trials: dict[str, Trial] = {}
    for compute in PRECISIONS:
        if compute == "f32" or compute.upper() in native:
            try:
                trials[compute] = attempt(compute)
            except CorruptArtifactError as error:
                raise GateError(
                    f"profile {profile.name!r} gives no valid model, so nothing is written: {error}"
                ) from error
            progress.advance(note=compute)
    passed = {compute: trial for compute, trial in trials.items() if trial["passed"]} or trials
    return min(passed, key=lambda compute: _time(passed[compute])), trials


def _time(trial: Trial) -> float:
    """The product of the phases' times over the reference's."""
    ratios: list[float] = [ratio for ratio in trial["speed"].values() if ratio is not None]
    return prod(ratios)


def _result(chosen: str, trials: dict[str, Trial], forms: dict[str, str]) -> dict[str, Any]:
    """A build's result, with what was measured of each precision."""
    import nncf
    import openvino

    shown = {compute: {key: trial[key] for key in ("passed", "quality", "speed")} for compute, trial in trials.items()}
    return trials[chosen] | {
        "parts": forms,
        "kept": [],
        "inference_precision": chosen,
        "precisions": shown,
        "made_by": {"openvino": openvino.__version__, "nncf": nncf.__version__},
    }
