"""The pipeline: one readable function that calls the verbs in order, from a recipe to a package that was tried.

Every step is an artifact under the output folder, and each is kept when its content key still holds: a second run does
nothing, a changed budget only selects again. Knows the order of the verbs and nothing of how they work.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from slmdeploy import corpus
from slmdeploy.artifacts import Artifact, open_artifact, resumed
from slmdeploy.checkpoint import resolve_checkpoint
from slmdeploy.errors import InputError
from slmdeploy.profiling.hardware import detect, match_target
from slmdeploy.profiling.profile import measured_rows
from slmdeploy.progress import SILENT, Progress
from slmdeploy.selection import Selection, select
from slmdeploy.specs import (
    Budget,
    DistillStage,
    Profile,
    Recipe,
    Target,
    list_targets,
    load_profile,
    load_recipe,
    load_target,
)

Say = Callable[[str], None]


@dataclass
class Step:
    """One artifact of a run: where it is, and whether it was there already."""

    name: str
    path: str
    reused: bool
    seconds: float


@dataclass
class Outcome:
    """What a run found: the measured rows, the selection, the package and its trial, and what each step did."""

    recipe: str
    out: Path
    steps: list[Step] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    selection: Selection | None = None
    package: Path | None = None
    trial: dict[str, Any] | None = None

    @property
    def feasible(self) -> bool:
        """Whether a build met the budget."""
        return self.selection is not None and self.selection.feasible

    @property
    def reason(self) -> str:
        """Why the build was chosen, or why none was."""
        return self.selection.reason if self.selection else ""

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        return {
            "recipe": self.recipe,
            "out": str(self.out),
            "feasible": self.feasible,
            "reason": self.reason,
            "steps": [asdict(step) for step in self.steps],
            "rows": self.rows,
            "selection": self.selection.to_dict() if self.selection else None,
            "package": str(self.package) if self.package else None,
            "trial": self.trial,
        }


def run(
    recipe: Path | str,
    out: Path | str,
    *,
    model: str | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Outcome:
    """Run ``recipe`` into the folder ``out`` and return what was found; the package is in ``outcome.package``.

    ``model`` replaces the recipe's teacher. When no build meets the budget the outcome is not feasible and there is no
    package. Raises the errors of the verbs; what was finished before an error is kept and found by the next run.
    """
    recipe_path, folder = Path(recipe), Path(out)
    spec = load_recipe(recipe_path)
    bar = progress or SILENT
    steps = _Steps(Outcome(spec.name, folder), say or (lambda text: None))

    # 1. Everything that can be refused is refused before any work.
    profiles = [load_profile(name) for name in spec.candidates.profiles]
    target = _target(spec)
    teacher = resolve_checkpoint(model or _beside(recipe_path, spec.model.teacher))
    data = _data(spec, recipe_path, folder, steps)

    # 2. Compression: the teacher becomes a smaller checkpoint.
    student = _compress(spec, teacher, data, folder, steps, bar)

    # 3. Graph and builds.
    graph = steps.do("export", lambda: _export(spec, student, folder / "graph", bar)).path
    builds = [steps.do(f"build {p.name}", partial(_build, graph, p, target, folder, data, bar)).path for p in profiles]

    # 4. Measurement and choice.
    measured = steps.do("profile", lambda: _profile(builds, spec, folder / "measurement", data, teacher, bar))
    steps.outcome.rows = measured_rows(measured.path)
    _select_and_package(spec, measured.path, folder, data, steps)
    _write_summary(steps.outcome)
    return steps.outcome


class _Steps:
    """Runs verbs one by one, keeps what is up to date, and says which."""

    def __init__(self, outcome: Outcome, say: Say) -> None:
        self.outcome = outcome
        self.say = say

    def do(self, name: str, verb: Callable[[], Artifact]) -> Artifact:
        """One step: run ``verb`` unless what it would make is there."""
        began = time.monotonic()
        artifact, reused = resumed(verb)
        seconds = time.monotonic() - began
        self.outcome.steps.append(Step(name, str(artifact.path), reused, round(seconds, 2)))
        self.say(f"{name:<22} " + ("up to date" if reused else f"made in {seconds:.1f} s") + f"  {artifact.path}")
        return artifact


def _beside(recipe: Path, name: str) -> str:
    """``name`` as a path beside the recipe where there is one, else unchanged: a Hugging Face id."""
    folder = recipe.parent / name
    return str(folder) if folder.exists() else name


def _target(spec: Recipe) -> Target:
    matched, why = match_target(detect(), list_targets())
    if spec.candidates.target == "auto":
        if matched is None:
            raise InputError(f"no shipped target matches this machine ({why}): write a targets file and name it")
        return matched
    target = load_target(spec.candidates.target)
    if matched is None or target.name != matched.name:
        here = matched.name if matched else "none"
        raise InputError(
            f"candidates.target = {target.name!r}, but this machine matches {here!r}: builds can only be measured "
            "where they run"
        )
    return target


def _data(spec: Recipe, recipe: Path, folder: Path, steps: _Steps) -> Path:
    if spec.data.source == "stdlib":
        return steps.do("data", lambda: corpus.prepare(folder / "data")).path
    path = recipe.parent / spec.data.source
    if not path.is_dir():
        raise InputError(f"{recipe}: data.source = {spec.data.source!r} is not a folder beside it, nor 'stdlib'")
    return path


def _compress(spec: Recipe, teacher: Path, data: Path, folder: Path, steps: _Steps, bar: Progress) -> Path:
    student = teacher
    if spec.prune:
        student = steps.do("prune", lambda: _prune(spec, teacher, data, folder / "pruned", bar)).path
    for number, stage in enumerate(spec.distill, start=1):
        out = folder / f"distilled-{number}"
        verb = partial(_distill, teacher, student, stage, data, spec.data.labels, out, bar)
        student = steps.do(f"distill {number}", verb).path
    return student


def _prune(spec: Recipe, teacher: Path, data: Path, out: Path, bar: Progress) -> Artifact:
    from slmdeploy.compress.prune import prune

    assert spec.prune
    return prune(teacher, out=out, data=data, labels=spec.data.labels, progress=bar, **spec.prune.model_dump())


def _distill(
    teacher: Path, student: Path, stage: DistillStage, data: Path, labels: tuple[str, str], out: Path, bar: Progress
) -> Artifact:
    from slmdeploy.compress.distill import distill

    return distill(teacher, student, out=out, data=data, stage=stage, labels=labels, progress=bar)


def _export(spec: Recipe, student: Path, out: Path, bar: Progress) -> Artifact:
    from slmdeploy.exporting.export import export

    return export(student, out=out, tasks=spec.tasks, labels=spec.data.labels, progress=bar)


def _build(graph: Path, profile: Profile, target: Target, folder: Path, data: Path, bar: Progress) -> Artifact:
    from slmdeploy.building.build import build

    return build(graph, profile=profile, target=target, out=folder / "builds" / profile.name, data=data, progress=bar)


def _profile(builds: list[Path], spec: Recipe, out: Path, data: Path, teacher: Path, bar: Progress) -> Artifact:
    from slmdeploy.profiling.profile import profile

    return profile(builds, workloads=spec.workload, out=out, data=data, baseline=teacher, progress=bar)


def _select_and_package(spec: Recipe, measurement: Path, folder: Path, data: Path, steps: _Steps) -> None:
    from slmdeploy.packaging.edge import package
    from slmdeploy.packaging.trial import try_package

    budget = spec.parsed_budget()
    steps.do("select", lambda: _select(measurement, budget, folder / "selection"))
    steps.outcome.selection = select([measurement], budget=budget)
    if not steps.outcome.selection.feasible:
        return
    build = folder / "builds" / str(steps.outcome.selection.chosen)
    made = steps.do("package", lambda: package(build, out=folder / "package", kind=spec.package.kind))
    steps.outcome.package = made.path
    steps.outcome.trial = try_package(made.path, data)
    steps.say(f"{'trial':<22} {steps.outcome.trial['summary']}")


def _select(measurement: Path, budget: Budget, out: Path) -> Artifact:
    select([measurement], budget=budget, out=out)
    return open_artifact(out, "selection")


def _write_summary(outcome: Outcome) -> None:
    """summary.json in the run's folder, replaced in one step."""
    temporary = outcome.out / ".summary.json.tmp"
    temporary.write_text(json.dumps(outcome.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(outcome.out / "summary.json")
