"""Decides by measuring whether a build scores its items side by side, one thread each, or with all threads at once.

Small models gain little from two threads in one operator, large ones everything; where the two meet depends on the
model, the form of its weights and the machine. The answer goes into the build's runtime.json as `parallel_items`.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from slmdeploy.building.timing import turns
from slmdeploy.runtime.bundle import RUNTIME
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.session import physical_cores

_PREFIX, _ITEMS, _ITEM = 32, 16, 24
_WARM_UP, _ROUNDS, _REPEATS = 1, 5, 3


def choose_lanes(model: Model, folder: Path) -> dict[str, Any] | None:
    """Set `parallel_items` in ``folder``'s runtime.json to what is faster for ``model``; the two medians, in ms.

    One request is 16 items of 24 tokens behind a prefix of 32, less where the context is short. None, and nothing
    changed, for a model that does not score or that has one thread.
    """
    runtime = model.runtime
    threads = runtime.threads or physical_cores()
    if "score" not in model.tasks or threads == 1:
        return None
    candidates = {
        name: Model(folder, replace(runtime, parallel_items=parallel), model.tokenizer, threads)
        for name, parallel in (("in_one_ms", False), ("in_lanes_ms", True))
    }
    prefix, items = _request(runtime.vocab_size, runtime.max_length)
    draw = np.random.default_rng(1)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for counts in turns(_WARM_UP, _ROUNDS):
        for name, candidate in candidates.items():
            # A scorer keeps the last prefix ready, so each is another. The first call of a turn meets threads of the
            # other side that still spin.
            prefixes = draw.integers(0, runtime.vocab_size, (1 + _REPEATS, prefix)).tolist()
            seconds = [_seconds(candidate, one, items) for one in prefixes][1:]
            times[name] += seconds if counts else []
    medians = {name: median(seconds) * 1e3 for name, seconds in times.items()}
    chosen = medians["in_lanes_ms"] < medians["in_one_ms"]
    settings = json.loads((folder / RUNTIME).read_text(encoding="utf-8"))
    settings["session"]["parallel_items"] = chosen
    (folder / RUNTIME).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return medians | {"parallel_items": chosen}


def _request(vocab_size: int, room: int) -> tuple[int, list[list[int]]]:
    """The length of the prefix, and the items."""
    ids = np.random.default_rng(0).integers(0, vocab_size, room).tolist()
    item = min(_ITEM, room // 4)
    return min(_PREFIX, room // 4), [ids[i : i + item] for i in range(_ITEMS)]


def _seconds(model: Model, prefix: Sequence[int], items: Sequence[Sequence[int]]) -> float:
    started = time.perf_counter()
    model.score_ids(prefix, items)
    return time.perf_counter() - started
