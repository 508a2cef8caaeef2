"""Does standard.onnx give the same logits as model.onnx, fed as other runtimes feed it?

Ways that model.onnx is not run in: every position's logits, batches that are padded on the left (transformers) or on
the right (onnxruntime-genai), and a step of each behind its cache, where present is past and one more. The reference is
model.onnx, which the rest of the ladder compares with torch or, quantised, with itself. Knows nothing of how either was
made.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slmdeploy.building.ladder import Floats, Rung, compare
from slmdeploy.building.standard_graph import STANDARD
from slmdeploy.runtime.bundle import RuntimeConfig, read_runtime
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.session import kv_names, open_session
from slmdeploy.runtime.text import load_tokenizer

Ids = NDArray[np.int64]
_ROWS = (5, 1, 17, 12)
_SIDES = ("left", "right")


def standard_rungs(folder: Path, *, limit: float, seed: int = 0) -> list[Rung]:
    """Every comparison of standard.onnx with model.onnx in ``folder``; CorruptArtifactError when one does not load."""
    config = read_runtime(folder)
    random = np.random.default_rng(seed)
    lengths = [min(length, max(1, config.max_length - 1)) for length in _ROWS]
    rows = [random.integers(0, config.vocab_size, length) for length in lengths]
    following = random.integers(0, config.vocab_size, (len(rows), 1))
    steps = config.max_length > 1
    # standard.onnx is made of model.onnx: where prompts have a graph in another form, that is not asked here.
    asked = replace(config, tasks=("generate",), own_prefill=False)
    model = Model(folder, asked, load_tokenizer(folder), config.threads)
    alone = model.logits(rows[0].tolist())
    last = np.stack(model.batch_logits([row.tolist() for row in rows]))
    longer = [[*row.tolist(), int(token)] for row, (token,) in zip(rows, following, strict=True)]
    behind = np.stack(model.batch_logits(longer)) if steps else None
    del model  # closed before the next is opened: each session has its own copy of the weights
    standard = _Standard(folder, config)

    def rung(name: str, expected: Floats, found: Floats) -> Rung:
        return compare(f"{STANDARD}: {name}", expected, found, None, limit)

    found, _ = standard.run(rows[0][None], np.ones((1, rows[0].size), np.int64))
    rungs = [rung(f"logits of {lengths[0]}", alone, found[0])]
    for side in _SIDES:
        ids, mask = _padded(rows, side)
        found, past = standard.run(ids, mask)
        ends = [-1 if side == "left" else row.size - 1 for row in rows]
        rungs.append(rung(f"{side}-padded batch", last, found[np.arange(len(rows)), ends]))
        if behind is not None:
            found, _ = standard.run(following, np.concatenate([mask, np.ones_like(following)], axis=1), past)
            rungs.append(rung(f"step behind {side} padding", behind, found[:, 0]))
    return rungs


class _Standard:
    """standard.onnx as it is driven by what knows of no other inputs."""

    def __init__(self, folder: Path, config: RuntimeConfig) -> None:
        self._session = open_session(folder / STANDARD, threads=config.threads, spinning=config.spinning)
        self._names, _ = kv_names(config.layers)
        self._heads = [count for count in config.kv_heads for _ in range(2)]
        self._dim = config.head_dim

    def run(self, ids: Ids, mask: Ids, past: Sequence[Floats] | None = None) -> tuple[Floats, list[Floats]]:
        """Logits [batch, sequence, vocabulary], and the present of each layer."""
        past = past or [np.zeros((len(ids), count, 0, self._dim), np.float32) for count in self._heads]
        inputs = {"input_ids": ids, "attention_mask": mask} | dict(zip(self._names, past, strict=True))
        logits, *present = self._session.run(None, inputs)
        return logits, present


def _padded(rows: Sequence[Ids], side: str) -> tuple[Ids, Ids]:
    """Ids and mask [rows, width] with each row at one side."""
    ids, mask = np.zeros((2, len(rows), max(row.size for row in rows)), np.int64)
    for i, row in enumerate(rows):
        place = slice(-row.size, None) if side == "left" else slice(0, row.size)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask
