"""Builds of several forms: one for prompts, one for single steps, one for scores, each fast at its phase.

Each form is compiled as a build of its own, with its own gates; forms that two phases share are compiled once. Then one
folder takes a graph of each: model.onnx for steps, prefill.onnx for prompts over the same KV cache, score.onnx. Tensors
that the graphs have in common (embedding, head, norms, and the weights of a shared form) are stored once. Whether the
handover is right is not taken on trust: the folder is compared with fp32 as a whole, half of each text being a prompt
and half steps behind it, and its scores must be exactly those of the form that they come from.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmdeploy.building.chunks import choose_chunk
from slmdeploy.building.gate import judge, same_scores_gate, speed_gate
from slmdeploy.building.lanes import choose_lanes
from slmdeploy.building.onnxruntime import open_build, open_folder, read_model, write_folder
from slmdeploy.building.reference import Reference
from slmdeploy.building.session_options import choose_session
from slmdeploy.building.step_rows import choose_step_rows
from slmdeploy.runtime.model import Model
from slmdeploy.specs import Profile, Weights

STEPS, PREFILL, SCORING = "steps", "prefill", "scoring"
Settle = Callable[[Path, Profile], dict[str, Any]]
"""Decides how a folder's graphs are run, writes that into its runtime.json, and gives what was measured."""
Compile = Callable[[Reference, Path, Profile, Settle], dict[str, Any]]
"""Compiles the graph under a profile of one form into a folder, and gives the result of that build."""


def phases_of(profile: Profile, tasks: tuple[str, ...]) -> dict[str, Weights]:
    """The form of each phase that has one of its own, for a graph of these tasks; one entry is an ordinary build."""
    if "generate" not in tasks:
        return {SCORING: profile.scoring or profile.weights}
    own = {PREFILL: profile.prefill, SCORING: profile.scoring if "score" in tasks else None}
    return {STEPS: profile.weights} | {
        phase: form for phase, form in own.items() if form not in (None, profile.weights)
    }


def settle(folder: Path, profile: Profile) -> dict[str, Any]:
    """Threads first, since all else depends on them; then pieces of prompts, lanes of scoring, rows of a batch."""
    session = choose_session(open_build(folder, profile), folder, profile.session)
    model = open_build(folder, profile)
    return {
        "session": session,
        "scoring": choose_lanes(model, folder),
        "prefill": choose_chunk(model, folder),
        "batch": choose_step_rows(model, folder),
    }


def precision_of(forms: dict[str, Weights]) -> str:
    """The words for a build's precision in runtime.json and reports: fp32, w8a8, int8, int4, or int4+w8a8."""
    words = [f"int{form.bits}" if form.scheme == "weight-only" else form.scheme for form in forms.values()]
    return "+".join(dict.fromkeys(words))


def of_one_form(profile: Profile, form: Weights) -> Profile:
    """The profile with this form in every phase."""
    return profile.model_copy(update={"weights": form, "prefill": None, "scoring": None})


def compile_phases(
    reference: Reference, folder: Path, profile: Profile, forms: dict[str, Weights], compile_form: Compile
) -> dict[str, Any]:
    """Compile each form, put the folder together and judge it; the result of the build."""
    with tempfile.TemporaryDirectory(prefix="slmdeploy-build-") as scratch:
        places = {form: Path(scratch) / str(i) for i, form in enumerate(dict.fromkeys(forms.values()))}
        for place in places.values():
            place.mkdir()
        # How a form is run by itself does not matter: that is decided for the folder as a whole.
        compiled = {
            form: compile_form(reference, place, of_one_form(profile, form), lambda *_: {})
            for form, place in places.items()
        }
        reference.release()  # whole and apart, all graphs of the build are open at once below
        results = {phase: compiled[form] for phase, form in forms.items()}
        apart = {phase: places[form] for phase, form in forms.items()}
        _put_together(reference, folder, profile, forms, apart)
        whole = open_build(folder, profile)
        gates = _form_gates(forms, results)
        if SCORING in forms:
            gates["split"] = same_scores_gate(open_folder(apart[SCORING]), whole)
        chosen = settle(folder, profile)
        whole = open_build(folder, profile)
        if PREFILL in forms:
            gates["faster prompts"] = _faster_prompts(open_folder(apart[STEPS]), whole)
    quality = reference.comparison.quality(whole)
    speed, speed_verdict = speed_gate(reference.model, whole)
    gates = judge(quality, profile.gate) | gates | {"speed": speed_verdict}
    judged = {
        "passed": all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "quality": quality.recorded() | {"sequences": reference.origin},
        "speed": speed,
        "forms": {
            phase: {name: result[name] for name in ("quality", "parity", "parts", "kept")}
            for phase, result in results.items()
        },
    }
    return results[STEPS] | judged | chosen


def _put_together(
    reference: Reference, folder: Path, profile: Profile, forms: dict[str, Weights], apart: dict[str, Path]
) -> None:
    """Write one folder with a graph of each form."""
    models = {place: read_model(place) for place in apart.values()}
    write_folder(
        models[apart[STEPS]],
        reference.graph,
        folder,
        precision=precision_of(forms),
        session=profile.session,
        prefill=models[apart[PREFILL]] if PREFILL in forms else None,
        scoring=models[apart[SCORING]] if SCORING in forms else None,
    )


def _form_gates(forms: dict[str, Weights], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The gates of each form under the name of the first phase that has it."""
    first: dict[Weights, str] = {}
    for phase, form in forms.items():
        first.setdefault(form, phase)
    return {f"{phase} {name}": gate for phase in first.values() for name, gate in results[phase]["gates"].items()}


def _faster_prompts(steps: Model, whole: Model) -> dict[str, Any]:
    """The gate that prompts are faster than they would be in the form for steps: a second graph has to pay."""
    ratio = speed_gate(steps, whole)[0]["prefill_ratio"]
    assert ratio is not None, "a model that generates has prompts"
    return {"passed": ratio < 1, "value": ratio, "limit": 1.0}
