"""Does standard.onnx give the same logits as model.onnx, fed as other runtimes feed it?

Three ways that model.onnx is not run in: every position's logits, a batch that is padded on the left, and a step of
that batch behind its cache, where present is past and one more. The reference is model.onnx, which the rest of the
ladder compares with torch or, quantised, with itself. Knows nothing of how either was made.
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

_ROWS = (5, 1, 17, 12)


def standard_rungs(folder: Path, *, limit: float, seed: int = 0) -> list[Rung]:
    """Every comparison of standard.onnx with model.onnx in ``folder``; CorruptArtifactError when one does not load."""
    config = read_runtime(folder)
    random = np.random.default_rng(seed)
    lengths = [min(length, max(1, config.max_length - 1)) for length in _ROWS]
    rows = [random.integers(0, config.vocab_size, length).tolist() for length in lengths]
    longer = [[*row, int(random.integers(config.vocab_size))] for row in rows]
    asked = rows, longer if config.max_length > 1 else []
    model = Model(folder, replace(config, tasks=("generate",)), load_tokenizer(folder), config.threads)
    expected = [model.logits(rows[0]), *(np.stack(model.batch_logits(batch)) for batch in asked if batch)]
    del model  # closed before the next is opened: each session has its own copy of the weights
    found = _run(folder, config, *asked)
    sizes = ", ".join(map(str, lengths))
    names = f"logits of {lengths[0]}", f"left-padded batch of {sizes}", f"a step behind {sizes}"
    return [
        compare(f"{STANDARD}: {name}", *answers, None, limit)
        for name, answers in zip(names, zip(expected, found, strict=True), strict=False)
    ]


def _run(folder: Path, config: RuntimeConfig, rows: list[list[int]], longer: list[list[int]]) -> list[Floats]:
    """Logits of the first row alone, last ones of all rows in a left-padded batch, and of one more token of each."""
    session = open_session(folder / STANDARD, threads=config.threads, spinning=config.spinning)
    pasts, _ = kv_names(config.layers)

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64], past: Sequence[Floats]) -> list[Floats]:
        inputs = {"input_ids": ids, "attention_mask": mask} | dict(zip(pasts, past, strict=True))
        outputs: list[Floats] = session.run(None, inputs)
        return outputs

    def empty(batch: int) -> list[Floats]:
        heads = [count for count in config.kv_heads for _ in range(2)]
        return [np.zeros((batch, count, 0, config.head_dim), np.float32) for count in heads]

    alone = np.array([rows[0]])
    found = [run(alone, np.ones_like(alone), empty(1))[0][0]]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    logits, *past = run(ids, mask, empty(len(rows)))
    found.append(logits[:, -1])
    if longer:
        tokens = np.array([[row[-1]] for row in longer])
        found.append(run(tokens, np.concatenate([mask, np.ones_like(tokens)], axis=1), past)[0][:, 0])
    return found
