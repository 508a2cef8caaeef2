"""The pure function `choose`: which (target, build) pair meets the budget, and why not the others.

Hard constraints first, then the least total excess over the preferences, then the objective. A build outside its own
gates, or slower than the fp32 build of its graph on the same target, is never chosen. Estimated rows take part and are
always called so. When nothing is feasible the result says which constraint binds, which build misses by least, and what
would have to give. Knows nothing of files, nor of how a value was measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slmdeploy.selection.comparing import FRONT, TIE_RULE, Decision, decide, objective_metrics, pareto_front, shared
from slmdeploy.selection.infeasible import explain
from slmdeploy.selection.judging import check_names, excess, judge, sentence, unfit, unmet
from slmdeploy.selection.outcome import Candidate, Pair, Rejection, Selection, Verdict
from slmdeploy.selection.prices import refuse_unpriced
from slmdeploy.selection.rows import Row, candidates, with_quality
from slmdeploy.specs import Budget

_MOST = {"throughput": "most throughput", "quality": "best quality"}
_LESS = {"throughput": "less throughput", "quality": "lower quality"}
"""How an objective is said of the chosen one and of the others, where it is no superlative itself."""


@dataclass(frozen=True)
class Judged:
    """A row, why it may not ship whatever the budget says, and what it makes of the constraints."""

    row: Row
    unfit: str | None
    verdicts: tuple[Verdict, ...]

    @property
    def feasible(self) -> bool:
        """Whether it may ship and meets every constraint."""
        return not self.unfit and not unmet(self.verdicts)


def choose(rows: Sequence[Row], budget: Budget) -> Selection:
    """Choose among ``rows`` the build and target that meet ``budget`` and serve its objective best; pure.

    The order of rows has no influence. The baseline is never chosen. Raises SpecError on a metric, workload or target
    that does not exist, and InputError when there is no build, when two rows are of the same build and target, when a
    cost is asked for and a target has no price, or when the candidates have no metric of the objective in common.
    """
    builds = with_quality(candidates(rows))
    check_names(budget, builds)
    refuse_unpriced(builds, budget)
    judged = [Judged(row, unfit(row, builds), judge(row, budget.constraints)) for row in builds]
    rejected = [_rejection(one) for one in judged if not one.feasible]
    feasible = [one.row for one in judged if one.feasible]
    table = _candidates(judged)
    if not feasible:
        misses = [(one.row, unmet(one.verdicts)) for one in judged if not one.unfit]
        return explain(budget, misses, rejected, table)
    metrics = objective_metrics(builds, budget.objective)
    return _chosen(feasible, metrics, budget, rejected, table)


def _rejection(judged: Judged) -> Rejection:
    row, misses = judged.row, unmet(judged.verdicts)
    reasons = [*([judged.unfit] if judged.unfit else []), *(sentence(row, one) for one in misses)]
    return Rejection(row.build, row.target, _said(row, "; ".join(reasons)), misses)


def _said(row: Row, reason: str) -> str:
    return f"estimated: {reason}" if row.estimated else reason


def _candidates(judged: Sequence[Judged]) -> tuple[Candidate, ...]:
    figures = shared([one.row for one in judged], FRONT)
    front = pareto_front([one.row for one in judged], *figures)
    return tuple(_candidate(one, figures, any(one.row is row for row in front)) for one in judged)


def _candidate(judged: Judged, figures: Sequence[str], on_front: bool) -> Candidate:
    row = judged.row
    return Candidate(
        build=row.build,
        target=row.target,
        source=row.source,
        feasible=judged.feasible,
        on_front=on_front,
        figures={name: row.metrics[name] for name in figures},
        verdicts=judged.verdicts,
    )


def _chosen(
    feasible: Sequence[Row],
    metrics: Sequence[str],
    budget: Budget,
    rejected: Sequence[Rejection],
    table: tuple[Candidate, ...],
) -> Selection:
    least = min(excess(row, budget.preferences) for row in feasible)
    preferred = [row for row in feasible if excess(row, budget.preferences) == least]
    decision = decide(preferred, metrics)
    best = decision.best
    beaten = [
        Rejection(
            row.build, row.target, _said(row, f"feasible, {_why_not(row, decision, budget)}: {_values(row, metrics)}")
        )
        for row in feasible
        if row is not best
    ]
    return Selection(
        objective=budget.objective,
        budget=tuple(map(str, budget.constraints)),
        preferences=tuple(map(str, budget.preferences)),
        chosen=best.build,
        chosen_target=best.target,
        chosen_source=best.source,
        chosen_path=best.path or None,
        reason=_reason(decision, preferred, feasible, metrics, budget),
        rejections=tuple(sorted([*rejected, *beaten], key=lambda one: (one.build, one.target or ""))),
        candidates=table,
        ties=tuple(Pair(row.build, row.target) for row in decision.equal if row is not best),
    )


def _why_not(row: Row, decision: Decision, budget: Budget) -> str:
    if row in decision.equal:
        return f"equal to {decision.best.name} within noise, but {_tie_broken(decision.best, row)}"
    over = excess(row, budget.preferences)
    if over > excess(decision.best, budget.preferences):
        return f"but {_kept(over)}"
    return _LESS.get(budget.objective, f"not the {budget.objective}")


def _kept(over: float) -> str:
    """How far the preferences are kept, by the excess over them."""
    if over == math.inf:
        return "without a figure for every preference"
    return f"over the preferences by {over:.1%}" if over else "within every preference"


def _tie_broken(best: Row, row: Row) -> str:
    """By which part of TIE_RULE ``best`` was taken and ``row`` was not."""
    if row.estimated and not best.estimated:
        return "not measured"
    sizes = row.metrics.get("size_bytes", math.inf), best.metrics.get("size_bytes", math.inf)
    if sizes[0] < sizes[1]:
        return "beaten by another in both mean and size"
    return "larger" if sizes[0] > sizes[1] else "not better"


def _reason(
    decision: Decision, preferred: Sequence[Row], feasible: Sequence[Row], metrics: Sequence[str], budget: Budget
) -> str:
    best, leader = decision.best, decision.leader
    among = f"{len(feasible)} feasible"
    if budget.preferences:
        among = f"{len(preferred)} {_kept(excess(best, budget.preferences))}, of {among}"
    what = f"{_MOST.get(budget.objective, budget.objective)} of {among} ({_values(best, metrics)})"
    if len(decision.equal) > 1:
        others = ", ".join(row.name for row in decision.equal if row is not best)
        what += f"; equal within noise to {others}"
        if best is not leader:
            what += f" (of which {leader.name} has the best mean: {_values(leader, metrics)})"
        what += f", and taken as {TIE_RULE}"
    return f"estimated, not measured: {what}" if best.estimated else what


def _values(row: Row, metrics: Sequence[str]) -> str:
    shown = dict.fromkeys([*metrics, "size_bytes"])
    return ", ".join(f"{name} {row.metrics[name]:.4g}" for name in shown if name in row.metrics)
