"""Runs one workload on several candidates, interleaved, and sums the replies up in metrics with intervals.

Rounds go A B C A B C, so that a slow minute of the machine falls on all candidates alike. Every candidate is warmed up
first; the warm-up also says how many requests fit its share of time, so a slow baseline gets fewer (their number is in
the result). Each turn opens with one more request that does not count: while the others had their turns the candidate's
threads slept and its weights left the caches, which is the price of interleaving and not of the candidate. Knows
nothing of processes or engines: a `Client` answers (process.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slmdeploy.metrics import PERCENTILES
from slmdeploy.profiling import load
from slmdeploy.profiling.process import Client
from slmdeploy.specs import Workload

RESAMPLES = 1000
NOISY_SPREAD = 0.25
"""(p90 - p10) / p50 of the service time above which a measurement is called noisy."""
NOISY_STEAL = 0.02
"""Share of the machine's CPU time taken by the hypervisor above which a measurement is called noisy."""
_WARM_UP = 2
_SERVICE = {"generate": "e2e_ms", "score": "score_ms", "embed": "encode_ms", "classify": "encode_ms"}
"""What each task calls the time of a whole request."""
_COUNTED = {"generate": "tokens", "score": "items", "embed": "texts", "classify": "texts"}
"""What each task's throughput counts."""

Interval = tuple[float, float]
Reply = dict[str, Any]


@dataclass
class Outcome:
    """One workload on one candidate: metrics, 95 % intervals of some of them, and how they came about."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    requests: int
    spread: float
    steal: float | None = field(default=None)

    @property
    def noisy(self) -> bool:
        """Whether the spread of service times or the hypervisor's share makes small differences meaningless."""
        return self.spread > NOISY_SPREAD or (self.steal or 0.0) > NOISY_STEAL


def measure(
    clients: Mapping[str, Client],
    workload: Workload,
    *,
    vocab_size: int,
    rounds: int,
    seconds: float,
    seed: int,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Outcome]:
    """Run ``workload`` on every client and return each one's Outcome.

    ``seconds`` is what each candidate may take: it runs as many of the workload's requests as fit, at least one per
    round. ``done`` is called with the candidate's name after each of its turns.
    """
    first, openers = _uncounted(workload, rounds, vocab_size=vocab_size, seed=seed)
    counts = {
        name: affordable(_warm_up(client, first), workload.requests, rounds, seconds)
        for name, client in clients.items()
    }
    requests = load.requests(workload, max(counts.values()), vocab_size=vocab_size, seed=seed)
    replies: dict[str, list[Reply]] = {name: [] for name in clients}
    before = cpu_ticks()
    for index, name, turn in turns(list(clients), counts, rounds):
        clients[name].ask("offline", requests=[openers[index]])
        replies[name].extend(_run_turn(clients[name], workload, requests[turn]))
        done(name)
    steal = steal_share(before, cpu_ticks())
    outcomes = {name: summarise(workload, replies[name], counts[name], seed) for name in clients}
    for outcome in outcomes.values():
        outcome.steal = steal
    return outcomes


def _uncounted(
    workload: Workload, rounds: int, *, vocab_size: int, seed: int
) -> tuple[list[load.Request], list[load.Request]]:
    """Requests that no measured one repeats: those of the warm-up, and the one that opens each round's turns."""
    drawn = load.requests(workload, _WARM_UP + rounds, vocab_size=vocab_size, seed=seed + 1)
    return drawn[:_WARM_UP], drawn[_WARM_UP:]


def _warm_up(client: Client, requests: Sequence[load.Request]) -> float:
    """Run the requests one by one; milliseconds of the last one."""
    for request in requests:
        reply = client.ask("offline", requests=[request])
    return float(reply["ms"])


def affordable(request_ms: float, wanted: int, rounds: int, seconds: float) -> int:
    """How many requests to run: what fits into ``seconds``, but at least one per round and at most ``wanted``."""
    fitting = int(seconds * 1e3 / request_ms) if request_ms > 0 else wanted
    return min(wanted, max(rounds, fitting))


def turns(names: Sequence[str], counts: Mapping[str, int], rounds: int) -> Iterator[tuple[int, str, slice]]:
    """Round, who runs, which of its requests: A B C A B C, each candidate's requests spread evenly over the rounds.

    >>> [(index, name, turn.start, turn.stop) for index, name, turn in turns(["a", "b"], {"a": 4, "b": 2}, 2)]
    [(0, 'a', 0, 2), (0, 'b', 0, 1), (1, 'a', 2, 4), (1, 'b', 1, 2)]
    """
    for index in range(rounds):
        for name in names:
            first, last = (counts[name] * step // rounds for step in (index, index + 1))
            if first < last:
                yield index, name, slice(first, last)


def _run_turn(client: Client, workload: Workload, requests: Sequence[load.Request]) -> list[Reply]:
    if workload.scenario == "offline":
        return [client.ask("offline", requests=list(requests))]
    return [client.ask(**request) for request in requests]


def summarise(workload: Workload, replies: Sequence[Reply], requests: int, seed: int = 0) -> Outcome:
    """The metrics of one candidate's replies to one workload (metrics.py defines them)."""
    if workload.scenario == "offline":
        return _summarise_offline(workload, replies, requests, seed)
    service_name = _SERVICE[workload.task]
    samples = _generate_samples(replies) if workload.task == "generate" else {service_name: [r["ms"] for r in replies]}
    metrics, intervals = {}, {}
    for name, values in samples.items():
        for percent in PERCENTILES:
            metrics[f"{name}_p{percent}"] = percentile(values, percent)
        intervals[f"{name}_p50"] = bootstrap(values, lambda drawn: np.median(drawn, axis=-1), seed)
    return Outcome(metrics, intervals, requests, spread(samples[service_name]))


def _generate_samples(replies: Sequence[Reply]) -> dict[str, list[float]]:
    stamps = [reply["stamps_ms"] for reply in replies]
    samples = {"ttft_ms": [stamp[0] for stamp in stamps], "e2e_ms": [stamp[-1] for stamp in stamps]}
    if len(stamps[0]) > 1:
        samples["tpot_ms"] = [(stamp[-1] - stamp[0]) / (len(stamp) - 1) for stamp in stamps]
        samples["itl_ms"] = [later - earlier for stamp in stamps for earlier, later in pairwise(stamp)]
    return samples


def _summarise_offline(workload: Workload, replies: Sequence[Reply], requests: int, seed: int) -> Outcome:
    unit = _COUNTED[workload.task]
    name = f"{unit}_per_s"
    turn = np.array([(reply[unit], reply["ms"] / 1e3) for reply in replies])
    rate = bootstrap(turn, lambda drawn: drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1), seed)
    done, took = turn.sum(0)
    return Outcome({name: float(done / took)}, {name: rate}, requests, spread(turn[:, 1] / turn[:, 0]))


def percentile(values: ArrayLike, percent: float) -> float:
    """The percentile, linear between order statistics."""
    return float(np.percentile(np.asarray(values, np.float64), percent))


def spread(values: ArrayLike) -> float:
    """(p90 - p10) / p50: how much service times differ among themselves."""
    low, middle, high = np.percentile(np.asarray(values, np.float64), [10, 50, 90])
    return float((high - low) / middle) if middle > 0 else 0.0


def bootstrap(
    values: ArrayLike, statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]], seed: int
) -> Interval:
    """95 % percentile-bootstrap interval (Efron 1979) of ``statistic``.

    ``values`` has one sample per row. ``statistic`` takes the redrawn samples, [resamples, n] or
    [resamples, n, columns], and returns one value per resample.
    """
    data = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    # In blocks, because the samples of a long run times a thousand resamples would be gigabytes.
    block = max(1, 2_000_000 // max(1, data.size))
    drawn = [
        statistic(data[generator.integers(0, len(data), (min(block, RESAMPLES - start), len(data)))])
        for start in range(0, RESAMPLES, block)
    ]
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])  # AUC is not defined on a draw of one label
    return float(low), float(high)


def cpu_ticks(stat: Path = Path("/proc/stat")) -> list[int] | None:
    """The machine's CPU time by state since it started (Linux), None elsewhere."""
    if not stat.exists():
        return None
    return [int(value) for value in stat.read_text().splitlines()[0].split()[1:9]]


def steal_share(before: Sequence[int] | None, after: Sequence[int] | None) -> float | None:
    """Share of CPU time between two `cpu_ticks` that the hypervisor gave to others; None where it cannot be read."""
    if before is None or after is None:
        return None
    spent = [later - earlier for earlier, later in zip(before, after, strict=True)]
    return spent[7] / sum(spent) if sum(spent) else 0.0
