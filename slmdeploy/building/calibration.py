"""Ranges for static quantisation: what the linear layers of a graph are fed on some text, and how much of it to cover.

Runs the fp32 graph with the inputs of its linear layers as further outputs and counts their values, by float16 number,
so that memory does not grow with the text. A range that covers the largest value makes the steps of all others coarse:
of ranges shrunk from the whole one by and by, the one of least squared error is taken. Works for decoders of the
`shared` interface; knows nothing of profiles or of what is done with a range.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slmdeploy.building.onnxruntime import MODEL, read_model, write_models
from slmdeploy.building.quantize import EMBEDDING, parts
from slmdeploy.building.static_w8a8 import Range
from slmdeploy.runtime.bundle import RuntimeConfig, read_runtime
from slmdeploy.runtime.session import kv_names, open_session

Counts = npt.NDArray[np.int64]
_LARGEST = np.float32(np.finfo(np.float16).max)
_SHRINKS = np.geomspace(1, 0.02, 48)


def calibrate(graph: Path, sequences: Sequence[Sequence[int]]) -> dict[str, Range]:
    """The range of each value that linear layers of the graph folder ``graph`` read, by the value's name.

    ``sequences`` are token ids, each run from its beginning.
    """
    model = read_model(graph)
    read = [node.inputs[0] for name, node in parts(model).items() if name != EMBEDDING]
    model.graph.outputs[:] = list(dict.fromkeys(value for value in read if value is not None))
    names = [value.name or "" for value in model.graph.outputs]
    counts = {name: np.zeros(1 << 16, np.int64) for name in names}
    runtime = read_runtime(graph)
    with tempfile.TemporaryDirectory(prefix="slmdeploy-calibration-") as folder:
        write_models({MODEL: model}, Path(folder))
        session = open_session(Path(folder) / MODEL, threads=runtime.threads, spinning=False)
        taken = {node.name for node in session.get_inputs()}
        for sequence in sequences:
            feeds = {name: feed for name, feed in _feeds(runtime, sequence).items() if name in taken}
            for name, output in zip(names, session.run(names, feeds), strict=True):
                halves = np.clip(output, -_LARGEST, _LARGEST).astype(np.float16)
                counts[name] += np.bincount(halves.view(np.uint16).ravel(), minlength=1 << 16)
    return {name: best_range(found) for name, found in counts.items()}


def _feeds(runtime: RuntimeConfig, sequence: Sequence[int]) -> dict[str, npt.NDArray[np.generic]]:
    length = len(sequence)
    heads = (heads for heads in runtime.kv_heads for _ in range(2))
    past = {
        name: np.zeros((1, count, length, runtime.head_dim), np.float32)
        for name, count in zip(kv_names(runtime.layers)[0], heads, strict=True)
    }
    return {
        "input_ids": np.array([sequence], np.int64),
        "attention_mask": np.ones((1, length), np.int64),
        "logits_positions": np.arange(length),
        **past,
    }


def best_range(counts: Counts) -> Range:
    """The range of least mean squared error over values counted by the bits of their float16 number, int64 [65536]."""
    seen = np.flatnonzero(counts)
    values = seen.astype(np.uint16).view(np.float16).astype(np.float64)
    weights = counts[seen].astype(np.float64)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    candidates = [Range.spanning(low * shrink, high * shrink) for shrink in _SHRINKS.tolist()]
    return min(candidates, key=lambda found: float(weights @ np.square(found.rounded(values) - values)))
