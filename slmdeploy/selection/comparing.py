"""Which of two rows is better, beyond noise: costs in an objective, ties, dominance, and the Pareto front.

An objective is the geometric mean of one or more metrics, each turned so that less is better. For speed noise is the
measured 95 % interval, for quality 0.1 %, since all are measured on the same records and a sampling interval says
nothing about a difference. Knows nothing of budgets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slmdeploy.errors import InputError
from slmdeploy.metrics import describe
from slmdeploy.selection.rows import Interval, Row

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "fastest": ("score_ms_p50", "tpot_ms_p50", "encode_ms_p50"),
    "throughput": ("items_per_s", "tokens_per_s", "texts_per_s"),
    "cheapest": ("cost_usd_per_million_requests",),
    "smallest": ("size_bytes",),
    "quality": ("auc", "bits_per_byte"),
}
"""Metrics of each objective; those that every candidate has take part."""

FRONT = (*OBJECTIVES["fastest"], *OBJECTIVES["quality"], "size_bytes", "rss_peak_bytes")
"""Figures of the Pareto front; those that every candidate has take part."""

SAME_QUALITY = 0.001
"""Relative difference up to which two values of a quality metric count as equal."""


def shared(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """Those of ``metrics`` that every row has."""
    return [name for name in metrics if all(name in row.metrics for row in rows)]


def objective_metrics(rows: Sequence[Row], objective: str) -> list[str]:
    """The metrics that ``objective`` compares ``rows`` by. Raises InputError when they have none in common."""
    metrics = shared(rows, OBJECTIVES[objective])
    if not metrics:
        names = " or ".join(OBJECTIVES[objective])
        without = next((row for row in rows if not any(name in row.metrics for name in OBJECTIVES[objective])), rows[0])
        raise InputError(
            f"objective {objective!r} needs {names} of every candidate, and {without.name} ({without.source}) lacks "
            "what the others have: measure such a workload, or leave its file out"
        )
    return metrics


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
        value, *ends = (sign * math.log(max(end, 1e-300)) for end in (row.metrics[metric], *_noise(row, metric)))
        log += value
        below += max(0.0, value - min(ends)) ** 2
        above += max(0.0, max(ends) - value) ** 2
    return Cost(log / len(metrics), math.sqrt(below) / len(metrics), math.sqrt(above) / len(metrics))


def _noise(row: Row, metric: str) -> Interval:
    """Range within which another value counts as equal."""
    if metric in OBJECTIVES["quality"]:
        value = row.metrics[metric]
        return value * (1 - SAME_QUALITY / 2), value * (1 + SAME_QUALITY / 2)
    return row.interval(metric)


def differ(less: Cost, more: Cost) -> bool:
    """Whether ``more`` costs more beyond noise: the 95 % interval of the difference of two means leaves out zero.

    Intervals of the two that overlap do not say so yet: their half-widths add in quadrature too (Schenker and
    Gentleman 2001, On judging the significance of differences by examining the overlap between confidence intervals).
    """
    return more.log - less.log > math.hypot(less.above, more.below)


@dataclass(frozen=True)
class Decision:
    """The best of some rows, the one of the best mean, and all that are equal to that within noise."""

    best: Row
    leader: Row
    equal: tuple[Row, ...]


TIE_RULE = "measured before estimated, then the smallest on disk, then the best mean"


def decide(rows: Sequence[Row], metrics: Sequence[str]) -> Decision:
    """The best of ``rows`` in ``metrics``; those equal to it within noise are told apart by TIE_RULE.

    Of what is equal in that too, the better in the front's figures is taken, then the first name. What another row
    beats in both mean and size is not taken on the strength of its noise, so the choice is never dominated.
    """
    costs = {id(row): cost(row, metrics) for row in rows}
    figures = shared(rows, FRONT)

    def size(row: Row) -> float:
        return row.metrics.get("size_bytes", math.inf)

    def beats(one: Row, other: Row) -> bool:
        pair, others = (costs[id(one)].log, size(one)), (costs[id(other)].log, size(other))
        return pair != others and pair[0] <= others[0] and pair[1] <= others[1] and one.estimated <= other.estimated

    def rank(row: Row) -> tuple[object, ...]:
        better = [cost(row, [figure]).log for figure in figures]
        return row.estimated, size(row), costs[id(row)].log, better, row.build, row.target or ""

    leader = min(rows, key=lambda row: (costs[id(row)].log, row.estimated, row.build, row.target or ""))
    equal = [row for row in rows if not differ(costs[id(leader)], costs[id(row)])]
    best = min((row for row in equal if not any(beats(other, row) for other in rows)), key=rank)
    return Decision(best, leader, tuple(equal))


def pareto_front(rows: Sequence[Row], *metrics: str) -> list[Row]:
    """The rows that no other is as good as in all ``metrics`` and better than in one, the best in the first one first.

    Rows that lack one of the metrics are left out; of equal rows all stay.
    """
    complete = [row for row in rows if all(name in row.metrics for name in metrics)]
    points = [tuple(cost(row, [name]).log for name in metrics) for row in complete]

    def beaten(point: tuple[float, ...]) -> bool:
        return any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)

    front = [(point, row.name, row) for point, row in zip(points, complete, strict=True) if not beaten(point)]
    return [row for _, _, row in sorted(front, key=lambda found: found[:2])]
