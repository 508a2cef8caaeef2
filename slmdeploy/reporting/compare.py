"""Two runs compared: for each build and metric the change, whether noise explains it, and what that makes it.

A change counts when it is larger than a threshold and significant. The test is a z-test on the difference: the standard
error of a percentile is that of its bootstrap over the requests (Efron 1979), of any other metric that of its
95 % interval; both runs are independent, so errors add in quadrature. A run asks hundreds of such questions, so
significance is controlled by Benjamini and Hochberg's procedure (1995) at 5 %: where nothing changed the chance of any
alarm stays below that, as with Bonferroni, and where much changed most of it is still found. Sizes are exact. Requests
of one run share its hour and its machine, which no test over them sees: that is what the threshold is for.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slmdeploy.errors import InputError
from slmdeploy.metrics import METRICS
from slmdeploy.reporting.reading import read_run
from slmdeploy.reporting.records import Interval, Measured, Row, Run
from slmdeploy.reporting.wording import base_of

LEVEL = 0.05
"""False discovery rate of all changes that are called significant."""
THRESHOLD = 0.05
"""Relative change up to which a significant one is left alone."""
_EXACT = ("size_bytes", "kv_bytes")
_BEYOND = 5
"""Requests that must lie beyond a percentile in each run before its bootstrap says anything."""
_TOKENS = "itl_ms"
"""Samples of tokens, not of requests: those of one request go together, which its interval knows."""
_RESAMPLES = 400
_HALF_WIDTH = 1.959964
"""Standard errors from the middle of a 95 % interval to its end."""

Outcome = Literal["regression", "improvement", "within noise", "equal", "not testable"]


@dataclass(frozen=True)
class Change:
    """One metric of one build in both runs. ``metric`` is ``workload:metric`` where it belongs to a workload.

    ``change`` is relative to ``before`` (0.1 is 10 % more), None where that is 0. ``p`` is None where there is nothing
    to test with, or nothing to test because the metric is exact.
    """

    build: str
    target: str | None
    metric: str
    before: float
    after: float
    change: float | None
    p: float | None
    outcome: Outcome

    @property
    def name(self) -> str:
        """The metric without its workload."""
        return self.metric.rsplit(":", 1)[-1]


@dataclass(frozen=True)
class Comparison:
    """All changes from one run to another, and what could not be compared."""

    before: str
    after: str
    threshold: float
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    def of(self, outcome: Outcome) -> list[Change]:
        """The changes of one kind, the largest first."""
        found = [change for change in self.changes if change.outcome == outcome]
        return sorted(found, key=lambda change: -abs(change.change if change.change is not None else math.inf))

    @property
    def headline(self) -> str:
        """How many of each kind, in a sentence without a verb."""
        counts = {outcome: len(self.of(outcome)) for outcome in ("regression", "improvement")}
        words = [f"{count or 'no'} {outcome}{'' if count == 1 else 's'}" for outcome, count in counts.items()]
        return f"{', '.join(words)} in {len(self.changes)} comparisons"

    @property
    def complaint(self) -> str:
        """What got worse, the largest three by name, in one sentence."""
        worse = self.of("regression")
        sizes = [f" by {abs(one.change):.1%}" if one.change else "" for one in worse[:3]]
        named = [f"{one.build} {one.metric}{size}" for one, size in zip(worse, sizes, strict=False)]
        rest = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
        return f"{self.after} is worse than {self.before} in {', '.join(named)}{rest}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def compare(before: Path, after: Path, *, threshold: float = THRESHOLD) -> Comparison:
    """Compare the builds that two runs or measurements have in common, by target and name.

    Raises InputError when they have none in common, and what `read_run` raises.
    """
    old, new = read_run(before), read_run(after)
    pairs = list(_pairs(old, new))
    if not pairs:
        raise InputError(
            f"{before} and {after} have no build on the same target in common: there is nothing to compare"
        )
    raw = [change for one, two in pairs for change in _changes(one, two)]
    changes = tuple(_judged(raw, threshold))
    return Comparison(str(before), str(after), threshold, changes, tuple(_notes(old, new, pairs)))


def _pairs(old: Run, new: Run) -> Iterator[tuple[Row, Row]]:
    """The builds that were measured in both runs; estimates have no noise to tell a change from."""
    found = {(row.target, row.build): row for row in new.rows if not row.estimated}
    for row in old.rows:
        if row.role == "candidate" and not row.estimated and (row.target, row.build) in found:
            yield row, found[row.target, row.build]


def _changes(one: Row, two: Row) -> Iterator[Change]:
    """Every metric that both rows have; of a workload's metrics each workload's, not the row's copy of the first's."""
    ratio = one.passed - two.passed
    if ratio:
        yield Change(one.build, one.target, "gates", float(one.passed), float(two.passed), None, None,
                     "regression" if ratio > 0 else "improvement")  # fmt: skip
    own: set[str] = set()
    for name, before in one.workloads.items():
        after = two.workloads.get(name)
        own |= set(before.metrics)
        if after:
            errors = _sample_errors(before), _sample_errors(after)
            for metric in [metric for metric in before.metrics if metric in after.metrics]:
                yield _change(one, f"{name}:{metric}", before, after, metric, errors)
    for metric in one.metrics:
        if metric in METRICS and metric in two.metrics and metric not in own:
            yield _change(one, metric, one, two, metric, ({}, {}))


def _change(
    row: Row,
    name: str,
    before: Row | Measured,
    after: Row | Measured,
    metric: str,
    errors: tuple[Mapping[str, float | None], Mapping[str, float | None]],
) -> Change:
    old, new = before.metrics[metric], after.metrics[metric]
    change = (new - old) / abs(old) if old else None
    both = [
        error.get(metric, _interval_error(side.intervals.get(metric)))
        for error, side in zip(errors, (before, after), strict=True)
    ]
    p = None if metric in _EXACT else _p_value(new - old, both)
    return Change(row.build, row.target, name, old, new, change, p, "not testable")


def _sample_errors(measured: Measured) -> dict[str, float | None]:
    """Standard errors of the percentiles that have samples, by metric; None where too few requests lie beyond one.

    Then its interval says nothing either: it comes from the same few requests.
    """
    errors: dict[str, float | None] = {}
    rng = np.random.default_rng(0)
    for base, samples in measured.samples.items():
        if base == _TOKENS:
            continue
        found = {metric: base_of(metric)[1] or 0.0 for metric in measured.metrics if base_of(metric)[0] == base}
        errors |= dict.fromkeys(found)
        wanted = {m: percent for m, percent in found.items() if len(samples) * (1 - percent / 100) >= _BEYOND}
        if wanted:
            drawn = rng.choice(np.asarray(samples), (_RESAMPLES, len(samples)))
            spread = np.percentile(drawn, list(wanted.values()), axis=1).std(axis=1, ddof=1)
            errors |= {metric: float(error) for metric, error in zip(wanted, spread, strict=True)}
    return errors


def _interval_error(interval: Interval | None) -> float | None:
    return None if interval is None else (interval[1] - interval[0]) / (2 * _HALF_WIDTH)


def _p_value(difference: float, errors: Sequence[float | None]) -> float | None:
    """Two-sided p of a difference of two means; None where either error is unknown."""
    one, two = errors
    if one is None or two is None:
        return None
    error = math.hypot(one, two)
    if error == 0:
        return float(difference == 0)
    return math.erfc(abs(difference) / error / math.sqrt(2))


def significant(p_values: Sequence[float], level: float = LEVEL) -> float:
    """The largest p that is significant by Benjamini and Hochberg's procedure; below 0 where none is.

    >>> significant([0.001, 0.03, 0.04, 0.9])
    0.001
    """
    ordered = sorted(p_values)
    passing = [p for at, p in enumerate(ordered, start=1) if p <= level * at / len(ordered)]
    return passing[-1] if passing else -1.0


def _judged(changes: Sequence[Change], threshold: float) -> Iterator[Change]:
    limit = significant([change.p for change in changes if change.p is not None])
    for change in changes:
        yield change if change.metric == "gates" else replace(change, outcome=_outcome(change, limit, threshold))


def _outcome(change: Change, limit: float, threshold: float) -> Outcome:
    if change.after == change.before:
        return "equal"
    if change.p is None and change.name not in _EXACT:
        return "not testable"
    real = change.p is None or change.p <= limit
    if not real or (change.change is not None and abs(change.change) <= threshold):
        return "within noise"
    worse = (change.after > change.before) == (METRICS[change.name].better == "lower")
    return "regression" if worse else "improvement"


def _notes(old: Run, new: Run, pairs: Sequence[tuple[Row, Row]]) -> Iterator[str]:
    common = {(row.target, row.build) for row, _ in pairs}
    for run, which in ((old, "first"), (new, "second")):
        measured = [(label, row) for label, row in zip(run.labels, run.rows, strict=True)
                    if row.role == "candidate" and not row.estimated]  # fmt: skip
        alone = [label for label, row in measured if (row.target, row.build) not in common]
        if alone:
            yield f"Only in the {which} run: {', '.join(alone)}."
    noisy = [row.build for row, other in pairs if row.noisy or other.noisy]
    if noisy:
        yield f"Noisy in either run: {', '.join(noisy)}. Their changes may be the machine's."
    machines = [(run.measurement.machine or {}).get("cpu") for run in (old, new)]
    if machines[0] != machines[1] or old.measurement.threads != new.measurement.threads:
        yield "The two runs were not measured on the same processor with the same number of threads."
    if old.selection and new.selection and old.selection.chosen != new.selection.chosen:
        yield f"The choice changed: {old.selection.chosen or 'none'} before, {new.selection.chosen or 'none'} now."
