"""Budget: limits on metrics and what to prefer within them, and how people write them.

The grammar of a limit is `[WORKLOAD:]METRIC[@TARGET] <= NUMBER`, or `>=`; of a change to one, for a what-if, the same
with `=` too. Knows nothing of which metrics, workloads and targets there are: that is checked against the rows that a
budget is held to (selection/judging.py).
"""

import re
from typing import Literal

from slmdeploy.errors import InputError
from slmdeploy.specs.base import Real, Spec

Operator = Literal["<=", ">="]


class Constraint(Spec):
    """A limit on one metric, such as ``ttft_ms_p99 <= 300``; of one workload or target alone where it names one."""

    metric: str
    operator: Operator
    limit: Real
    workload: str | None = None
    target: str | None = None

    def holds(self, value: float) -> bool:
        """Whether ``value`` is within the limit, the limit itself included."""
        return value <= self.limit if self.operator == "<=" else value >= self.limit

    def outside(self, value: float) -> float:
        """How far ``value`` is outside, as a part of the limit (0.2 is 20 %; the distance where the limit is 0)."""
        return 0.0 if self.holds(value) else abs(value - self.limit) / (abs(self.limit) or 1.0)

    @property
    def figure(self) -> str:
        """The key of its figure in a row's metrics: ``metric`` or ``workload:metric``."""
        return self.metric if self.workload is None else f"{self.workload}:{self.metric}"

    @property
    def name(self) -> str:
        """What it limits, as people write it: everything before the operator."""
        return self.figure if self.target is None else f"{self.figure}@{self.target}"

    def moved(self, limit: float) -> "Constraint":
        """The same constraint with another limit."""
        return self.model_copy(update={"limit": limit})

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {_number(self.limit)}"


class Change(Spec):
    """A limit to try instead, for a what-if. Without an operator it takes the one of the limit that it replaces."""

    metric: str
    limit: Real
    operator: Operator | None = None
    workload: str | None = None
    target: str | None = None

    def constraint(self, operator: Operator) -> Constraint:
        """As a constraint, with ``operator`` where it has none of its own."""
        return Constraint.model_validate(self.model_dump() | {"operator": self.operator or operator})


Objective = Literal["fastest", "throughput", "cheapest", "smallest", "quality"]


class Budget(Spec):
    """Constraints that a build must all meet, and what to prefer among those that do.

    ``preferences`` are soft: among the builds that meet the constraints those win that exceed these by least in total,
    and the objective decides between them.
    """

    constraints: tuple[Constraint, ...] = ()
    preferences: tuple[Constraint, ...] = ()
    objective: Objective = "fastest"


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


_LIMIT = re.compile(
    r"\s*(?:(?P<workload>[^\s:@<>=]+):)?(?P<metric>[a-z][a-z0-9_]*)(?:@(?P<target>[^\s:@<>=]+))?"
    r"\s*(?P<operator><=|>=|=)\s*(?P<limit>[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*"
)


def _fields(text: str, operators: tuple[str, ...]) -> dict[str, object] | None:
    match = _LIMIT.fullmatch(text)
    if match is None or match["operator"] not in operators:
        return None
    try:
        return match.groupdict() | {"limit": float(match["limit"])}
    except ValueError:
        return None  # a number such as "1.2.3": told by the caller like every other wrong form


def parse_constraint(text: str) -> Constraint:
    """Read ``[workload:]metric[@target]<=number`` or ``>=``; anything else is an InputError that shows the form."""
    fields = _fields(text, ("<=", ">="))
    try:
        if fields:
            return Constraint.model_validate(fields)
    except ValueError:
        pass  # a number beyond what a float holds
    raise InputError(
        f"budget {text!r} is not of the form metric<=number or metric>=number, e.g. 'tpot_ms_p50<=5', with "
        "WORKLOAD: before the metric or @TARGET behind it where one is meant"
    )


def parse_change(text: str) -> Change:
    """Read ``[workload:]metric[@target]=number`` (``<=`` and ``>=`` too); else an InputError that shows the form."""
    fields = _fields(text, ("=", "<=", ">="))
    try:
        if fields:
            return Change.model_validate(fields | ({"operator": None} if fields["operator"] == "=" else {}))
    except ValueError:
        pass  # a number beyond what a float holds
    raise InputError(f"what-if {text!r} is not of the form metric=number, e.g. 'score_ms_p99=80'")


def parse_budget(*texts: str, objective: Objective = "fastest", preferences: tuple[str, ...] = ()) -> Budget:
    """A Budget from the texts of its constraints and preferences; one that is written twice counts once."""
    return Budget(
        constraints=tuple(dict.fromkeys(parse_constraint(text) for text in texts)),
        preferences=tuple(dict.fromkeys(parse_constraint(text) for text in preferences)),
        objective=objective,
    )
