"""The nouns of an outcome: verdicts, rejections, relaxations, and the selection that holds them; all JSON-ready.

Knows nothing of how an outcome comes about (choosing.py).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from slmdeploy.selection.rows import Source

Result = Literal["met", "not proven", "missed", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """What one row makes of one constraint.

    ``end`` is the unfavourable end of the figure's 95 % interval. "met": the end is within the limit. "not proven": the
    value is, the end is not. "missed": the value is outside. ``by``: which part of the limit the end is outside by, and
    ``needed``: the limit that would admit the row, rounded outwards to four digits.
    """

    constraint: str
    result: Result
    value: float | None = None
    end: float | None = None
    by: float = 0.0
    needed: float | None = None


@dataclass(frozen=True)
class Rejection:
    """Why a build was not chosen, as a sentence, with the constraints that it does not meet, the furthest first."""

    build: str
    target: str | None
    reason: str
    misses: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One row as it was judged: on every constraint that is for its target, and in the figures of the Pareto front.

    ``feasible``: meets the budget and may ship. ``on_front``: no other row is as good in all ``figures`` and better in
    one, whatever the budget says.
    """

    build: str
    target: str | None
    source: Source
    feasible: bool
    on_front: bool
    figures: dict[str, float]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Relaxation:
    """The value that one constraint must at least be moved to, and by which part; what would then be feasible."""

    constraint: str
    value: float
    by: float
    build: str
    target: str | None


@dataclass(frozen=True)
class Pair:
    """A build and the target that it was measured or estimated on."""

    build: str
    target: str | None


@dataclass(frozen=True)
class Selection:
    """The outcome. ``ties`` are equal to the chosen one within noise, and ``reason`` says what broke the tie.

    When nothing is feasible ``chosen`` is None and the last four fields say how near it was. ``binding``: the
    constraint that the nearest miss is furthest outside of. ``relaxation``: what to move, all of it, to make the
    nearest miss feasible. ``alone``: constraints that make some build feasible when only that one is moved, the
    smallest move first.
    """

    objective: str
    budget: tuple[str, ...]
    preferences: tuple[str, ...]
    chosen: str | None
    chosen_target: str | None
    chosen_source: Source | None
    chosen_path: str | None
    reason: str
    rejections: tuple[Rejection, ...]
    candidates: tuple[Candidate, ...]
    ties: tuple[Pair, ...] = ()
    binding: str | None = None
    nearest_miss: Pair | None = None
    relaxation: tuple[Relaxation, ...] = ()
    alone: tuple[Relaxation, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether a build was chosen."""
        return self.chosen is not None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)
