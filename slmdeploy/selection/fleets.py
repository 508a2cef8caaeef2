"""How many replicas of one build hold a limit on latency under a load, by simulation over its measured service times.

A replica is one process on one machine as it was measured, which answers one request at a time. Requests arrive at
Poisson times and wait in one line, first come, first served; fleets too large for one line are split into equal groups
with a line each. A limit holds when the upper end of the simulated percentile's 95 % interval is within it. Knows
nothing of files or prices.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slmdeploy.errors import InputError
from slmdeploy.metrics import PERCENTILES
from slmdeploy.selection.queueing import WARM_UP, Array, Draws, percentile, waits_ms
from slmdeploy.selection.rows import Load
from slmdeploy.specs import Constraint

RUNS, REQUESTS, SEED = 40, 10_000, 0
MOST_BUSY = 0.95
"""Above this share of busy time the wait depends on how long a peak lasts, which nobody measured: never planned for."""
LARGEST_LINE = 50
"""Replicas' worth of work behind one line; a run is long enough for it to settle."""
SERVICE = {"generate": "e2e_ms", "score": "score_ms", "embed": "encode_ms", "classify": "encode_ms"}
"""What serving a request takes, by task."""


@dataclass(frozen=True)
class Simulated:
    """A limit under a load: the simulated percentile in ms and its 95 % interval."""

    constraint: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Checked:
    """One point of the measured latency-load curve beside the simulation of one replica; ``error`` is a share."""

    metric: str
    rate_per_s: float
    measured: float
    simulated: float
    error: float


@dataclass(frozen=True)
class Limit:
    """A limit on a percentile of a time that grows with the load: the constraint, the time's name, the percentile."""

    constraint: Constraint
    base: str
    percent: float


def limit_under_load(constraint: Constraint, task: str) -> Limit:
    """Read a constraint as one that replicas can help with. Raises InputError for any other."""
    base, _, suffix = constraint.metric.rpartition("_")
    useful = [SERVICE[task], "queue_ms", *(["ttft_ms"] if task == "generate" else [])]
    if base not in useful or suffix not in PERCENTILES or constraint.operator != "<=":
        names = " or ".join(f"{name}_p99" for name in useful)
        raise InputError(
            f"budget '{constraint}' is nothing that replicas help with: of a workload of task {task} limit {names}, "
            "or another percentile of these, from above"
        )
    return Limit(constraint, base, PERCENTILES[suffix])


class Service:
    """The service times of one workload of one row, ready to be simulated under any load.

    Raises InputError when the measurement has none, or too few for the percentiles that are limited.
    """

    def __init__(self, load: Load, limits: Sequence[Limit]) -> None:
        self.limits = limits
        bases = {SERVICE[load.task], *(limit.base for limit in limits)} - {"queue_ms"}
        self._times = {base: _without_waiting(load, base) for base in bases}
        self.ms = self._times[SERVICE[load.task]]
        needed = max(math.ceil(100 / (100 - limit.percent)) for limit in limits)
        if len(self.ms) < needed:
            raise InputError(f"{len(self.ms)} requests are too few for the percentile: measure {needed} or more")
        self.mean_s = float(self.ms.mean()) / 1e3
        self.draws = Draws.make(len(self.ms), runs=RUNS, requests=REQUESTS, seed=SEED)

    def simulate(self, rate_per_s: float, replicas: int, groups: int = 1) -> list[Simulated]:
        """The limited percentiles when ``rate_per_s`` is spread over ``groups`` of as many of the ``replicas``."""
        return self._percentiles(waits_ms(self.draws, self.ms, rate_per_s / groups, replicas // groups))

    def alone(self) -> list[Simulated]:
        """The limited percentiles when no request waits: the best that any number of replicas can do."""
        counted = self.draws.picks.shape[1] - int(self.draws.picks.shape[1] * WARM_UP)
        return self._percentiles(np.zeros((len(self.draws.picks), counted)))

    def _percentiles(self, waits: Array) -> list[Simulated]:
        picks = self.draws.picks[:, -waits.shape[1] :]
        found = []
        for limit in self.limits:
            times = waits if limit.base == "queue_ms" else waits + self._times[limit.base][picks]
            found.append(Simulated(str(limit.constraint), *percentile(times, limit.percent)))
        return found

    def broken(self, simulated: Sequence[Simulated]) -> list[Simulated]:
        """Those whose upper end is not within the limit."""
        pairs = zip(simulated, self.limits, strict=True)
        return [one for one, limit in pairs if not limit.constraint.holds(one.high)]


def _without_waiting(load: Load, base: str) -> Array:
    """Per-request times of ``base`` since work on the request began, float [requests], ms."""
    times = np.asarray(load.samples.get(base, ()), dtype=np.float64)
    waited = np.asarray(load.samples.get("queue_ms", np.zeros(len(times))), dtype=np.float64)
    if len(times) == 0 or len(times) != len(waited):
        raise InputError(f"its measurement has no {base} of single requests: measure it again")
    return np.maximum(times - waited, 1e-6)


@dataclass(frozen=True)
class Size:
    """The fewest replicas, in how many groups, and the rate up to which as many hold the limits."""

    replicas: int
    groups: int
    holds_up_to_per_s: float


def fewest(service: Service, rate_per_s: float) -> Size | None:
    """The fewest replicas that hold every limit at ``rate_per_s``; None if no number does."""
    if service.broken(service.alone()):
        return None
    work = rate_per_s * service.mean_s
    groups = max(1, math.ceil(work / LARGEST_LINE))

    def holds(each: int, rate: float) -> bool:
        return not service.broken(service.simulate(rate, each * groups, groups))

    # Each group needs at least as many as the work keeps busy; then twice as many, until it holds.
    least = enough = math.ceil(work / groups / MOST_BUSY)
    while not holds(enough, rate_per_s):
        least, enough = enough + 1, enough * 2
    while least < enough:
        middle = (least + enough) // 2
        least, enough = (least, middle) if holds(middle, rate_per_s) else (middle + 1, enough)
    most = MOST_BUSY * enough * groups / service.mean_s
    return Size(enough * groups, groups, _highest(lambda rate: holds(enough, rate), rate_per_s, most))


def _highest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The highest rate from ``low``, which holds, to ``high`` that still does, to one per cent."""
    if holds(high):
        return high
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def check(service: Service, load: Load) -> tuple[Checked, ...]:
    """The simulation of one replica beside the latency-load curve that was measured, where that was not saturated."""
    found = []
    for point in load.curve:
        if point.rate_per_s * service.mean_s > MOST_BUSY:
            continue
        for limit, one in zip(service.limits, service.simulate(point.rate_per_s, 1), strict=True):
            measured = point.metrics.get(limit.constraint.metric, 0.0)
            if measured > 0:
                error = one.value / measured - 1
                found.append(Checked(limit.constraint.metric, point.rate_per_s, measured, one.value, error))
    return tuple(found)
