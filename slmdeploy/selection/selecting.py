"""The verb `select`: reads measurements, chooses, and writes the outcome; and the what-if, which chooses twice.

Knows the order of these steps and nothing of how each is done.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from slmdeploy.artifacts import writing
from slmdeploy.errors import SpecError
from slmdeploy.metrics import describe, known_names
from slmdeploy.selection.choosing import choose
from slmdeploy.selection.outcome import Selection
from slmdeploy.selection.prices import priced, prices_of
from slmdeploy.selection.reading import read_measurements
from slmdeploy.selection.rows import Row
from slmdeploy.specs import Budget, Change, Constraint, nearest

SELECTION = "selection.json"


def select(
    measurements: Sequence[Path],
    *,
    budget: Budget,
    prices: Mapping[str, float] | None = None,
    out: Path | None = None,
    force: bool = False,
) -> Selection:
    """Choose among the rows of one or more measurements, and write the outcome to ``out`` if given.

    ``prices`` are USD per hour by target, in place of those that targets/*.toml have. An infeasible budget is an
    outcome too: it is written and returned, and ``Selection.feasible`` is False. Raises what `read_measurements`,
    `prices_of` and `choose` raise.
    """
    selection = choose(_rows(measurements, prices or {}), budget)
    if out is not None:
        plan = {"budget": budget.model_dump(mode="json"), "prices": dict(prices or {})}
        inputs = {f"measurement {index}": path for index, path in enumerate(measurements)}
        with writing(out, kind="selection", plan=plan, inputs=inputs, force=force) as draft:
            text = json.dumps(selection.to_dict(), indent=1, allow_nan=False)
            (draft.path / SELECTION).write_text(text + "\n", encoding="utf-8")
            draft.result = {"chosen": selection.chosen, "target": selection.chosen_target, "reason": selection.reason}
    return selection


def what_if(
    measurements: Sequence[Path],
    *,
    budget: Budget,
    changes: Sequence[Change],
    prices: Mapping[str, float] | None = None,
) -> Selection:
    """What would be chosen if the limits of ``budget`` were as ``changes`` say; nothing is measured or written."""
    return choose(_rows(measurements, prices or {}), changed(budget, changes))


def _rows(measurements: Sequence[Path], prices: Mapping[str, float]) -> list[Row]:
    rows = read_measurements(measurements)
    return priced(rows, prices_of(rows, prices))


def changed(budget: Budget, changes: Sequence[Change]) -> Budget:
    """``budget`` with each change in place of the limits of the same name, hard or soft; else added as a hard one.

    A change without an operator takes that of the limit that it replaces, and a new one that of its metric's direction.
    Raises SpecError on a metric that does not exist.
    """
    for change in changes:
        budget = _changed(budget, change)
    return budget


def _changed(budget: Budget, change: Change) -> Budget:
    if change.metric not in known_names():
        raise SpecError(f"what-if: there is no metric {change.metric!r}{nearest(change.metric, known_names())}")
    fresh = change.constraint("<=" if describe(change.metric).better == "lower" else ">=")

    def replaced(limits: tuple[Constraint, ...]) -> tuple[Constraint, ...]:
        return tuple(
            change.constraint(limit.operator) if limit.name == fresh.name and _same(change, limit) else limit
            for limit in limits
        )

    constraints, preferences = replaced(budget.constraints), replaced(budget.preferences)
    named = any(limit.name == fresh.name and _same(change, limit) for limit in (*constraints, *preferences))
    return budget.model_copy(
        update={"constraints": constraints if named else (*constraints, fresh), "preferences": preferences}
    )


def _same(change: Change, limit: Constraint) -> bool:
    return change.operator in (None, limit.operator)
