"""What the linear layers of a graph are fed on some text: ranges for static quantisation, second moments for GPTQ.

Runs the fp32 graph with the inputs of its linear layers as its outputs. Ranges: values are counted by float16 number,
so that memory does not grow with the text. A range that covers the largest value makes the steps of all others coarse:
of ranges shrunk from the whole one by and by, the one of least squared error is taken. Works for decoders that
ONNX Runtime runs; knows nothing of profiles or of what is done with its figures.
"""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.onnxruntime import MODEL, read_model, write_models
from slmdeploy.building.quantize import EMBEDDING, parts
from slmdeploy.building.smooth import Inputs
from slmdeploy.building.static_w8a8 import Range
from slmdeploy.runtime.bundle import RuntimeConfig, read_runtime
from slmdeploy.runtime.session import kv_names, open_session

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Sequences = Sequence[Sequence[int]]
_LARGEST = np.float32(np.finfo(np.float16).max)
_SHRINKS = np.geomspace(1, 0.02, 48)
_SAMPLED_ROWS = 128
_MOMENT_BYTES = 2 << 30
"""Second moments that are held at once: a wide model runs the text several times instead."""


def calibrate(graph: Path, sequences: Sequences) -> dict[str, Range]:
    """The range of each value that linear layers of the graph folder ``graph`` read, by the value's name.

    ``sequences`` are token ids, each run from its beginning.
    """
    return {name: best_range(found) for name, found in count(graph, sequences).items()}


def count(graph: Path, sequences: Sequences, besides: Sequence[str] = ()) -> dict[str, Counts]:
    """How often each float16 number, by its bits, stands in each value that linear layers read: int64 [65536] by name.

    A magnitude beyond float16's counts as its largest. ``besides``: names of further values to count.
    """
    counts = {name: np.zeros(1 << 16, np.int64) for name in (*_widths(graph), *besides)}
    for name, rows in _fed(graph, sequences, list(counts)):
        halves = np.clip(rows, -_LARGEST, _LARGEST).astype(np.float16)
        counts[name] += np.bincount(halves.view(np.uint16).ravel(), minlength=1 << 16)
    return counts


def inputs_of(graph: Path, sequences: Sequences) -> dict[str, Inputs]:
    """The largest magnitude of each channel of each value that linear layers read, and about 128 rows of it, by name.

    The rows are spread evenly over each sequence, its first one included: that is where outliers tend to be.
    """
    widths = _widths(graph)
    largest = {name: np.zeros(width, np.float32) for name, width in widths.items()}
    rows: dict[str, list[Floats]] = {name: [] for name in widths}
    each = -(-_SAMPLED_ROWS // len(sequences))
    for name, found in _fed(graph, sequences, list(widths)):
        np.maximum(largest[name], np.abs(found).max(axis=0), out=largest[name])
        rows[name].append(found[np.unique(np.linspace(0, len(found) - 1, each).astype(int))])
    return {name: Inputs(largest[name], np.concatenate(rows[name])) for name in widths}


class Moments:
    """Sums of x xᵀ, float32 [K, K], over the rows x that linear layers of the graph folder ``graph`` read.

    They are made on demand for a value and for those behind it in the graph, as many as fit, and then forgotten for
    the next: a reader that goes through the graph in order runs the text as few times as can be.
    """

    def __init__(self, graph: Path, sequences: Sequences) -> None:
        self._graph, self._sequences = graph, sequences
        self._widths = _widths(graph)
        self._held: dict[str, Floats] = {}

    def __call__(self, value: str) -> Floats:
        """Of the value of this name."""
        if value not in self._held:
            group = self._group(value)
            self._held = {name: np.zeros((self._widths[name],) * 2, np.float32) for name in group}
            for name, rows in _fed(self._graph, self._sequences, group):
                self._held[name] += rows.T @ rows
        return self._held[value]

    def forget(self) -> None:
        """Let go of those that are held."""
        self._held = {}

    def _group(self, first: str) -> list[str]:
        names = list(self._widths)
        group: list[str] = []
        size = 0
        for name in islice(names, names.index(first), None):
            size += 4 * self._widths[name] ** 2
            if group and size > _MOMENT_BYTES:
                break
            group.append(name)
        return group


def _widths(graph: Path) -> dict[str, int]:
    """The width of each value that linear layers read, by its name, in the order of the graph."""
    found = {}
    for name, node in parts(ir.load(graph / MODEL)).items():
        source, weight = node.inputs[:2]
        if name != EMBEDDING and source is not None and source.name and weight is not None and weight.shape:
            found[source.name] = int(weight.shape.numpy()[0])
    return found


def _fed(graph: Path, sequences: Sequences, names: list[str]) -> Iterator[tuple[str, Floats]]:
    """For each sequence what each of these values is, float32 [tokens, width]."""
    model = read_model(graph)
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs[:] = [values[name] for name in names]
    runtime = read_runtime(graph)
    with tempfile.TemporaryDirectory(prefix="slmdeploy-calibration-") as folder:
        write_models({MODEL: model}, Path(folder))
        session = open_session(Path(folder) / MODEL, threads=runtime.threads, spinning=False)
        taken = {node.name for node in session.get_inputs()}
        for sequence in sequences:
            feeds = {name: feed for name, feed in _feeds(runtime, sequence).items() if name in taken}
            for name, output in zip(names, session.run(names, feeds), strict=True):
                yield name, output.reshape(-1, output.shape[-1])


def _feeds(runtime: RuntimeConfig, sequence: Sequence[int]) -> dict[str, npt.NDArray[np.generic]]:
    length = len(sequence)
    held = 0 if runtime.interface == "standard" else length  # room for the present, or a past without a token
    heads = (heads for heads in runtime.kv_heads for _ in range(2))
    past = {
        name: np.zeros((1, groups, held, runtime.head_dim), np.float32)
        for name, groups in zip(kv_names(runtime.layers)[0], heads, strict=True)
    }
    return {
        "input_ids": np.array([sequence], np.int64),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "cache_lengths": np.zeros(1, np.int64),
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
