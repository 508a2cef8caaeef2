"""Decides by measuring from how many sequences on a batch steps in the graph of prompts rather than in that of steps.

One row is bound by reading the weights, many are bound by arithmetic, as prompts are: from some number of rows on the
form for prompts is the faster one. Where that is depends on both forms and the machine. The answer goes into the
build's runtime.json. Knows nothing of what the forms are.
"""

import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from slmdeploy.building.chunks import write_prefill
from slmdeploy.building.timing import turns
from slmdeploy.runtime.batching import BatchDecoder
from slmdeploy.runtime.model import Model

_ROWS = (2, 3, 4, 6, 8, 12, 16)
_PROMPT, _WARM_UP, _STEPS = 4, 2, 9
_GAIN = 1.05
"""The other graph has to be faster by this much: it makes a sequence's tokens depend on how many others there are."""


def choose_step_rows(model: Model, folder: Path) -> dict[str, Any] | None:
    """Set from how many rows on steps run in prefill.onnx; medians in ms of both graphs by rows.

    None, and no such number, for a build whose prompts have no graph of their own.
    """
    if not model.runtime.own_prefill or model.runtime.max_length <= _PROMPT + _WARM_UP + _STEPS:
        return None
    timed = {rows: _step_ms(model, rows) for rows in _ROWS}
    chosen = first_that_pays(timed)
    write_prefill(folder, step_rows=chosen)
    table = {str(rows): {"steps": own, "prompts": other} for rows, (own, other) in timed.items()}
    return {"step_rows": chosen, "ms": table}


def first_that_pays(timed: dict[int, tuple[float, float]]) -> int:
    """The smallest number of rows from which on the second of two times is always the shorter one; 0 for none."""
    chosen = 0
    for rows, (own, other) in sorted(timed.items(), reverse=True):
        if other * _GAIN > own:
            break
        chosen = rows
    return chosen


def _step_ms(model: Model, rows: int) -> tuple[float, float]:
    """Milliseconds of a step in the graph of steps and in that of prompts, in turn."""
    random = np.random.default_rng(rows)
    batches = [_batch(model, rows, random, step_rows) for step_rows in (0, 1)]
    times: tuple[list[float], list[float]] = ([], [])
    for counts in turns(_WARM_UP, _STEPS):
        for batch, seconds in zip(batches, times, strict=True):
            tokens = random.integers(0, model.runtime.vocab_size, rows)
            started = time.perf_counter()
            batch.step(tokens)
            elapsed = time.perf_counter() - started
            if counts:
                seconds.append(elapsed)
    own, other = (median(seconds) * 1e3 for seconds in times)
    return own, other


def _batch(model: Model, rows: int, random: np.random.Generator, step_rows: int) -> BatchDecoder:
    """So many sequences behind short prompts; a first step binds the graph that `step_rows` says."""
    decoder, vocabulary = model.decoder, model.runtime.vocab_size
    before = decoder.step_rows
    decoder.step_rows = step_rows
    batch = BatchDecoder(decoder, rows)
    for _ in range(rows):
        batch.admit(random.integers(0, vocabulary, _PROMPT))
    batch.step(random.integers(0, vocabulary, rows))
    decoder.step_rows = before
    return batch
