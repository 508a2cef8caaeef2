"""Decides by measuring on how many threads a build runs, and whether they spin while they wait for one another.

More threads help until the parts of an operator are shorter than the time to hand them out; where that is depends on
the model, its form and the machine. Spinning threads answer at once but hold their cores between operators. The answer
goes into the build's runtime.json. Knows nothing of what a build is made of.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from slmdeploy.building.timing import generation_seconds, turns
from slmdeploy.runtime.bundle import RUNTIME
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.session import physical_cores
from slmdeploy.specs import SessionOptions

_PROMPT, _STEPS = 128, 32
_WARM_UP, _ROUNDS = 1, 7
_GAIN = 1.1
"""Another choice than all cores, spinning, has to be faster by this much: noise must not decide."""
Options = tuple[int, bool]
"""Threads, 0 for one on every core, and spinning."""


def choose_session(model: Model, folder: Path, wanted: SessionOptions) -> dict[str, Any] | None:
    """Set threads and spinning in ``folder``'s runtime.json to what is fastest for ``model``; what was measured.

    Compared are all cores with 1, 2, 4, … threads, and the winner with threads that do not spin, by the geometric mean
    of a prompt's time (128 tokens, or a half of the context) and that of 32 steps. None, and nothing changed, where
    the profile says either, or on one core.
    """
    cores = physical_cores()
    if wanted.model_fields_set or cores == 1:
        return None
    chosen: Options = (0, True)
    measured: list[dict[str, Any]] = []
    for threads in (2**i for i in range((cores - 1).bit_length())):
        chosen = _better(model, folder, chosen, (threads, True), measured)
    chosen = _better(model, folder, chosen, (chosen[0], False), measured)
    settings = json.loads((folder / RUNTIME).read_text(encoding="utf-8"))
    settings["session"] |= {"threads": chosen[0], "spinning": chosen[1]}
    (folder / RUNTIME).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return {"threads": chosen[0], "spinning": chosen[1], "cores": cores, "compared": measured}


def _better(model: Model, folder: Path, first: Options, second: Options, measured: list[dict[str, Any]]) -> Options:
    """The second options if they are faster by enough, else the first; ``measured`` gets the ratios of their times."""
    sides = [
        Model(folder, replace(model.runtime, spinning=spinning), model.tokenizer, threads)
        for threads, spinning in (first, second)
    ]
    times: tuple[list[tuple[float, float]], ...] = ([], [])
    random = np.random.default_rng(0)
    for counts in turns(_WARM_UP, _ROUNDS):
        ids = random.integers(0, model.runtime.vocab_size, min(_PROMPT, model.runtime.max_length // 2)).tolist()
        for side, seconds in zip(sides, times, strict=True):
            found = generation_seconds(side, ids, _STEPS)
            if counts:
                seconds.append(found)
    (prompt, steps), (other_prompt, other_steps) = (map(median, zip(*one, strict=True)) for one in times)
    ratios = other_prompt / prompt, other_steps / steps
    measured.append(
        {"threads": second[0], "spinning": second[1], "prompt_ratio": ratios[0], "steps_ratio": ratios[1],
         "against": {"threads": first[0], "spinning": first[1]}}
    )  # fmt: skip
    return second if math.sqrt(ratios[0] * ratios[1]) * _GAIN < 1 else first
