"""Holds rows to a budget: whether its names exist, what each row makes of each limit, and what may ship at all.

A limit is met when the unfavourable end of the figure's 95 % interval is within it: a value inside whose interval ends
outside is not proven, and that is a reason of its own. Where no interval was measured the value counts. Knows nothing
of objectives (comparing.py).
"""

import decimal
from collections.abc import Sequence

from slmdeploy.errors import SpecError
from slmdeploy.metrics import known_names
from slmdeploy.selection.comparing import OBJECTIVES, cost, differ
from slmdeploy.selection.outcome import Result, Verdict
from slmdeploy.selection.rows import Row
from slmdeploy.specs import Budget, Constraint, nearest


def check_names(budget: Budget, rows: Sequence[Row]) -> None:
    """Raise SpecError where a limit names a metric, workload or target that is not there, with the nearest that is."""
    workloads = {name for row in rows for name in row.workloads()}
    targets = {row.target for row in rows if row.target}
    for limit in (*budget.constraints, *budget.preferences):
        if limit.metric not in known_names():
            raise SpecError(f"budget: there is no metric {limit.metric!r}{nearest(limit.metric, known_names())}")
        if limit.workload is not None and limit.workload not in workloads:
            raise SpecError(
                f"budget: no workload {limit.workload!r} was measured{nearest(limit.workload, sorted(workloads))}"
            )
        if limit.target is not None and limit.target not in targets:
            raise SpecError(
                f"budget: nothing is known of a target {limit.target!r}{nearest(limit.target, sorted(targets))}"
            )


def concerns(limit: Constraint, row: Row) -> bool:
    """Whether a limit is for this row: one that names a target is for the rows of that target alone."""
    return limit.target is None or limit.target == row.target


def judge(row: Row, limits: Sequence[Constraint]) -> tuple[Verdict, ...]:
    """What ``row`` makes of each limit that is for it, in their order."""
    return tuple(_verdict(row, limit) for limit in limits if concerns(limit, row))


def _verdict(row: Row, limit: Constraint) -> Verdict:
    if limit.figure not in row.metrics:
        return Verdict(str(limit), "not measured")
    value = row.metrics[limit.figure]
    low, high = row.interval(limit.figure)
    end = high if limit.operator == "<=" else low
    if limit.holds(end):
        return Verdict(str(limit), "met", value, end)
    result: Result = "not proven" if limit.holds(value) else "missed"
    return Verdict(str(limit), result, value, end, limit.outside(end), _outward(end, limit.operator))


def _outward(end: float, operator: str) -> float:
    """``end`` to four digits, rounded so that a limit of that value holds for it."""
    rounding = decimal.ROUND_CEILING if operator == "<=" else decimal.ROUND_FLOOR
    return float(decimal.Context(prec=4, rounding=rounding).create_decimal(repr(end)))


def unmet(verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """The verdicts that stand against a row, the furthest outside first."""
    return tuple(sorted((one for one in verdicts if one.result != "met"), key=lambda one: -one.by))


def excess(row: Row, preferences: Sequence[Constraint]) -> float:
    """By how much a row's values exceed the preferences in total, each as a part of its limit.

    A preferred figure that was not measured exceeds without bound.
    """
    return sum(
        limit.outside(row.metrics[limit.figure]) if limit.figure in row.metrics else float("inf")
        for limit in preferences
        if concerns(limit, row)
    )


def unfit(row: Row, rows: Sequence[Row]) -> str | None:
    """Why a build may not ship whatever the budget says: outside its gates, or slower than fp32 beyond noise."""
    if row.gates_failed:
        return f"outside its own gates: {', '.join(row.gates_failed)}"
    for other in rows:
        if row.precision == "fp32" or other.precision != "fp32" or other.graph is None or other.graph != row.graph:
            continue
        if (other.target, other.source) != (row.target, row.source):
            continue
        metrics = [m for m in OBJECTIVES["fastest"] if m in row.metrics and m in other.metrics]
        if metrics and differ(cost(other, metrics), cost(row, metrics)):
            took = " and ".join(f"{row.metrics[m]:.4g} against {other.metrics[m]:.4g} in {m}" for m in metrics)
            return f"slower than {other.name}, the fp32 build of the same graph: {took}"
    return None


def sentence(row: Row, verdict: Verdict) -> str:
    """A verdict that stands against ``row``, for people: what is wrong, and what would help where measuring would."""
    if verdict.result == "not measured":
        return f"{verdict.constraint.split(' ')[0]} was not measured"
    if verdict.result == "not proven":
        return (
            f"{verdict.constraint} is not proven: {verdict.value:.4g}, but its 95 % interval reaches {verdict.end:.4g}"
            f": measure {'it there' if row.estimated else 'longer'}, or loosen it to {verdict.needed:.10g}"
        )
    return f"{verdict.constraint} is missed: {distance(verdict)}"


def distance(verdict: Verdict) -> str:
    """Value and distance of a miss: a share of the limit, or a multiple where it is far."""
    far = f"{1 + verdict.by:.3g} times the limit" if verdict.by > 2 else f"{verdict.by:.1%} outside"
    reach = "" if verdict.end == verdict.value else f" (its 95 % interval reaches {verdict.end:.4g})"
    return f"{verdict.value:.4g}{reach}, {far}"
