"""Building for the engine cuda: a decoder of the dialect ort in float16 for ONNX Runtime's CUDA provider.

    4-bit weights where the profile says so -> float16 -> judged by its numbers on the CPU -> marked for the provider

The operators are those of the CPU builds (GroupQueryAttention, MatMulNBits), which the provider has in float16 with
flash attention. On a CPU they compute the same in float16, so quality and parity are measured here; speed is not, and
a folder marked for CUDA opens where the provider is and nowhere else. Knows the order of things alone.
"""

from pathlib import Path
from typing import Any

import onnxruntime

from slmdeploy.building.gate import judge, parity_gate
from slmdeploy.building.half import to_half
from slmdeploy.building.onnxruntime import (
    MODEL,
    SCORE,
    copy_companions,
    open_build,
    read_model,
    write_models,
    write_runtime,
)
from slmdeploy.building.quantize import describe, plan_for, quantize
from slmdeploy.building.reference import Reference
from slmdeploy.errors import InputError
from slmdeploy.runtime.bundle import FOR_OTHERS, read_runtime
from slmdeploy.runtime.encoder_config import is_encoder
from slmdeploy.specs import Profile

_LIMIT = 0.03
"""How far steps may be from one run over the whole, of the largest logit: float16 rounds behind every operator."""


def build_for_cuda(graph: Path, folder: Path, profile: Profile, data: Path | None) -> dict[str, Any]:
    """Write the build of ``graph`` to ``folder`` and return its result, with ``verification`` in the place of a speed.

    Raises InputError for a graph of another kind, and GateError when the result is no valid model.
    """
    _check(graph, profile)
    reference, model = Reference(graph, data), read_model(graph)
    plan = plan_for(profile, model)
    quantize(model, plan, rounding=reference.rounding if profile.weights.bits == 4 else None)
    to_half(model)
    copy_companions(graph, folder)
    for name in FOR_OTHERS:
        (folder / name).unlink(missing_ok=True)
    session = profile.session.model_dump(mode="json") | {"parallel_items": False}
    precision = "fp16" if profile.weights.scheme == "fp32" else describe(profile.weights)
    write_runtime(graph, folder, precision=precision, session=session, cache="float16")
    write_models({MODEL: model}, folder)
    candidate = open_build(folder, profile)
    quality = reference.comparison.quality(candidate)
    gates = judge(quality, profile.gate)
    parity, gates["parity"] = parity_gate(candidate, _LIMIT)
    write_runtime(folder, folder, provider="cuda")
    return {
        "passed": all(gate["passed"] for gate in gates.values()),
        "gates": gates,
        "quality": quality.recorded() | {"sequences": reference.origin},
        "calibration": reference.calibrated_on if profile.weights.bits == 4 else None,
        "parity": parity,
        "speed": None,
        "parts": {name: describe(form) for name, form in plan.items()},
        "kept": [],
        "verification": {
            "summary": "executed on CPU (numerics), not executed on GPU",
            "executed_on_cpu": f"yes, for its numbers: onnxruntime {onnxruntime.__version__}, float16 on the CPU",
            "executed_on_gpu": "no",
        },
    }


def _check(graph: Path, profile: Profile) -> None:
    if is_encoder(graph) or read_runtime(graph).interface != "shared" or (graph / SCORE).is_file():
        raise InputError(
            f"{graph} is no decoder of dialect 'ort' for the task generate alone, as profile {profile.name!r} needs: "
            "export it with --dialect ort --task generate"
        )
