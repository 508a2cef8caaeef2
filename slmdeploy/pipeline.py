"""The pipeline: one readable function that calls the verbs in order, from a recipe to a package that was tried.

Every step is an artifact under the output folder, and each is kept when its content key still holds: a second run does
nothing, a changed budget only selects again. Knows the order of the verbs and nothing of how they work.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from slmdeploy import corpus
from slmdeploy.artifacts import Artifact, open_artifact, resumed
from slmdeploy.checkpoint import LABELS, resolve_checkpoint
from slmdeploy.elsewhere import build_elsewhere, wanted
from slmdeploy.encoder_pipeline import beside, compress_encoder
from slmdeploy.errors import InputError
from slmdeploy.profiling.hardware import detect, match_target
from slmdeploy.profiling.profile import measured_rows
from slmdeploy.progress import SILENT, Progress
from slmdeploy.selection import Selection, select
from slmdeploy.specs import (
    Budget,
    DistillStage,
    EncoderRecipe,
    Profile,
    Project,
    PrunePlan,
    Recipe,
    Target,
    data_inputs,
    list_targets,
    load_profile,
    load_recipe,
    load_target,
)

Say = Callable[[str], None]
SUMMARY = "summary.json"


@dataclass
class Step:
    """One artifact of a run: where it is, whether it was there already, and the seconds that making it took."""

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
    report: Path | None = None

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
            "report": str(self.report) if self.report else None,
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
    asked = wanted(spec.candidates, target)
    teacher = resolve_checkpoint(model or beside(recipe_path, spec.model.teacher))

    # 2. Compression: the teacher becomes a smaller checkpoint.
    if isinstance(spec, EncoderRecipe):
        student, data = compress_encoder(spec, recipe_path, teacher, folder, steps.do, bar)
        compared = Compared()
    else:
        student, data = _compress(spec, recipe_path, teacher, folder, steps, bar)
        compared = Compared(data, teacher)

    # 3. Graph and builds.
    graph = steps.do("export", lambda: _export(spec, student, folder / "graph", bar)).path
    builds = [steps.do(f"build {p.name}", partial(_build, graph, p, target, folder, data, bar)).path for p in profiles]

    abroad = build_elsewhere(
        asked, student, folder, tasks=spec.tasks, workloads=spec.workload, data=data, steps=steps, progress=bar
    )

    # 4. Measurement and choice.
    measured = steps.do("profile", lambda: _profile(builds, spec, folder / "measurement", compared, bar))
    steps.outcome.rows = measured_rows(measured.path)
    elsewhere = _estimate(builds, spec, folder, steps) + abroad + _imported(spec, recipe_path)
    _select_and_package(spec, [measured.path, *elsewhere], folder, data, steps)

    # 5. What people look at.
    _write_summary(steps.outcome)  # the page is made of it
    _report(steps.outcome, steps)
    _write_summary(steps.outcome)
    return steps.outcome


@dataclass(frozen=True)
class Compared:
    """What the speed and quality of builds are measured against: decoders have both, encoders neither."""

    data: Path | None = None
    baseline: Path | None = None


class _Steps:
    """Runs verbs one by one, keeps what is up to date, and says which."""

    def __init__(self, outcome: Outcome, say: Say) -> None:
        self.outcome = outcome
        self.say = say
        self._earlier = _earlier_seconds(outcome.out / SUMMARY)

    def do(self, name: str, verb: Callable[[], Artifact]) -> Artifact:
        """One step: run ``verb`` unless what it would make is there."""
        began = time.monotonic()
        artifact, reused = resumed(verb)
        seconds = time.monotonic() - began
        seconds = self._earlier.get(name, seconds) if reused else seconds
        self.outcome.steps.append(Step(name, str(artifact.path), reused, round(seconds, 2)))
        self.say(f"{name:<22} " + ("up to date" if reused else f"made in {seconds:.1f} s") + f"  {artifact.path}")
        return artifact

    def kept(self, name: str, file: Path) -> None:
        """A step whose file is there and holds still."""
        self.outcome.steps.append(Step(name, str(file), True, self._earlier.get(name, 0.0)))
        self.say(f"{name:<22} up to date  {file}")

    def write(self, name: str, file: Path, verb: Callable[[Path], object]) -> Path:
        """A step of a moment: its file is written anew each time, and kept as it was where nothing in it changed."""
        began = time.monotonic()
        fresh = file.with_name(f".fresh-{file.name}")
        verb(fresh)
        reused = file.is_file() and _lasting(file) == _lasting(fresh)
        fresh.unlink() if reused else fresh.replace(file)
        seconds = time.monotonic() - began
        self.outcome.steps.append(Step(name, str(file), reused, round(seconds, 2)))
        self.say(f"{name:<22} " + ("up to date" if reused else f"written in {seconds:.1f} s") + f"  {file}")
        return file


def _earlier_seconds(summary: Path) -> dict[str, float]:
    """How long each step of the run before took, so that a step that is up to date still tells."""
    try:
        steps = json.loads(summary.read_text(encoding="utf-8"))["steps"]
        return {str(step["name"]): float(step["seconds"]) for step in steps}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # there was none, or it was cut short: nothing but times for people is lost


def _lasting(file: Path) -> str:
    """What a file says beside the moment at which it was written."""
    return re.sub(r'"made": "[^"]*"', "", file.read_text(encoding="utf-8"))


def _target(spec: Project) -> Target:
    matched, why = match_target(detect(bench=False), list_targets())
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


def _compress(
    spec: Recipe, recipe: Path, teacher: Path, folder: Path, steps: _Steps, bar: Progress
) -> tuple[Path, Path]:
    """A decoder's checkpoint to export, and the data folder that builds are judged and measured on."""
    if spec.prune and spec.prune.profile:
        load_profile(spec.prune.profile)
    data = _data(spec, recipe, folder, steps)
    learnt = data if spec.data.mixture is None else recipe.parent / spec.data.mixture
    data_inputs(learnt)
    student = _smaller(spec, teacher, learnt, folder, steps, bar)
    for number, stage in enumerate(spec.distill, start=1):
        out = folder / f"distilled-{number}"
        verb = partial(_distill, teacher, student, stage, learnt, spec.data.labels, out, bar)
        student = steps.do(f"distill {number}", verb).path
    return student, data


def _smaller(spec: Recipe, teacher: Path, data: Path, folder: Path, steps: _Steps, bar: Progress) -> Path:
    """The teacher pruned: at once, or in rounds with training between them."""
    plan = spec.prune
    if plan is None:
        return teacher
    if plan.between is None:
        return steps.do("prune", lambda: _prune(plan, spec, teacher, data, folder / "pruned", bar)).path
    from slmdeploy.compress.rounds import rounds

    student, labels = teacher, spec.data.labels
    for number, one in enumerate(rounds(teacher, plan), start=1):
        if number > 1:
            out = folder / f"between-{number - 1}"
            verb = partial(_distill, teacher, student, plan.between, data, labels, out, bar)
            student = steps.do(f"distill between {number - 1}", verb).path
        cut = partial(_prune, one, spec, student, data, folder / f"pruned-{number}", bar)
        student = steps.do(f"prune {number}", cut).path
    return student


def _prune(plan: PrunePlan, spec: Recipe, checkpoint: Path, data: Path, out: Path, bar: Progress) -> Artifact:
    from slmdeploy.compress.prune import prune

    goal = None
    if plan.latency and plan.profile:
        from slmdeploy.latency import goal_of

        goal = goal_of(plan.latency, load_profile(plan.profile))
    return prune(checkpoint, out=out, data=data, goal=goal, labels=spec.data.labels, progress=bar, **plan.settings)


def _distill(
    teacher: Path, student: Path, stage: DistillStage, data: Path, labels: tuple[str, str], out: Path, bar: Progress
) -> Artifact:
    from slmdeploy.compress.distill import distill

    return distill(teacher, student, out=out, data=data, stage=stage, labels=labels, progress=bar)


def _export(spec: Recipe | EncoderRecipe, student: Path, out: Path, bar: Progress) -> Artifact:
    from slmdeploy.exporting.export import export

    labels = spec.data.labels if isinstance(spec, Recipe) else LABELS
    return export(student, out=out, tasks=spec.tasks, labels=labels, progress=bar)


def _build(graph: Path, profile: Profile, target: Target, folder: Path, data: Path, bar: Progress) -> Artifact:
    from slmdeploy.building.build import build

    return build(graph, profile=profile, target=target, out=folder / "builds" / profile.name, data=data, progress=bar)


def _profile(builds: list[Path], spec: Project, out: Path, compared: Compared, bar: Progress) -> Artifact:
    from slmdeploy.profiling.profile import profile

    budget = spec.parsed_budget()
    watch = tuple(limit.figure for limit in (*budget.constraints, *budget.preferences))
    search = spec.candidates.search
    return profile(
        builds,
        workloads=spec.workload,
        out=out,
        data=compared.data,
        baseline=compared.baseline,
        watch=watch,
        search=search,
        progress=bar,
    )


def _estimate(builds: list[Path], spec: Project, folder: Path, steps: _Steps) -> list[Path]:
    """The builds on the targets that are not here, a file each."""
    from slmdeploy.profiling.estimate import estimate

    # An estimate knows how long work takes, not how long requests wait for one another.
    workloads = [workload for workload in spec.workload if not workload.queues]

    def one(target: Target) -> Path:
        out = folder / "estimates" / f"{target.name}.json"
        out.parent.mkdir(exist_ok=True)
        verb = partial(estimate, builds, target=target, workloads=workloads, force=True)
        return steps.write(f"estimate {target.name}", out, lambda file: verb(out=file))

    return [one(load_target(name)) for name in spec.candidates.estimate]


def _imported(spec: Project, recipe: Path) -> list[Path]:
    return [recipe.parent / name for name in spec.candidates.measurements]


def _select_and_package(spec: Project, measurements: list[Path], folder: Path, data: Path, steps: _Steps) -> None:
    from slmdeploy.packaging.trial import try_package

    budget = spec.parsed_budget()
    steps.do("select", lambda: _select(measurements, budget, folder / "selection"))
    steps.outcome.selection = select(measurements, budget=budget)
    if not steps.outcome.selection.feasible:
        return
    build = folder / "builds" / str(steps.outcome.selection.chosen)
    if not build.is_dir():
        steps.say(f"{'package':<22} none: {steps.outcome.selection.chosen} was not measured here, so nothing was tried")
        return
    made = steps.do("package", lambda: _package(spec, build, folder / "measurement", folder / "package"))
    steps.outcome.package = made.path
    # On this machine, whatever hardware was chosen for it.
    steps.outcome.trial = try_package(made.path, data)
    steps.say(f"{'trial':<22} {steps.outcome.trial['summary']}")


def _package(spec: Project, build: Path, measurement: Path, out: Path) -> Artifact:
    from slmdeploy.packaging.package import package

    plan = spec.package
    return package(build, out=out, kind=plan.kind, measurement=measurement, trial=True, max_bytes=plan.max_bytes)


def _select(measurements: list[Path], budget: Budget, out: Path) -> Artifact:
    select(measurements, budget=budget, out=out)
    return open_artifact(out, "selection")


def _report(outcome: Outcome, steps: _Steps) -> None:
    """The run as a page, and for a pull request."""
    from slmdeploy.reporting.report import report

    page, text = outcome.out / "report.html", outcome.out / "report.md"
    if all(step.reused for step in outcome.steps) and page.is_file() and text.is_file():
        steps.kept("report", page)
    else:
        verb = partial(report, outcome.out, markdown=text, force=True)
        steps.write("report", page, lambda fresh: verb(out=fresh))
    outcome.report = page


def _write_summary(outcome: Outcome) -> None:
    """summary.json in the run's folder, replaced in one step."""
    temporary = outcome.out / f".{SUMMARY}.tmp"
    temporary.write_text(json.dumps(outcome.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(outcome.out / SUMMARY)
