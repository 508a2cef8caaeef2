"""Builds of a recipe for GPUs that are not here: made on this machine and estimated, neither measured nor packaged.

    the student's graph in the dialect of the engine -> a build per target and profile -> estimates, labelled as such

Each is an artifact or a file under the run's folder like every step, and is kept while its content key holds. What the
selection makes of estimated rows is selection/'s business. Knows nothing of how the verbs work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from slmdeploy.artifacts import Artifact
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress
from slmdeploy.specs import Candidates, Profile, Target, Workload, load_profile, load_target

OPSET = 23
"""Of portable graphs: attention is one operator there, which TensorRT compiles to one kernel."""
_DIALECTS = {"tensorrt": "portable", "cuda": "ort"}


class Steps(Protocol):
    """What a run keeps of its steps."""

    def do(self, name: str, verb: Callable[[], Artifact]) -> Artifact: ...
    def write(self, name: str, file: Path, verb: Callable[[Path], object]) -> Path: ...


@dataclass(frozen=True)
class Wanted:
    """A target that is not here, and the profiles to build for it."""

    target: Target
    profiles: tuple[Profile, ...]


def wanted(candidates: Candidates, here: Target) -> tuple[Wanted, ...]:
    """What ``candidates.elsewhere`` asks for.

    Raises InputError for a target that is this machine or lacks what a profile needs, for one that a profile's compiler
    does not compile for, or which is not installed; and for profiles of other engines or that are measured here too:
    their rows would have one name.
    """
    found = tuple(
        Wanted(load_target(one.target), tuple(load_profile(name) for name in one.profiles))
        for one in candidates.elsewhere
    )
    local = {load_profile(name).name for name in candidates.profiles}
    for one in found:
        if one.target.name == here.name:
            raise InputError(f"candidates.elsewhere has {here.name!r}, which is this machine: list it in profiles")
        for profile in one.profiles:
            _check(profile, one.target, local)
    return found


def _check(profile: Profile, target: Target, local: set[str]) -> None:
    if profile.engine not in _DIALECTS:
        raise InputError(
            f"candidates.elsewhere has profile {profile.name!r} of the engine {profile.engine}, whose builds run on a "
            "CPU: list it in candidates.profiles and the target in candidates.estimate"
        )
    if profile.name in local:
        raise InputError(f"profile {profile.name!r} is in candidates.profiles and in candidates.elsewhere: keep one")
    from slmdeploy.building.onnxruntime import check_requirements
    from slmdeploy.building.tensorrt_checks import check_target, why_not_compiled

    check_requirements(profile, target)
    if profile.engine == "tensorrt":
        check_target(profile, target)
        why_not_compiled(profile, target)


def build_elsewhere(
    asked: Sequence[Wanted],
    student: Path,
    folder: Path,
    *,
    tasks: tuple[str, ...],
    workloads: Sequence[Workload],
    data: Path | None,
    steps: Steps,
    progress: Progress,
) -> list[Path]:
    """Make and estimate what is ``asked``; the files of the estimates, one for each target.

    The builds are folder/elsewhere/TARGET/PROFILE. Where a recipe has several tasks they are for generate, since a plan
    is for one; workloads of others, and those in which requests wait, are not estimated.
    """
    task = tasks if len(tasks) == 1 else ("generate",)
    fitting = [one for one in workloads if one.task in task]
    alone = [one for one in fitting if not one.queues]
    dialects = sorted({_DIALECTS[profile.engine] for one in asked for profile in one.profiles})
    graphs = {dialect: _export(student, folder, dialect, task, steps, progress) for dialect in dialects}
    estimated = []
    for one in asked:
        builds = []
        for profile in one.profiles:
            out = folder / "elsewhere" / one.target.name / profile.name
            tuned = fitting[0] if fitting and profile.engine == "tensorrt" else None
            make = partial(_build, graphs[_DIALECTS[profile.engine]], profile, one.target, out, data, tuned, progress)
            builds.append(steps.do(f"build {profile.name} for {one.target.name}", make).path)
        estimated.append(_estimate(builds, one.target, alone, folder, steps))
    return estimated


def _export(
    student: Path, folder: Path, dialect: str, tasks: tuple[str, ...], steps: Steps, progress: Progress
) -> Path:
    from slmdeploy.exporting.export import export

    opset, out = OPSET if dialect == "portable" else None, folder / f"graph-{dialect}"
    verb = partial(export, student, out=out, tasks=tasks, dialect=dialect, opset=opset, progress=progress)
    return steps.do(f"export {dialect}", verb).path


def _build(
    graph: Path,
    profile: Profile,
    target: Target,
    out: Path,
    data: Path | None,
    workload: Workload | None,
    progress: Progress,
) -> Artifact:
    from slmdeploy.building.build import build

    return build(graph, profile=profile, target=target, out=out, data=data, workload=workload, progress=progress)


def _estimate(builds: list[Path], target: Target, workloads: Sequence[Workload], folder: Path, steps: Steps) -> Path:
    from slmdeploy.profiling.estimate import estimate

    out = folder / "estimates" / f"{target.name}-elsewhere.json"
    out.parent.mkdir(exist_ok=True)
    verb = partial(estimate, builds, target=target, workloads=workloads, force=True)
    return steps.write(f"estimate {target.name} elsewhere", out, lambda file: verb(out=file))
