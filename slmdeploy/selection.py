"""The verb `select` and the pure function `choose`: which measured build meets the budget, and why not the others.

Hard constraints first, then an objective over what is left. An objective is the geometric mean of one or two metrics,
each turned so that less is better. Builds whose difference from the best one may be noise are equal (`differ`), and of
these the smallest on disk is taken, then the best mean, then the first name: for speed noise is the measured 95 %
interval, for quality 0.1 %, since all are measured on the same records and a sampling interval says nothing about a
difference. A build outside its
own gates, or slower than the fp32 build of its graph, is never chosen. When nothing is feasible the result says which
constraint binds, which build misses by least, and what would have to give. Knows nothing of how a value was measured.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.errors import CorruptArtifactError, InputError, SpecError
from slmdeploy.metrics import describe, known_names
from slmdeploy.progress import Progress
from slmdeploy.specs import Budget, Constraint, nearest

MEASUREMENT = "measurement.json"
SELECTION = "selection.json"

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "fastest": ("score_ms_p50", "tpot_ms_p50", "encode_ms_p50"),
    "throughput": ("items_per_s", "tokens_per_s", "texts_per_s"),
    "smallest": ("size_bytes",),
    "quality": ("auc", "bits_per_byte"),
}
"""Metrics of each objective; those that every feasible build has take part."""

SAME_QUALITY = 0.001
"""Relative difference up to which two values of a quality metric count as equal."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One measured build. ``gates_failed`` are the names of its own gates that it is outside of."""

    build: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    path: str = ""
    precision: str = ""
    graph: str | None = None
    gates_failed: tuple[str, ...] = ()
    baseline: bool = False

    def interval(self, metric: str) -> Interval:
        """Range within which another value counts as equal; the value itself where no interval was measured."""
        value = self.metrics[metric]
        if metric in OBJECTIVES["quality"]:
            return value * (1 - SAME_QUALITY / 2), value * (1 + SAME_QUALITY / 2)
        return self.intervals.get(metric, (value, value))


@dataclass(frozen=True)
class Miss:
    """A constraint that a build does not meet: its value, and by which part of the limit it is outside."""

    constraint: str
    value: float
    by: float


@dataclass(frozen=True)
class Rejection:
    """Why a build was not chosen, as a sentence, with the constraints that it misses."""

    build: str
    reason: str
    misses: tuple[Miss, ...] = ()


@dataclass(frozen=True)
class Relaxation:
    """The value that one constraint must at least be moved to; ``build`` would then be feasible."""

    constraint: str
    value: float
    build: str


@dataclass(frozen=True)
class Selection:
    """The outcome. When nothing is feasible ``chosen`` is None and the last four fields say how near it was.

    ``binding``: the constraint that the nearest miss is furthest outside of. ``relaxation``: what to move, all of it,
    to make the nearest miss feasible. ``alone``: constraints that make some build feasible when only that one is moved.
    """

    objective: str
    budget: tuple[str, ...]
    chosen: str | None
    chosen_path: str | None
    reason: str
    rejections: tuple[Rejection, ...]
    binding: str | None = None
    nearest_miss: str | None = None
    relaxation: tuple[Relaxation, ...] = ()
    alone: tuple[Relaxation, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether a build was chosen."""
        return self.chosen is not None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def choose(rows: Sequence[Row], budget: Budget) -> Selection:
    """Choose among ``rows`` the build that meets ``budget`` and serves its objective best; pure.

    The order of rows has no influence. The baseline is never chosen. Raises SpecError on a metric that does not exist
    and InputError when there is no build, or when the feasible ones lack a common metric of the objective.
    """
    _check_names(budget)
    builds = sorted((row for row in rows if not row.baseline), key=lambda row: row.build)
    if not builds:
        raise InputError("there is no measured build to choose from: run `slmdeploy profile` on at least one")
    unfit = {row.build: reason for row in builds if (reason := _unfit(row, builds))}
    misses = {row.build: _misses(row, budget.constraints) for row in builds}
    unmeasured = {row.build: _unmeasured(row, budget.constraints) for row in builds}
    feasible = [row for row in builds if not (row.build in unfit or misses[row.build] or unmeasured[row.build])]
    rejections = [
        Rejection(row.build, _reason(unfit.get(row.build), unmeasured[row.build], misses[row.build]), misses[row.build])
        for row in builds
        if row not in feasible
    ]
    texts = tuple(str(constraint) for constraint in budget.constraints)
    if not feasible:
        comparable = {name: missed for name, missed in misses.items() if name not in unfit and not unmeasured[name]}
        return _infeasible(budget.objective, texts, rejections, comparable)
    best, reason, beaten = _prefer(feasible, budget.objective)
    rejections = sorted([*rejections, *beaten], key=lambda rejection: rejection.build)
    return Selection(budget.objective, texts, best.build, best.path or None, reason, tuple(rejections))


def _check_names(budget: Budget) -> None:
    valid = known_names()
    for constraint in budget.constraints:
        if constraint.metric not in valid:
            raise SpecError(f"budget: there is no metric {constraint.metric!r}{nearest(constraint.metric, valid)}")


def _unfit(row: Row, builds: Sequence[Row]) -> str | None:
    """Why a build may not ship whatever the budget says: outside its gates, or slower than fp32 beyond noise."""
    if row.gates_failed:
        return f"outside its own gates: {', '.join(row.gates_failed)}"
    for other in builds:
        if row.precision == "fp32" or other.precision != "fp32" or other.graph is None or other.graph != row.graph:
            continue
        metrics = [m for m in OBJECTIVES["fastest"] if m in row.metrics and m in other.metrics]
        if metrics and differ(cost(other, metrics), cost(row, metrics)):
            took = " and ".join(f"{row.metrics[m]:.4g} against {other.metrics[m]:.4g} in {m}" for m in metrics)
            return f"slower than {other.build}, the fp32 build of the same graph: {took}"
    return None


def _unmeasured(row: Row, constraints: Sequence[Constraint]) -> list[str]:
    return [constraint.metric for constraint in constraints if constraint.metric not in row.metrics]


def _misses(row: Row, constraints: Sequence[Constraint]) -> tuple[Miss, ...]:
    return tuple(
        Miss(str(constraint), row.metrics[constraint.metric], outside(constraint, row.metrics[constraint.metric]))
        for constraint in constraints
        if constraint.metric in row.metrics and not constraint.holds(row.metrics[constraint.metric])
    )


def outside(constraint: Constraint, value: float) -> float:
    """How far ``value`` is outside, as a part of the limit: 0.2 is 20 %; the plain distance where the limit is 0."""
    return abs(value - constraint.limit) / (abs(constraint.limit) or 1.0)


def _reason(unfit: str | None, unmeasured: Sequence[str], misses: Sequence[Miss]) -> str:
    parts = [unfit] if unfit else []
    parts += [f"{metric} was not measured" for metric in unmeasured]
    parts += [f"{miss.constraint} is missed: {_distance(miss)}" for miss in misses]
    return "; ".join(parts)


def _distance(miss: Miss) -> str:
    far = f"{1 + miss.by:.3g} times the limit" if miss.by > 2 else f"{miss.by:.1%} outside"
    return f"{miss.value:.4g}, {far}"


@dataclass(frozen=True)
class Cost:
    """Geometric mean of metrics, less is better: its natural logarithm, and how far below and above noise reaches."""

    log: float
    below: float
    above: float


def cost(row: Row, metrics: Sequence[str]) -> Cost:
    """The cost of a row in ``metrics``, each inverted where more is better.

    The metrics are measured by different requests, so their errors are independent and add in quadrature.
    """
    log = below = above = 0.0
    for metric in metrics:
        sign = -1.0 if describe(metric).better == "higher" else 1.0
        value, *ends = (sign * math.log(max(end, 1e-300)) for end in (row.metrics[metric], *row.interval(metric)))
        log += value
        below += max(0.0, value - min(ends)) ** 2
        above += max(0.0, max(ends) - value) ** 2
    return Cost(log / len(metrics), math.sqrt(below) / len(metrics), math.sqrt(above) / len(metrics))


def differ(less: Cost, more: Cost) -> bool:
    """Whether ``more`` costs more beyond noise: the 95 % interval of the difference of two means leaves out zero.

    Intervals of the two that overlap do not say so yet: their half-widths add in quadrature too (Schenker and
    Gentleman 2001, On judging the significance of differences by examining the overlap between confidence intervals).
    """
    return more.log - less.log > math.hypot(less.above, more.below)


def _prefer(feasible: Sequence[Row], objective: str) -> tuple[Row, str, list[Rejection]]:
    """The best of the feasible rows, the reason, and why each other one is not."""
    metrics = [name for name in OBJECTIVES[objective] if all(name in row.metrics for row in feasible)]
    if not metrics:
        names = " or ".join(OBJECTIVES[objective])
        raise InputError(f"objective {objective!r} needs {names} measured on every feasible build: add such a workload")
    costs = {row.build: cost(row, metrics) for row in feasible}
    leader = min(feasible, key=lambda row: (costs[row.build].log, row.build))
    equal = [row for row in feasible if not differ(costs[leader.build], costs[row.build])]
    best = min(equal, key=lambda row: (row.metrics.get("size_bytes", math.inf), costs[row.build].log, row.build))
    what = f"{objective} of {len(feasible)} feasible ({_values(best, metrics)})"
    if best is not leader:
        what += f"; equal within noise to {leader.build} ({_values(leader, metrics)}) and smaller"
    beaten = []
    for row in (row for row in feasible if row is not best):
        why = f"equal to {best.build} within noise, but larger" if row in equal else f"not the {objective}"
        beaten.append(Rejection(row.build, f"feasible, {why}: {_values(row, metrics)}"))
    return best, what, beaten


def _values(row: Row, metrics: Sequence[str]) -> str:
    shown = dict.fromkeys([*metrics, "size_bytes"])
    return ", ".join(f"{name} {row.metrics[name]:.4g}" for name in shown if name in row.metrics)


def _infeasible(
    objective: str, budget: tuple[str, ...], rejections: Sequence[Rejection], misses: Mapping[str, tuple[Miss, ...]]
) -> Selection:
    """``misses`` has the builds that nothing but constraints on measured metrics stands against."""
    if not misses:
        reason = (
            "no limit would help: each build fails its own gates, is slower than fp32 or lacks a metric of the budget"
        )
        return Selection(objective, budget, None, None, reason, tuple(rejections))
    nearest_build = min(misses, key=lambda build: (max(miss.by for miss in misses[build]), build))
    binding = max(misses[nearest_build], key=lambda miss: miss.by)
    alone: dict[str, tuple[float, Relaxation]] = {}
    for build, missed in sorted(misses.items()):
        if len(missed) == 1:
            (miss,) = missed
            found = (miss.by, Relaxation(miss.constraint, miss.value, build))
            alone[miss.constraint] = min(alone.get(miss.constraint, found), found, key=lambda pair: pair[0])
    return Selection(
        objective,
        budget,
        None,
        None,
        f"no build meets the budget: {binding.constraint} binds; {nearest_build} is nearest with {_distance(binding)}",
        tuple(rejections),
        binding.constraint,
        nearest_build,
        tuple(Relaxation(miss.constraint, miss.value, nearest_build) for miss in misses[nearest_build]),
        tuple(relaxation for _, relaxation in alone.values()),
    )


def pareto_front(rows: Sequence[Row], latency: str, quality: str) -> list[str]:
    """Names of the builds that no other beats in one of two metrics without losing in the other, best latency first.

    Rows that lack one of the metrics are left out; of equal rows all stay.
    """
    complete = [row for row in rows if latency in row.metrics and quality in row.metrics]
    points = {row.build: (cost(row, [latency]).log, cost(row, [quality]).log) for row in complete}
    front = [
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    ]
    return sorted(front, key=lambda name: (points[name], name))


def read_rows(measurement: Artifact) -> list[Row]:
    """The rows of a measurement artifact. Raises CorruptArtifactError when its file is not of the documented form."""
    file = measurement.path / MEASUREMENT
    try:
        return [_row(entry) for entry in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptArtifactError(
            f"{file} is no measurement that this version reads: {error!r}; measure again"
        ) from error


def _row(entry: Mapping[str, Any]) -> Row:
    gates = {name: gate["passed"] for name, gate in entry["gates"].items()}
    failed = [name for name, passed in gates.items() if not passed]
    if not entry["passed"] and not failed:
        failed = ["passed"]
    return Row(
        build=str(entry["build"]),
        metrics={name: float(value) for name, value in entry["metrics"].items()},
        intervals={name: (float(low), float(high)) for name, (low, high) in entry["intervals"].items()},
        path=str(entry["path"]),
        precision=str(entry["precision"]),
        graph=entry["graph"],
        gates_failed=tuple(failed),
        baseline=entry["role"] == "baseline",
    )


def select(
    measurements: Sequence[Path],
    *,
    budget: Budget,
    out: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Selection:
    """Choose among the builds of one or more measurements, and write the outcome to ``out`` if given.

    An infeasible budget is an outcome too: it is written and returned, and ``Selection.feasible`` is False. Raises
    InputError when two measurements hold the same build, because it would not be clear which figures count.
    """
    rows = [row for path in measurements for row in read_rows(open_artifact(path, "measurement"))]
    names = [row.build for row in rows if not row.baseline]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{twice[0]} is in more than one measurement: give each build's measurement once")
    selection = choose(rows, budget)
    if out is not None:
        plan = budget.model_dump(mode="json")
        inputs = {f"measurement {index}": path for index, path in enumerate(measurements)}
        with writing(out, kind="selection", plan=plan, inputs=inputs, force=force) as draft:
            (draft.path / SELECTION).write_text(json.dumps(selection.to_dict(), indent=1) + "\n", encoding="utf-8")
            draft.result = {"chosen": selection.chosen, "reason": selection.reason}
    return selection
