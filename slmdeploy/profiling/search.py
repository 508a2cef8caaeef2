"""Finds the session options under which a build answers fastest: threads, whether they spin, how prompts are cut.

`build` chooses them for a general prompt and its steps; here they are chosen for the workloads that will be served and
on the machine that will serve them. Successive halving (Jamieson and Talwalkar 2016): all answer a few requests, the
slower half leaves, the rest answer twice as many, until one is left; what the build says itself is kept unless another
is faster by a margin. First threads and spinning, then the pieces of prompts, then how many requests are taken together
where many wait. Knows nothing of engines: options become arguments of a worker (worker.py).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from slmdeploy.profiling import load
from slmdeploy.profiling.process import Client
from slmdeploy.specs import Workload

_FIRST_REQUESTS = 3
_MARGIN = 1.05
"""How much faster than the build's own options others have to be: noise must not decide."""
_CHUNKS = (0, 64, 128, 256, 512)
_SHORTEST_PROMPT = 64
"""Prompts up to this are not worth cutting."""
_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Options:
    """Session options, None leaves one to the build. ``batch``: requests taken together, None as the workload says."""

    threads: int | None = None
    spinning: bool | None = None
    prefill_chunk: int | None = None
    batch: int | None = None

    def arguments(self) -> list[str]:
        """As arguments of worker.py."""
        given = {"--threads": self.threads, "--spinning": self.spinning, "--prefill-chunk": self.prefill_chunk}
        return [word for name, value in given.items() if value is not None for word in (name, str(int(value)))]


Open = Callable[[Options], AbstractContextManager[Client]]


@dataclass(frozen=True)
class Found:
    """The options that won, and every comparison: cost is the time over that of the build's own options."""

    options: Options
    compared: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"options": asdict(self.options), "compared": list(self.compared)}


def search(
    open_client: Open,
    workloads: Sequence[Workload],
    *,
    cores: int,
    cuts_prompts: bool,
    takes_batches: bool,
    vocab_size: int,
    seed: int,
    done: Callable[[], None] = lambda: None,
) -> Found:
    """The best options of one build under ``workloads`` on at most ``cores`` threads.

    ``cuts_prompts`` says whether the build can run a prompt in pieces, ``takes_batches`` whether it can run several
    requests together. ``done`` is called after each client's turn.
    """
    compared: list[dict[str, Any]] = []

    def best_of(options: Sequence[Options]) -> Options:
        return _halve(open_client, options, workloads, vocab_size, seed, compared, done)

    counts = [2**power for power in range(cores.bit_length()) if 2**power <= cores]
    threads = sorted({*counts, cores})
    chosen = best_of([Options(), *(Options(count, spins) for count in threads for spins in (True, False))])
    longest = max((one.prompt_tokens or 0 for one in workloads if one.task == "generate"), default=0)
    if cuts_prompts and longest > _SHORTEST_PROMPT:
        chunks = [chunk for chunk in _CHUNKS if chunk < longest]
        chosen = best_of([chosen, *(replace(chosen, prefill_chunk=chunk) for chunk in chunks)])
    waiting = [workload for workload in workloads if is_batched(workload)]
    if takes_batches and waiting:
        with open_client(chosen) as client:
            chosen = replace(chosen, batch=_best_batch(client, waiting, vocab_size, seed, compared))
        done()
    return Found(chosen, tuple(compared))


def is_batched(workload: Workload) -> bool:
    """Whether many requests of it wait at once, none of which is hurt by being taken together with others."""
    return workload.task != "score" and workload.scenario in ("offline", "concurrent")


def _best_batch(
    client: Client, workloads: Sequence[Workload], vocab_size: int, seed: int, compared: list[dict[str, Any]]
) -> int:
    """The smallest batch that no larger one beats in requests per second by the margin."""
    rates: dict[int, float] = {}
    for batch in _BATCHES:
        logs = 0.0
        for workload in workloads:
            requests = load.requests(workload, 2 * batch, vocab_size=vocab_size, seed=[seed, batch])
            arrivals = [0.0] * len(requests)
            options = {"concurrency": 1, "batch": batch, "limit_s": 3600.0}
            reply = client.ask("drive", requests=requests, arrivals=arrivals, **options)
            # The first batch binds buffers and wakes threads; the second counts.
            begins = sorted(record["begin_s"] for record in reply["records"])
            ends = max(record["end_s"] for record in reply["records"])
            logs += math.log(batch / max(ends - begins[batch], 1e-9)) / len(workloads)
        rates[batch] = math.exp(logs)
        compared.append({"batch": batch, "requests": 2 * batch, "cost": rates[1] / rates[batch]})
    return next(batch for batch in _BATCHES if all(rates[batch] * _MARGIN >= rate for rate in rates.values()))


def _halve(
    open_client: Open,
    options: Sequence[Options],
    workloads: Sequence[Workload],
    vocab_size: int,
    seed: int,
    compared: list[dict[str, Any]],
    done: Callable[[], None],
) -> Options:
    """The first of ``options`` unless another one is faster by the margin."""
    own, left, count = options[0], list(options), _FIRST_REQUESTS
    with ExitStack() as stack:
        clients = {one: stack.enter_context(open_client(one)) for one in options}
        while len(left) > 1:
            # The build's own options are asked in every rung: each is measured against them at the same moment.
            costs = _costs(
                {one: clients[one] for one in {own: None, **dict.fromkeys(left)}},
                workloads,
                count,
                vocab_size,
                seed,
                done,
            )
            compared += [
                {**asdict(one), "requests": count, "cost": costs[one] / costs[own]} for one in left if one != own
            ]
            left = sorted(left, key=lambda one: costs[one])[: max(1, len(left) // 2)]
            count *= 2
    return left[0] if costs[left[0]] * _MARGIN < costs[own] else own


def _costs(
    clients: dict[Options, Client],
    workloads: Sequence[Workload],
    count: int,
    vocab_size: int,
    seed: int,
    done: Callable[[], None],
) -> dict[Options, float]:
    """The geometric mean over workloads of the median time of a request, in seconds, interleaved by request."""
    logs = dict.fromkeys(clients, 0.0)
    for workload in workloads:
        requests = load.requests(workload, count + 1, vocab_size=vocab_size, seed=[seed, count])
        times: dict[Options, list[float]] = {one: [] for one in clients}
        for number, request in enumerate(requests):
            for one, client in clients.items():
                reply = client.ask("drive", requests=[request], arrivals=None, concurrency=1, batch=1, limit_s=3600.0)
                if number:  # the first one wakes threads and brings weights into the caches
                    times[one].append(reply["records"][0]["end_s"] - reply["records"][0]["begin_s"])
        for one, seconds in times.items():
            logs[one] += math.log(max(median(seconds), 1e-9)) / len(workloads)
    for _ in clients:
        done()
    return {one: math.exp(value) for one, value in logs.items()}
