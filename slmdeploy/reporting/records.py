"""What a report is made of, as data: rows, the choice, stages, sensitivities, and the run that holds them.

The parts that stand in JSON files are pydantic models, so a wrong type or a NaN is found where it is read; keys that a
report does not show are left alone. Knows nothing of files (reading.py) nor of how anything is drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

Interval = tuple[float, float]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
"""A name in one line: what a table, a label or a shell command can hold."""


class Data(BaseModel):
    """Fields that a report reads; others are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class LoadPoint(Data):
    """One offered rate of a server workload: requests per second, and what latency came of it."""

    rate_per_s: float
    metrics: dict[str, float]
    intervals: dict[str, Interval] = {}


class ItemsPoint(Data):
    """One number of items behind a prefix, and how long a request of so many took."""

    items: int
    metrics: dict[str, float]
    intervals: dict[str, Interval] = {}


class Measured(Data):
    """One workload on one build. ``samples`` are milliseconds per request; ``settled`` is false where time ran out."""

    task: str
    scenario: str
    hot: bool = False
    requests: int = 0
    metrics: dict[str, float] = {}
    intervals: dict[str, Interval] = {}
    samples: dict[str, list[float]] = {}
    spread: float | None = None
    steal: float | None = None
    noisy: bool = False
    settled: bool = True
    curve: list[LoadPoint] = []
    items_curve: list[ItemsPoint] = []


class Gate(Data):
    """One gate of a build: whether it passed, and with which value against which limit."""

    passed: bool
    value: float | None = None
    limit: float | None = None


class Row(Data):
    """One build on one target, measured or estimated; ``basis`` says what an estimate rests on."""

    build: Name
    path: Name
    role: Literal["candidate", "baseline"]
    source: Literal["measured", "estimated"]
    target: Name | None = None
    content_key: str | None = None
    graph: str | None = None
    profile: Name | None = None
    precision: str
    options: dict[str, Any] = {}
    gates: dict[str, Gate]
    passed: bool
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    workloads: dict[Name, Measured] = {}
    noisy: bool = False
    basis: str | None = None

    @property
    def estimated(self) -> bool:
        """Whether no machine ran it."""
        return self.source == "estimated"

    @property
    def unsettled(self) -> list[str]:
        """Workloads whose budgeted percentile has a wide interval still."""
        return [name for name, workload in self.workloads.items() if not workload.settled]

    def value(self, metric: str, workload: str | None = None) -> float | None:
        """A metric of the row, or of one of its workloads; None where it was not measured."""
        part = self if workload is None else self.workloads.get(workload)
        return part.metrics.get(metric) if part else None

    def interval(self, metric: str, workload: str | None = None) -> Interval | None:
        """The 95 % interval of a metric; None where none was measured."""
        part = self if workload is None else self.workloads.get(workload)
        return part.intervals.get(metric) if part else None


class Measurement(Data):
    """measurement.json. ``surroundings`` are what else the machine was doing."""

    made: str
    target: str | None
    source: Literal["measured", "estimated"]
    machine: dict[str, Any] | None
    surroundings: dict[str, Any] = {}
    threads: int
    plan: dict[str, Any]
    rows: list[Row]


class Verdict(Data):
    """What one row makes of one limit; ``end`` is the unfavourable end of its interval."""

    constraint: str
    result: Literal["met", "not proven", "missed", "not measured"]
    value: float | None = None
    end: float | None = None


class Pair(Data):
    """A build on a target."""

    build: str
    target: str | None


class Rejection(Pair):
    """Why a row was not chosen."""

    reason: str


class Candidate(Pair):
    """A row as it was judged, whether it was chosen or not."""

    feasible: bool
    on_front: bool
    verdicts: list[Verdict]


class Relaxation(Pair):
    """What a limit would have to be for this row to be feasible."""

    constraint: str
    value: float


class Choice(Data):
    """selection.json."""

    objective: str
    budget: list[str]
    preferences: list[str]
    chosen: str | None
    chosen_target: str | None
    chosen_source: Literal["measured", "estimated"] | None
    reason: str
    rejections: list[Rejection]
    candidates: list[Candidate]
    ties: list[Pair] = []
    relaxation: list[Relaxation] = []
    alone: list[Relaxation] = []

    def is_chosen(self, row: Row) -> bool:
        """Whether it chose this row."""
        return row.role == "candidate" and (row.build, row.target) == (self.chosen, self.chosen_target)

    def candidate(self, row: Row) -> Candidate | None:
        """The row as it was judged; None for the baseline, which cannot be chosen."""
        return next((one for one in self.candidates if (one.build, one.target) == (row.build, row.target)), None)

    def reason_of(self, row: Row) -> str:
        """Why the row was chosen, or why not."""
        if self.is_chosen(row):
            return self.reason
        return next((r.reason for r in self.rejections if (r.build, r.target) == (row.build, row.target)), "")


@dataclass(frozen=True)
class Stage:
    """One artifact of a run: what it was made of, with what, and how long that took.

    ``seconds`` is that of the latest run, near 0 where ``reused``. ``inputs`` says for each input, by its name, which
    stage made it; one that no stage made stands for itself.
    """

    name: str
    folder: str
    key: str
    seconds: float
    reused: bool
    plan: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of stages, or of inputs that no stage made."""
        return tuple(self.inputs.values())


@dataclass(frozen=True)
class Sensitivity:
    """The parts of one build (of one ``form`` of it) that stayed in higher precision.

    ``kept``: part, form that was wanted, form that it has, and what the part costs alone, in ``measure``.
    ``forms``: how many parts have which form.
    """

    build: str
    form: str
    measure: str
    kept: tuple[tuple[str, str, str, float], ...]
    forms: Mapping[str, int]


@dataclass(frozen=True)
class Run:
    """Everything that a report shows. ``left_out`` names sections that need more than was given, with the reason."""

    name: str
    measurement: Measurement
    selection: Choice | None = None
    stages: tuple[Stage, ...] = ()
    sensitivities: tuple[Sensitivity, ...] = ()
    package: str | None = None
    trial: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order in which they were measured."""
        return self.measurement.rows

    @property
    def labels(self) -> list[str]:
        """What each row is called: its build, and behind an @ its target where that is not the measurement's own."""
        main = self.measurement.target
        return [row.build if row.target in (main, None) else f"{row.build}@{row.target}" for row in self.rows]

    @property
    def series(self) -> list[int]:
        """The number of each row's colour and shape: 0 is the baseline's alone, whether there is one or not."""
        first = 0 if self.rows[0].role == "baseline" else 1
        return list(range(first, first + len(self.rows)))

    @property
    def baseline(self) -> Row | None:
        """What ratios are to."""
        return next((row for row in self.rows if row.role == "baseline"), None)


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading each; what a chart shows, in words."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
