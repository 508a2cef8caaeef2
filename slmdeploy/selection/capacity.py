"""The verb `plan`: how many machines a load needs, with what headroom and at what cost, for each target and build.

The service times are measured, the arrivals are assumed (Poisson at the peak rate), and the waiting between them is
simulated (fleets.py). What cannot be planned is left out with its reason: estimates have no service times, and a build
outside its own gates does not ship.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from slmdeploy.errors import InputError
from slmdeploy.selection.fleets import SERVICE, Checked, Limit, Service, Simulated, check, fewest, limit_under_load
from slmdeploy.selection.judging import concerns
from slmdeploy.selection.prices import priced, prices_of
from slmdeploy.selection.reading import read_measurements
from slmdeploy.selection.rows import Row, candidates
from slmdeploy.specs import Constraint, nearest

SECONDS = {"s": 1, "min": 60, "h": 3600, "day": 86400}
PLANNABLE = ("single-stream", "server")
"""Scenarios whose requests are answered one at a time, so that their times are service times."""


@dataclass(frozen=True)
class Fleet:
    """As many replicas of a build on a target as a load needs; None where no number holds the limits.

    ``simulated`` is at the peak rate, or without any waiting where no number helps. ``groups``: lines that requests
    wait in. ``busy``: share of time that a replica works at the peak. ``headroom``: by which share the peak may grow.
    """

    build: str
    target: str | None
    replicas: int | None
    reason: str
    service_ms_mean: float
    requests_measured: int
    simulated: tuple[Simulated, ...]
    groups: int | None = None
    busy: float | None = None
    headroom: float | None = None
    holds_up_to_per_s: float | None = None
    usd_per_hour: float | None = None
    usd_per_million_requests: float | None = None
    check: tuple[Checked, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A row that could not be planned with, and why."""

    build: str
    target: str | None
    reason: str


@dataclass(frozen=True)
class Demand:
    """What is asked for: the mean rate, how far above it the peak is, and the share by which the peak may grow."""

    rate_per_s: float
    peak: float = 1.0
    headroom: float = 0.2

    def __post_init__(self) -> None:
        if not (0 < self.rate_per_s < 1e9 and 1 <= self.peak <= 1e3 and 0 <= self.headroom <= 10):
            raise InputError(
                f"rate {self.rate_per_s:g}/s, peak {self.peak:g}, headroom {self.headroom:g}: a rate is above 0, a "
                "peak is 1 or more times the mean rate, a headroom is a share from 0 to 10"
            )

    @property
    def peak_per_s(self) -> float:
        """The highest rate that is expected."""
        return self.rate_per_s * self.peak

    @property
    def planned_per_s(self) -> float:
        """The rate that replicas are counted for."""
        return self.peak_per_s * (1 + self.headroom)


@dataclass(frozen=True)
class Capacity:
    """The outcome: a fleet for each row, the cheapest first where all have prices, else the smallest."""

    demand: Demand
    workload: str
    budget: tuple[str, ...]
    fleets: tuple[Fleet, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def feasible(self) -> bool:
        """Whether some fleet holds the limits."""
        return any(fleet.replicas is not None for fleet in self.fleets)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rates = {"peak_per_s": self.demand.peak_per_s, "planned_per_s": self.demand.planned_per_s}
        return asdict(self) | rates | {"feasible": self.feasible}


def parse_rate(text: str) -> float:
    """Requests per second of ``1200/s``, ``72000/min``, ``4.3e6/h`` or ``100e6/day``. InputError shows the form."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*/\s*(s|min|h|day)\s*", text)
    try:
        if match:
            return float(match[1]) / SECONDS[match[2]]
    except ValueError:
        pass  # a number such as "1.2.3": told below together with every other wrong form
    raise InputError(f"rate {text!r} is not of the form NUMBER/s, /min, /h or /day, e.g. '1200/s' or '100e6/day'")


def plan(
    measurements: Sequence[Path],
    *,
    demand: Demand,
    limits: Sequence[Constraint],
    target: str | None = None,
    build: str | None = None,
    workload: str | None = None,
    prices: Mapping[str, float] | None = None,
) -> Capacity:
    """How many replicas each measured row needs to hold ``limits`` under ``demand``.

    ``workload`` is the one that requests are like; it may be left out where there is only one, or where a limit names
    one. Raises InputError when names do not exist, when no row can be planned with, or when a limit is nothing that
    replicas help with, besides what `read_measurements` raises.
    """
    if not limits:
        raise InputError("a plan needs at least one limit, e.g. --budget 'e2e_ms_p99<=200'")
    rows = candidates(read_measurements(measurements))
    rows = priced(rows, prices_of(rows, prices or {}))
    for limit in limits:
        _named(rows, "target", limit.target)
    rows = _named(_named(rows, "target", target), "build", build)
    name, task = _workload(rows, workload, limits)
    useful = [limit_under_load(limit, task) for limit in limits]
    found = [_fleet_of(row, name, [one for one in useful if concerns(one.constraint, row)], demand) for row in rows]
    fleets = [one for one in found if isinstance(one, Fleet)]
    left_out = tuple(one for one in found if isinstance(one, LeftOut))
    if not fleets:
        raise InputError(f"there is nothing to plan with: {left_out[0].build}: {left_out[0].reason}")
    return Capacity(demand, name, tuple(map(str, limits)), tuple(sorted(fleets, key=_order(fleets))), left_out)


def _named(rows: Sequence[Row], what: Literal["target", "build"], wanted: str | None) -> list[Row]:
    """The rows whose target or build is ``wanted``; all where None is."""
    if wanted is None:
        return list(rows)
    names = sorted({name for row in rows if (name := getattr(row, what))})
    if wanted not in names:
        raise InputError(f"plan: no {what} {wanted!r} was measured{nearest(wanted, names)}")
    return [row for row in rows if getattr(row, what) == wanted]


def _workload(rows: Sequence[Row], wanted: str | None, limits: Sequence[Constraint]) -> tuple[str, str]:
    """Name and task of the workload that requests are like: as asked, or as a limit says, or the only one there is."""
    tasks = {
        name: load.task
        for row in rows
        for name, load in row.loads.items()
        if load.scenario in PLANNABLE and load.task in SERVICE and load.samples
    }
    asked = {name for name in (wanted, *(limit.workload for limit in limits)) if name is not None} or set(tasks)
    if not tasks:
        raise InputError(
            "plan: no measurement has request times of a workload of scenario single-stream or server: measure one"
        )
    if len(asked) > 1:
        raise InputError(f"plan: requests are of one workload: name one with --workload: {', '.join(sorted(asked))}")
    (name,) = asked
    if name not in tasks:
        raise InputError(f"plan: no workload {name!r} with request times was measured{nearest(name, sorted(tasks))}")
    return name, tasks[name]


def _fleet_of(row: Row, name: str, limits: Sequence[Limit], demand: Demand) -> Fleet | LeftOut:
    obstacle = _obstacle(row, name, limits)
    if obstacle:
        return LeftOut(row.build, row.target, obstacle)
    try:
        service = Service(row.loads[name], limits)
    except InputError as error:
        return LeftOut(row.build, row.target, str(error))
    return _fleet(row, service, demand, check(service, row.loads[name]))


def _obstacle(row: Row, name: str, limits: Sequence[Limit]) -> str | None:
    if row.estimated:
        return "estimated: there are no service times to simulate"
    if row.gates_failed:
        return f"outside its own gates: {', '.join(row.gates_failed)}"
    if name not in row.loads:
        return f"workload {name} was not measured"
    if row.loads[name].batch > 1:
        together = row.loads[name].batch
        return f"up to {together} requests were answered together, so their times are not those of one: use batch 1"
    return None if limits else "no limit is for its target"


def _fleet(row: Row, service: Service, demand: Demand, checked: tuple[Checked, ...]) -> Fleet:
    fleet = Fleet(
        build=row.build,
        target=row.target,
        replicas=None,
        reason="",
        service_ms_mean=service.mean_s * 1e3,
        requests_measured=len(service.ms),
        simulated=tuple(service.alone()),
        check=checked,
    )
    size = fewest(service, demand.planned_per_s)
    if size is None:
        worst = service.broken(fleet.simulated)[0]
        why = (
            f"{worst.constraint} is missed without any waiting: {worst.value:.4g} ({worst.low:.4g} to {worst.high:.4g})"
        )
        return replace(fleet, reason=f"no number of replicas helps: {why}")
    price = row.price_per_hour_usd
    hourly = None if price is None else price * size.replicas
    return replace(
        fleet,
        replicas=size.replicas,
        reason=f"the fewest that hold {demand.planned_per_s:.4g} requests per second",
        simulated=tuple(service.simulate(demand.peak_per_s, size.replicas, size.groups)),
        groups=size.groups,
        busy=demand.peak_per_s * service.mean_s / size.replicas,
        headroom=size.holds_up_to_per_s / demand.peak_per_s - 1,
        holds_up_to_per_s=size.holds_up_to_per_s,
        usd_per_hour=hourly,
        usd_per_million_requests=None if hourly is None else hourly / 3600 / demand.rate_per_s * 1e6,
    )


def _order(fleets: Sequence[Fleet]) -> Callable[[Fleet], tuple[object, ...]]:
    """Those that hold first; the cheapest of them where all have a price, else the smallest; then the most to spare."""
    by_cost = all(fleet.usd_per_hour is not None for fleet in fleets if fleet.replicas is not None)

    def key(fleet: Fleet) -> tuple[object, ...]:
        cost = (fleet.usd_per_hour or 0.0) if by_cost else 0.0
        spare = fleet.holds_up_to_per_s or 0.0
        return fleet.replicas is None, cost, fleet.replicas or 0, -spare, fleet.build, fleet.target or ""

    return key
