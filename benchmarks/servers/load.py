"""One cell: a server under a workload of Poisson arrivals, and what its requests saw.

Requests, arrivals and statistics are the profiler's (slmdeploy/profiling). Prompts are ids of tokens, or letters where
a server takes text only: in the comparison's tokenizer a letter is a token. Knows servers by their rows alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.servers.catalogue import ServerRow
from slmdeploy.profiling import load
from slmdeploy.profiling.arrivals import poisson
from slmdeploy.profiling.live_client import LiveClient
from slmdeploy.profiling.live_http import Server, answer
from slmdeploy.profiling.summary import RAMP, Turn, turn_of
from slmdeploy.specs import Workload

_OVERLOAD = 1.5
_SLACK_S = 3.0
"""A cell ends so long after so many times the span of its arrivals."""
_FOR_A_P99 = 100
_ITEMS_TOGETHER = 8
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
Request = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What a load showed: the turn, the reasons of requests without an answer, and the seconds that a cell may take.

    Answers in many parts are waited for beyond those.
    """

    turn: Turn
    failures: tuple[str, ...]
    limit_s: float

    @property
    def kept_up(self) -> bool:
        """Whether nearly every request was answered within the cell's time: beyond, more load shows nothing new."""
        return self.turn.answered >= 0.9 * self.turn.requests and self.turn.wall_s <= self.limit_s


def letters(ids: Sequence[int]) -> str:
    """A text of as many tokens as there are ids."""
    return "".join(_LETTERS[token % len(_LETTERS)] for token in ids)


def made(row: ServerRow, request: Request) -> Request:
    """A request of load.py as the server takes it."""
    form: Callable[[Sequence[int]], Any] = list if row.prompts == "ids" else letters
    if request["op"] == "generate":
        return {"op": "generate", "prompt": form(request["prompt_ids"]), "new_tokens": request["new_tokens"]}
    if row.scoring == "score":
        items = [letters(item) for item in request["item_ids"]]
        return {"op": "score", "prefix": letters(request["prefix_ids"]), "items": items}
    prompts = [form([*request["prefix_ids"], *item]) for item in request["item_ids"]]
    return {"op": "items", "prompts": prompts}


def send(server: Server, pool: ThreadPoolExecutor, request: Request, left_s: float) -> Request:
    """Send a request; items of a server without /score are completions of one token, several at a time."""
    if request["op"] != "items":
        return answer(server, request, "generate" if request["op"] == "generate" else "score", left_s)
    asked = [{"op": "generate", "prompt": prompt, "new_tokens": 1} for prompt in request["prompts"]]
    for _ in pool.map(lambda one: answer(server, one, "generate", left_s), asked):
        pass
    return {}


def least_requests(rounds: int) -> int:
    """Requests of a cell of which so many rounds, without the beginning of each, are enough for a 99th percentile."""
    count = -(-_FOR_A_P99 // rounds)
    while rounds * (count - int(RAMP * count)) < _FOR_A_P99:
        count += 1
    return count


def run_cell(row: ServerRow, server: Server, workload: Workload, vocab_size: int, round_: int, count: int) -> Cell:
    """Send a server so many requests; the same round gives every server the same requests and times."""
    assert workload.rate_per_s is not None, "cells are of scenario server"
    requests = load.requests(workload, count, vocab_size=vocab_size, seed=(round_, 0))
    arrivals = poisson(workload.rate_per_s, count, [round_, count])
    with ThreadPoolExecutor(_ITEMS_TOGETHER) as pool:
        client = LiveClient(
            lambda request, left_s: send(server, pool, request, left_s), lambda request: made(row, request)
        )
        limit_s = _OVERLOAD * arrivals[-1] + _SLACK_S
        fields = {"requests": requests, "arrivals": arrivals, "concurrency": 1, "batch": 1, "limit_s": limit_s}
        records = client.ask("drive", **fields)["records"]
    turn = turn_of(workload, requests, records)
    turn.samples.pop("queue_ms", None)
    return Cell(turn, tuple(dict.fromkeys(client.failures)), limit_s)


def warm_up(row: ServerRow, server: Server, workload: Workload, vocab_size: int) -> None:
    """Two requests that do not count, one behind the other. Raises UnansweredError where the server cannot do it."""
    with ThreadPoolExecutor(_ITEMS_TOGETHER) as pool:
        for request in load.requests(workload, 2, vocab_size=vocab_size, seed=(1 << 20)):
            send(server, pool, made(row, request), 300.0)
