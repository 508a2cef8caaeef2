"""What is said when no build meets the budget: the constraint that binds, the nearest miss, and what would admit one.

Only rows count that nothing but limits on measured figures stands against: no limit helps a build outside its gates.
Every value to which a limit would have to be moved is rounded outwards, so that it admits the build as it is printed.
"""

from collections.abc import Sequence
from dataclasses import replace

from slmdeploy.selection.judging import distance
from slmdeploy.selection.outcome import Candidate, Pair, Rejection, Relaxation, Selection, Verdict
from slmdeploy.selection.rows import Row
from slmdeploy.specs import Budget

_HOPELESS = "no limit would help: each build fails its own gates, is slower than fp32 or lacks a metric of the budget"

Missed = tuple[Row, tuple[Verdict, ...]]
"""A row that may ship, and the verdicts that stand against it, the furthest outside first."""


def explain(
    budget: Budget, misses: Sequence[Missed], rejections: Sequence[Rejection], candidates: tuple[Candidate, ...]
) -> Selection:
    """The outcome of a budget that nothing meets; ``misses`` has every row that may ship."""
    outcome = Selection(
        objective=budget.objective,
        budget=tuple(map(str, budget.constraints)),
        preferences=tuple(map(str, budget.preferences)),
        chosen=None,
        chosen_target=None,
        chosen_source=None,
        chosen_path=None,
        reason=_HOPELESS,
        rejections=tuple(rejections),
        candidates=candidates,
    )
    movable = [(row, missed) for row, missed in misses if all(one.needed is not None for one in missed)]
    if not movable:
        return outcome
    row, missed = min(movable, key=lambda pair: (pair[1][0].by, pair[0].name))
    alone = _alone(movable)
    binds = f"{missed[0].constraint} binds; {row.name} is nearest with {distance(missed[0])}"
    smallest = f"; the smallest single change is {alone[0].constraint} to {alone[0].value:.10g}" if alone else ""
    return replace(
        outcome,
        reason=f"no build meets the budget: {binds}{smallest}",
        binding=missed[0].constraint,
        nearest_miss=Pair(row.build, row.target),
        relaxation=tuple(_relaxation(row, one) for one in missed),
        alone=alone,
    )


def _alone(movable: Sequence[Missed]) -> tuple[Relaxation, ...]:
    """For each constraint that is the only one against some row, the smallest move that admits one; smallest first."""
    moves: dict[str, Relaxation] = {}
    for row, missed in sorted(movable, key=lambda pair: pair[0].name):
        if len(missed) == 1:
            move = _relaxation(row, missed[0])
            moves[move.constraint] = min(moves.get(move.constraint, move), move, key=lambda one: one.by)
    return tuple(sorted(moves.values(), key=lambda one: one.by))


def _relaxation(row: Row, verdict: Verdict) -> Relaxation:
    assert verdict.needed is not None
    return Relaxation(verdict.constraint, verdict.needed, verdict.by, row.build, row.target)
