"""What is measured: each case is a name, a unit, which way is better, and how a running engine is asked for it.

Prompts are seeded by model, case and round, so every engine gets the same ones, and within a process no prompt comes
twice: a cache of prompts cannot answer. Knows engines only as clients that reply to ops (worker.py).
"""

import random
import statistics
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.peers.shapes import Shape
from slmdeploy.profiling.process import Client

PREFIX_TOKENS, ITEMS, ITEM_TOKENS = 512, 32, 16
_NAIVE_ITEMS = 2
"""Items that are scored naively, each with its prefix, before the rate is taken: more only take longer."""


class Missing(Exception):  # noqa: N818  # a result like any other
    """The engine does not offer the case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One column. ``measure`` gives the value of one repetition; a round's value is the median of ``repeats``.

    Without ``measure`` it is a figure of every process: what loading took, its memory, the size of its files. With
    ``threads`` it is measured in a process of its own, opened with so many.
    """

    name: str
    title: str
    unit: str
    better: Literal["lower", "higher"]
    measure: Callable[[Client, Shape, random.Random], float] | None = None
    repeats: int = 3
    models: Literal["decoder", "encoder", "both"] = "decoder"
    ours_only: bool = False
    threads: int | None = None

    def applies(self, shape: Shape, ours: bool) -> bool:
        """Whether the cell exists for a model and one of our engines, or a peer."""
        kinds = ("decoder", "both") if shape.is_decoder else ("encoder", "both")
        return self.models in kinds and (ours or not self.ours_only)


def seeded(*parts: object) -> random.Random:
    """A generator that depends on ``parts`` and on nothing of the process."""
    return random.Random(zlib.crc32("|".join(map(str, parts)).encode()))


def tokens(rng: random.Random, shape: Shape, count: int) -> list[int]:
    """Random ids, none of them special."""
    return [rng.randrange(2, shape.config["vocab_size"]) for _ in range(count)]


def ask(client: Client, op: str, **fields: Any) -> dict[str, Any]:
    """The engine's reply; Missing where it says that it has none."""
    reply = client.ask(op, **fields)
    if "missing" in reply:
        raise Missing(reply["missing"])
    return reply


def _stamps(client: Client, shape: Shape, rng: random.Random, rows: int, length: int, new: int) -> list[float]:
    prompts = [tokens(rng, shape, length) for _ in range(rows)]
    return list(ask(client, "generate", prompts=prompts, new_tokens=new)["stamps_ms"])


def _until_first(length: int) -> Callable[[Client, Shape, random.Random], float]:
    return lambda client, shape, rng: _stamps(client, shape, rng, 1, length, 1)[-1]


def _decode(rows: int, new: int) -> Callable[[Client, Shape, random.Random], float]:
    def measure(client: Client, shape: Shape, rng: random.Random) -> float:
        stamps = _stamps(client, shape, rng, rows, 128, new)
        return rows * (new - 1) / (stamps[-1] - stamps[0]) * 1e3

    return measure


def request(client: Client, shape: Shape, rng: random.Random) -> float:
    """Milliseconds of the balanced request: 512 tokens in, 64 out."""
    return _stamps(client, shape, rng, 1, 512, 64)[-1]


def _score_ms(client: Client, shape: Shape, rng: random.Random, items: int, hot: bool) -> float:
    prefix = tokens(rng, shape, PREFIX_TOKENS)
    rows = [tokens(rng, shape, ITEM_TOKENS) for _ in range(items)]
    return float(ask(client, "score", prefix_ids=prefix, items=rows, hot=hot)["ms"])


def _per_second(items: int, hot: bool) -> Callable[[Client, Shape, random.Random], float]:
    return lambda client, shape, rng: items / _score_ms(client, shape, rng, items, hot) * 1e3


def _naive(client: Client, shape: Shape, rng: random.Random) -> float:
    length = PREFIX_TOKENS + ITEM_TOKENS
    total = sum(_stamps(client, shape, rng, 1, length, 1)[-1] for _ in range(_NAIVE_ITEMS))
    return _NAIVE_ITEMS / total * 1e3


def _encode(rows: int) -> Callable[[Client, Shape, random.Random], float]:
    def measure(client: Client, shape: Shape, rng: random.Random) -> float:
        return float(ask(client, "encode", rows=[tokens(rng, shape, 128) for _ in range(rows)])["ms"])

    return measure


def _sequences(rows: int) -> Callable[[Client, Shape, random.Random], float]:
    encode = _encode(rows)
    return lambda client, shape, rng: rows / encode(client, shape, rng) * 1e3


CASES = (
    Case("ttft_128", "TTFT 128", "ms", "lower", _until_first(128)),
    Case("ttft_512", "TTFT 512", "ms", "lower", _until_first(512)),
    Case("ttft_2048", "TTFT 2k", "ms", "lower", _until_first(2048), repeats=1),
    Case("ttft_8000", "TTFT 8k", "ms", "lower", _until_first(8000), repeats=1),
    Case("decode_1", "decode, batch 1", "tok/s", "higher", _decode(1, 64), repeats=2),
    Case("decode_8", "decode, batch 8", "tok/s", "higher", _decode(8, 32), repeats=1),
    Case("ttft_512_t1", "TTFT 512, one thread", "ms", "lower", _until_first(512), repeats=2, threads=1),
    Case("decode_1_t1", "decode, batch 1, one thread", "tok/s", "higher", _decode(1, 64), repeats=1, threads=1),
    Case("balanced", "512 in + 64 out", "ms", "lower", request, repeats=1),
    Case("score_cold", "score 512 + 32×16, cold", "items/s", "higher", _per_second(ITEMS, False), repeats=1),
    Case("score_hot", "score 512 + 32×16, hot", "items/s", "higher", _per_second(ITEMS, True), repeats=1),
    Case("score_hot_one", "score 512 + 1×16, hot", "ms", "lower",
         lambda client, shape, rng: _score_ms(client, shape, rng, 1, True)),
    Case("score_naive", "score, the prefix anew for each item", "items/s", "higher", _naive, repeats=1, ours_only=True),
    Case("encode_1", "length 128, batch 1, p50", "ms", "lower", _encode(1), repeats=20, models="encoder"),
    Case("encode_8", "length 128, batch 8", "seq/s", "higher", _sequences(8), models="encoder"),
    Case("encode_32", "length 128, batch 32", "seq/s", "higher", _sequences(32), repeats=1, models="encoder"),
    Case("rss", "peak memory of one request", "MB", "lower", models="both"),
    Case("load", "load, first answer included", "s", "lower", models="both"),
    Case("size", "files", "MB", "lower", models="both"),
)  # fmt: skip


def measure(case: Case, client: Client, shape: Shape, round_: int) -> list[float]:
    """The repetitions of a case in one process. Raises Missing."""
    assert case.measure is not None, "the figures of every process come from settle()"
    return [case.measure(client, shape, seeded(shape.name, case.name, round_, i)) for i in range(case.repeats)]


def settle(client: Client, shape: Shape, round_: int) -> tuple[float, int | None]:
    """Bring a fresh engine to speed: milliseconds to its first answer, and peak memory after one request.

    The request is the balanced one, or a batch of 8 for an encoder; what comes later (batches, 2k, scoring) is not in
    the memory. An engine that opens something of its own for scores has done so when this returns.
    """
    rng = seeded(shape.name, "settle", round_)
    if shape.is_decoder:
        first = _stamps(client, shape, rng, 1, 8, 1)[-1]
        request(client, shape, rng)
    else:
        first = _encode(1)(client, shape, rng)
        _encode(8)(client, shape, rng)
    peak = ask(client, "rss")["peak_bytes"]
    if shape.is_decoder:
        _open_scoring(client)
    return first, peak


def _open_scoring(client: Client) -> None:
    """Let an engine open what it scores with, if it does: that is no part of a request."""
    with suppress(Missing):
        ask(client, "score", prefix_ids=[3, 4], items=[[5]], hot=False)


def value_of(repetitions: list[float]) -> float:
    """A round's value."""
    return statistics.median(repetitions)
