"""Rounds of interleaved timing: as many as are asked for, fewer where the candidates are slow.

Builds time a handful of choices (lanes, pieces of prompts, rows of steps); for a small model each takes a second, for a
large one on a slow machine minutes, and the difference between choices is then so large that few rounds show it.
"""

import time
from collections.abc import Iterator

from slmdeploy.runtime.model import Model

_SECONDS = 10.0
_LEAST = 3


def turns(warm_up: int, rounds: int) -> Iterator[bool]:
    """For each turn whether it counts: not for `warm_up`, then for `rounds`, or for 3 that take more than 10 s."""
    for _ in range(warm_up):
        yield False
    started = time.perf_counter()
    for done in range(rounds):
        if done >= _LEAST and time.perf_counter() - started > _SECONDS:
            return
        yield True


def generation_seconds(model: Model, prompt: list[int], steps: int) -> tuple[float, float]:
    """Seconds from the prompt to the first token, and of ``steps`` tokens behind it."""
    started = time.perf_counter()
    stream = model.generate_ids(prompt, max_new_tokens=steps + 1, ignore_eos=True)
    next(stream)
    first = time.perf_counter()
    for _ in stream:
        pass
    return first - started, time.perf_counter() - first
