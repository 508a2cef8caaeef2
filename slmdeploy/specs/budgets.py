"""Budget: limits on metrics and what to prefer within them, and how people write them."""

import re
from typing import Literal

from slmdeploy.errors import InputError
from slmdeploy.specs.base import Real, Spec


class Constraint(Spec):
    """A hard limit on one metric, such as ``ttft_ms_p99 <= 300``."""

    metric: str
    operator: Literal["<=", ">="]
    limit: Real

    def holds(self, value: float) -> bool:
        """Whether ``value`` is within the limit, the limit itself included."""
        return value <= self.limit if self.operator == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.metric} {self.operator} {self.limit:g}"


_CONSTRAINT = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(<=|>=)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")


def parse_constraint(text: str) -> Constraint:
    """Read ``metric<=number`` or ``metric>=number``; anything else is an InputError that shows the form."""
    match = _CONSTRAINT.fullmatch(text)
    try:
        if match:
            metric, operator, limit = match.groups()
            return Constraint.model_validate({"metric": metric, "operator": operator, "limit": float(limit)})
    except ValueError:
        pass  # a number such as "1.2.3": told below together with every other wrong form
    raise InputError(f"budget {text!r} is not of the form metric<=number or metric>=number, e.g. 'tpot_ms_p50<=5'")


Objective = Literal["fastest", "throughput", "smallest", "quality"]


class Budget(Spec):
    """Constraints that a build must all meet, and what to prefer among those that do."""

    constraints: tuple[Constraint, ...] = ()
    objective: Objective = "fastest"


def parse_budget(*texts: str, objective: Objective = "fastest") -> Budget:
    """A Budget from ``metric<=number`` texts."""
    return Budget(constraints=tuple(parse_constraint(text) for text in texts), objective=objective)
