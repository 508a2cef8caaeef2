"""Decides by measuring in how many tokens at a time a build runs its prompts.

A whole prompt at once computes attention that is then masked and passes activations through memory; small pieces read
the weights more often. Where the two meet depends on the model, the form of its weights and the machine. The answer
goes into the build's runtime.json. Graphs whose rotary embedding depends on the length of the sequence run whole
prompts, because the first piece would take the frequencies of a shorter one.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.ladder import SELF_LIMIT, compare
from slmdeploy.building.timing import turns
from slmdeploy.runtime.bundle import RUNTIME
from slmdeploy.runtime.decoding import GRAPH
from slmdeploy.runtime.model import Model

_CHUNKS = (0, 512, 256, 128, 64)
_PROMPT = 512
_SHORTEST = 128
"""Prompts below it are one piece anyway."""
_WARM_UP, _ROUNDS = 1, 9
_TIE = 1.03
"""A smaller piece that is slower by less is taken: it needs less memory."""
_COMPUTED_TABLES = "rope"
"""How the names of the nodes begin that make rotary tables from the sequence's length; constant tables have none."""


def choose_chunk(model: Model, folder: Path) -> dict[str, Any] | None:
    """Set the piece in which ``folder``'s prompts run to what is fastest for ``model``; medians in ms by piece.

    A prompt of 512 tokens, or of the context. None, and whole prompts, where pieces cannot be used or do not matter;
    whole prompts, too, where the pieces give other logits than the whole does (`parity` says).
    """
    runtime = model.runtime
    length = min(_PROMPT, runtime.max_length)
    if length < _SHORTEST or runtime.interface != "shared" or not may_be_cut(folder):
        return None
    ids = np.random.default_rng(0).integers(0, runtime.vocab_size, length).tolist()
    medians = _medians(model, ids, [chunk for chunk in _CHUNKS if chunk < length])
    best = min(medians.values())
    fastest = min((chunk for chunk, ms in medians.items() if ms <= best * _TIE), key=lambda chunk: chunk or length)
    whole, pieces = (_prefilled(model, ids, chunk) for chunk in (0, fastest))
    rung = compare("prompt in pieces", whole, pieces, None, SELF_LIMIT)
    chosen = fastest if rung.passed else 0
    model.decoder.prefill_chunk = chosen
    write_prefill(folder, chunk=chosen)
    times = {str(chunk or "whole"): ms for chunk, ms in medians.items()}
    return {"chunk": chosen, "prompt_tokens": length, "ms": times, "parity": rung.as_dict()}


def write_prefill(folder: Path, **changes: int) -> None:
    """Change what ``folder``'s runtime.json says of how prompts run."""
    settings = json.loads((folder / RUNTIME).read_text(encoding="utf-8"))
    settings["prefill"] = {"chunk": 0, "own_graph": False, "step_rows": 0} | settings.get("prefill", {}) | changes
    (folder / RUNTIME).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def may_be_cut(folder: Path) -> bool:
    """Whether a prompt gives the same in pieces as at once: not where rotation depends on the sequence's length."""
    return not any((node.name or "").startswith(_COMPUTED_TABLES) for node in ir.load(folder / GRAPH).graph)


def _medians(model: Model, ids: list[int], chunks: list[int]) -> dict[int, float]:
    """Milliseconds of the prompt by chunk, from interleaved rounds."""
    times: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    for counts in turns(_WARM_UP, _ROUNDS):
        for chunk, seconds in times.items():
            elapsed = _seconds(model, ids, chunk)
            if counts:
                seconds.append(elapsed)
    return {chunk: median(seconds) * 1e3 for chunk, seconds in times.items()}


def _seconds(model: Model, ids: list[int], chunk: int) -> float:
    model.decoder.prefill_chunk = chunk
    started = time.perf_counter()
    model.prefill(ids)
    return time.perf_counter() - started


def _prefilled(model: Model, ids: list[int], chunk: int) -> npt.NDArray[np.float32]:
    model.decoder.prefill_chunk = chunk
    return model.prefill(ids)[None]
