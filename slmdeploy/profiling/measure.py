"""Runs one workload on several candidates, interleaved, until each figure is as certain as was asked or time is up.

Rounds go A B C A B C, so that a slow minute of the machine falls on all candidates alike; a round in which the
hypervisor took too much time away is thrown away and run again. Every candidate is warmed up first, which also says how
many requests fit a turn, so a slow baseline gets fewer (their number is in the result). Each turn opens with one more
request that does not count: while the others had their turns the candidate's threads slept and its weights left the
caches, which is the price of interleaving and not of the candidate. After the least number of rounds those go on whose
watched percentile is not narrow yet, but not those that another candidate beats in speed and size beyond noise. Knows
nothing of processes or engines: a `Client` answers (process.py).
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slmdeploy.metrics import LATENCIES, PERCENTILES, RATIO
from slmdeploy.profiling import load
from slmdeploy.profiling.arrivals import poisson
from slmdeploy.profiling.driving import MOST_IDLE_S
from slmdeploy.profiling.environment import cpu_ticks, energy_joules, steal_share
from slmdeploy.profiling.journal import Journal
from slmdeploy.profiling.process import Client
from slmdeploy.profiling.search import is_batched
from slmdeploy.profiling.statistics import interval, percentile_draws
from slmdeploy.profiling.summary import NOISY_STEAL, SERVICE, SERVICE_TIME, Outcome, Turn, summarise, turn_of
from slmdeploy.profiling.trace import read_trace
from slmdeploy.specs import Workload

_WARM_UP = 2
_LEAST_ARRIVALS = 30
"""Requests of a turn of open-loop arrivals: of fewer the first ones, which found no queue, would be most."""
_OVERLOAD = 3.0
"""A turn of open-loop arrivals ends after this many times the span of its arrivals: who cannot keep up never ends."""
_PEEK_RESAMPLES = 200
_BEYOND = 5
"""Requests that must lie beyond a percentile before its interval can be believed."""


@dataclass(frozen=True)
class Effort:
    """How much to measure: ``rounds`` at least, in which each candidate takes about ``seconds`` per workload; then more
    rounds for what is not certain, until a candidate took ``limit_s``. Certain is an interval of the watched percentile
    that reaches no further than ``precision`` of its value to either side."""

    rounds: int = 5
    seconds: float = 1.0
    limit_s: float = 10.0
    precision: float = 0.05


@dataclass
class Runner:
    """One candidate under way: who answers, how much it takes on disk, and what its turns showed."""

    name: str
    client: Client
    size_bytes: float = 0.0
    may_be_dropped: bool = True
    batch: int | None = None
    """Requests that it takes together where many wait, None as many as the workload says."""
    request_ms: float = 0.0
    turns: list[Turn] = field(default_factory=list)
    steal: list[float] = field(default_factory=list)
    repeated: int = 0

    @property
    def spent_s(self) -> float:
        """Seconds that its turns took."""
        return sum(turn.wall_s for turn in self.turns)

    @property
    def requests(self) -> int:
        """Requests that its turns ran."""
        return sum(turn.requests for turn in self.turns)

    def samples(self, name: str) -> list[float]:
        """All samples of a name so far."""
        return [value for turn in self.turns for value in turn.samples.get(name, ())]


def measure(
    runners: Sequence[Runner],
    workload: Workload,
    *,
    vocab_size: int,
    effort: Effort,
    seed: int,
    watch: Sequence[str] = (),
    journal: Journal | None = None,
    text: Sequence[int] = (),
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Outcome]:
    """Run ``workload`` on every runner and return each one's Outcome.

    ``watch`` are names of metrics of a budget whose intervals must become narrow; where none is of this workload it is
    the median of the service time. ``text`` is what prompts are cut from (load.requests). ``done`` is called with the
    candidate's name after each of its turns.
    """
    kept = journal or Journal(None, "")
    watched = watched_percentiles(watch, workload)
    openers = _Requests(workload, vocab_size, (seed, 1), text)
    counted = _Requests(workload, vocab_size, (seed, 0), text)
    for runner in runners:
        runner.request_ms = _warm_up(runner.client, openers.draw(-1, _WARM_UP))
    active = list(runners)
    round_ = 0
    while active:
        _round(active, workload, effort, round_, openers, counted, kept, done)
        round_ += 1
        if workload.trace is not None or (workload.scenario == "offline" and round_ >= effort.rounds):
            break
        if round_ >= effort.rounds:
            active = _undecided(active, runners, workload, effort, watched)
    return {runner.name: _outcome(runner, workload, seed, watched, effort) for runner in runners}


class _Requests:
    """Requests by round; those of different rounds differ, so that nothing is in a cache by accident."""

    def __init__(self, workload: Workload, vocab_size: int, seed: tuple[int, int], text: Sequence[int]) -> None:
        self._workload, self._vocab_size, self._seed, self._text = workload, vocab_size, seed, text

    def draw(self, round_: int, n: int) -> list[load.Request]:
        """The first ``n`` of a round; -1 are those of the warm-up."""
        seed = (*self._seed, round_ + 1)
        return load.requests(self._workload, n, vocab_size=self._vocab_size, seed=seed, text=self._text)


def _warm_up(client: Client, requests: Sequence[load.Request]) -> float:
    """Run the requests one by one; milliseconds of the last one's service."""
    records = [_drive(client, [request], None, 1)[0] for request in requests]
    return 1e3 * float(records[-1]["end_s"] - records[-1]["begin_s"])


def _drive(
    client: Client,
    requests: Sequence[load.Request],
    arrivals: Sequence[float] | None,
    concurrency: int,
    *,
    batch: int = 1,
    limit_s: float = MOST_IDLE_S,
) -> list[dict[str, Any]]:
    reply = client.ask(
        "drive", requests=requests, arrivals=arrivals, concurrency=concurrency, batch=batch, limit_s=limit_s
    )
    return list(reply["records"])


def _round(
    active: Sequence[Runner],
    workload: Workload,
    effort: Effort,
    round_: int,
    openers: _Requests,
    counted: _Requests,
    kept: Journal,
    done: Callable[[str], None],
) -> None:
    """One turn of each; run again, at most as often as there are rounds, when too much time was stolen."""
    while True:
        before = cpu_ticks()
        found = {}
        for runner in active:
            place = (workload.name, runner.name, round_)
            turn = kept.get(place)
            if turn is None:
                _drive(runner.client, openers.draw(round_, 1), None, 1)
                turn = _turn(runner, workload, effort, round_, counted)
                kept.put(place, turn)
                done(runner.name)
            found[runner.name] = turn
        steal = steal_share(before, cpu_ticks())
        if (steal or 0.0) <= NOISY_STEAL or active[0].repeated >= effort.rounds or workload.trace is not None:
            break
        for runner in active:
            runner.repeated += 1
            kept.forget((workload.name, runner.name, round_))
    for runner in active:
        runner.turns.append(found[runner.name])
        runner.steal += [] if steal is None else [steal]


def _turn(runner: Runner, workload: Workload, effort: Effort, round_: int, counted: _Requests) -> Turn:
    """The requests of one turn, sent as the scenario says."""
    arrivals = _arrivals(workload, runner, effort, round_)
    count = len(arrivals) if arrivals is not None else _affordable(workload, runner, effort)
    requests = counted.draw(round_, count)
    limit_s = MOST_IDLE_S
    if workload.scenario in ("server", "trace"):
        assert arrivals is not None
        limit_s = max(_OVERLOAD * arrivals[-1], 10 * runner.request_ms / 1e3)
    before = energy_joules()
    batch = _batch(workload, runner)
    records = _drive(runner.client, requests, arrivals, workload.concurrency or 1, batch=batch, limit_s=limit_s)
    after = energy_joules()
    turn = turn_of(workload, requests, records)
    if before is not None and after is not None and after > before:
        turn.joules = after - before
    return turn


def _batch(workload: Workload, runner: Runner) -> int:
    return runner.batch if runner.batch is not None and is_batched(workload) else workload.batch


def _affordable(workload: Workload, runner: Runner, effort: Effort) -> int:
    """How many requests fit a turn: at least one, and of each of several clients at least one."""
    fitting = int(effort.seconds / effort.rounds * 1e3 / max(runner.request_ms, 1e-3))
    return max(workload.concurrency or 1, min(fitting, -(-workload.requests // effort.rounds)), 1)


def _arrivals(workload: Workload, runner: Runner, effort: Effort, round_: int) -> list[float] | None:
    """Seconds at which a turn's requests arrive; None for clients that wait for their answers."""
    if workload.scenario == "offline":
        return [0.0] * max(_affordable(workload, runner, effort), _batch(workload, runner))
    if workload.trace is not None:
        return [entry.arrival_s for entry in read_trace(workload.trace, workload.task)[: workload.requests]]
    if workload.rate_per_s is None:
        return None
    most = -(-workload.requests // effort.rounds)
    fitting = int(workload.rate_per_s * effort.seconds / effort.rounds)
    count = max(min(_LEAST_ARRIVALS, most), min(fitting, most))
    return poisson(workload.rate_per_s, count, [round_, zlib.crc32(workload.name.encode())])


def watched_percentiles(watch: Sequence[str], workload: Workload) -> list[tuple[str, float]]:
    """Sample and percentile of each watched metric that this workload gives; the median of its service otherwise.

    >>> watched_percentiles(["rank:score_ms_p99", "tpot_ms_p50_ratio"], Workload.model_validate(
    ...     {"name": "rank", "task": "score", "prefix_tokens": 4, "items": 2, "item_tokens": 2}))
    [('score_ms', 99.0)]
    """
    found = []
    for name in watch:
        owner, _, metric = name.rpartition(":")
        base, _, label = metric.removesuffix(RATIO).rpartition("_")
        ours = base in _SAMPLES_OF[workload.task] or (base == "queue_ms" and workload.queues)
        if owner in ("", workload.name) and base in LATENCIES and ours:
            found.append((base, PERCENTILES[label]))
    return list(dict.fromkeys(found)) or [(SERVICE[workload.task], 50.0)]


_SAMPLES_OF = {
    "generate": ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"),
    "score": ("score_ms",),
    "embed": ("encode_ms",),
    "classify": ("encode_ms",),
}


def is_narrow(values: Sequence[float], percent: float, precision: float, seed: int = 0) -> bool:
    """Whether enough samples lie beyond the percentile and its 95 % interval is within ``precision`` of its value."""
    if len(values) * (1 - percent / 100) < _BEYOND:
        return False
    low, high = interval(percentile_draws(values, [percent], seed, _PEEK_RESAMPLES)[:, 0])
    middle = float(np.percentile(values, percent))
    return max(high - middle, middle - low) <= precision * middle


def _is_settled(runner: Runner, watched: Sequence[tuple[str, float]], precision: float) -> bool:
    return all(
        is_narrow(values, percent, precision)
        for sample, percent in watched
        if (values := runner.samples(sample)) or sample != "tpot_ms"  # one new token has no time per token
    )


def _undecided(
    active: Sequence[Runner],
    everyone: Sequence[Runner],
    workload: Workload,
    effort: Effort,
    watched: Sequence[tuple[str, float]],
) -> list[Runner]:
    """Who goes on: figures not certain yet, time and requests left, and not beaten by another in speed and size."""
    medians = {
        runner.name: interval(percentile_draws(runner.samples(SERVICE_TIME), [50.0], 0, _PEEK_RESAMPLES)[:, 0])
        for runner in everyone
        if runner.samples(SERVICE_TIME)
    }

    def beaten(runner: Runner) -> bool:
        return runner.may_be_dropped and any(
            other.may_be_dropped
            and other.size_bytes <= runner.size_bytes
            and medians[other.name][1] < medians[runner.name][0]
            for other in everyone
            if other is not runner and other.name in medians and runner.name in medians
        )

    return [
        runner
        for runner in active
        if not _is_settled(runner, watched, effort.precision)
        and runner.spent_s < effort.limit_s
        and runner.requests < workload.requests
        and not beaten(runner)
    ]


def _outcome(
    runner: Runner, workload: Workload, seed: int, watched: Sequence[tuple[str, float]], effort: Effort
) -> Outcome:
    outcome = summarise(workload, runner.turns, name=runner.name, seed=seed)
    outcome.steal = max(runner.steal, default=None)
    outcome.repeated = runner.repeated
    outcome.settled = workload.scenario == "offline" or _is_settled(runner, watched, effort.precision)
    return outcome
