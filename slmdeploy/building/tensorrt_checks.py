"""What is checked before a build for the engine tensorrt begins: target, graph, and whether this machine compiles it.

Each refusal is one sentence with its remedy, before the first trial. Knows nothing of precision or of how a graph is
compiled.
"""

from pathlib import Path

from slmdeploy.building.fp8_encoder import FP8, check_encoder
from slmdeploy.building.ort_providers import THROUGH
from slmdeploy.building.tensorrt import missing
from slmdeploy.errors import InputError
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.cuda_device import find_gpu
from slmdeploy.runtime.encoder_config import is_encoder
from slmdeploy.runtime.tensorrt_api import PRODUCTS, capability, load
from slmdeploy.specs import Profile, Target

_LEAST_COMPUTE_CAPABILITY = (8, 9)


def why_not_compiled(profile: Profile, target: Target | None) -> str | None:
    """Why this machine leaves the graph uncompiled; None where it compiles it.

    Asked before the first trial, so that what the compiler cannot do is refused before the work.
    """
    if profile.compiler is None:
        return "the profile names no compiler"
    if through_provider(profile):
        return None  # nothing is asked of this machine
    if reason := missing(profile.compiler):
        return reason
    product = PRODUCTS[profile.compiler.module]
    for name in capabilities_for(profile, target):
        capability(load(product.module), product, name)
    if product.ahead_of_time or find_gpu():
        return None
    return f"{product.title} compiles for the GPU at hand, and there is none here"


def capabilities_for(profile: Profile, target: Target | None) -> tuple[str, ...]:
    """What is compiled for, ahead of time; none for the GPU at hand."""
    assert profile.compiler is not None
    product = PRODUCTS[profile.compiler.module]
    if not product.ahead_of_time:
        return ()
    if target is None or target.compute_capability is None:
        raise InputError(f"profile {profile.name!r} compiles ahead of time: name what for with --target")
    return (target.compute_capability,)


def through_provider(profile: Profile) -> bool:
    """Whether ONNX Runtime compiles the graph when it is opened."""
    return profile.compiler is not None and profile.compiler.through == THROUGH


def check_target(profile: Profile, target: Target | None) -> None:
    """Raise InputError for a target that is missing or too old for FP8."""
    ahead = profile.compiler is not None and PRODUCTS[profile.compiler.module].ahead_of_time
    if ahead and not through_provider(profile):
        capabilities_for(profile, target)
    found = target.compute_capability if target and profile.weights.scheme == FP8 else None
    if found is not None and tuple(map(int, found.split("."))) < _LEAST_COMPUTE_CAPABILITY:
        raise InputError(
            f"profile {profile.name!r} needs compute capability 8.9 for FP8, and target {target and target.name!r} has "
            f"{found}: choose another profile or target"
        )


def check_graph(graph: Path, profile: Profile) -> None:
    """Raise InputError unless ``profile`` builds from a graph such as this."""
    encodes = is_encoder(graph)
    if through_provider(profile) and (encodes or "score" in read_runtime(graph).tasks):
        who = "an encoder" if encodes else "a scorer"
        raise InputError(
            f"{graph} is {who}'s, which does not run through ONNX Runtime's TensorRT providers: use the profile "
            "tensorrt-fp8 or tensorrt-rtx-fp8"
        )
    if encodes:
        check_encoder(graph, profile)
        return
    runtime = read_runtime(graph)
    if runtime.interface not in ("standard", "static"):
        raise InputError(
            f"{graph} is of the {runtime.interface} interface, and profile {profile.name!r} builds from graphs in "
            "standard operators: export it with --dialect portable"
        )
    if len(runtime.tasks) > 1:
        raise InputError(
            f"{graph} has the tasks {' and '.join(runtime.tasks)}, and a plan is for one: export it with --task "
            "generate or --task score"
        )
    for name in ("smooth", "rotate"):
        if "score" in runtime.tasks and getattr(profile.fp8, name):
            raise InputError(f"fp8.{name} is for the task generate, and {graph} scores: leave it out of the profile")
