"""Ranges of what an encoder's linear layers read, from running its float32 graph on rows of text.

What calibration.py is for decoders, and with its choice of a range; values are counted by float16 number, so that
memory does not grow with the text. Knows nothing of profiles or of what is done with the ranges.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from slmdeploy.building.calibration import Counts, best_range
from slmdeploy.building.encoder_parts import linears
from slmdeploy.building.onnxruntime import MODEL, write_models
from slmdeploy.building.static_w8a8 import Range
from slmdeploy.runtime.encoder_config import EncoderConfig
from slmdeploy.runtime.encoding import Row, feed
from slmdeploy.runtime.session import open_session

_LARGEST = np.float32(np.finfo(np.float16).max)


def ranges_of(model: ir.Model, config: EncoderConfig, rows: Sequence[Row]) -> dict[str, Range]:
    """The range of each value that linear layers of ``model`` read, by the value's name; uses the model up."""
    return {name: best_range(found) for name, found in counts_of(model, config, rows).items()}


def counts_of(model: ir.Model, config: EncoderConfig, rows: Sequence[Row]) -> dict[str, Counts]:
    """How often each float16 number, by its bits, stands in each value that linear layers read: int64 [65536] by name.

    Each row runs alone, so nothing that stands at padding is counted. Uses the model up.
    """
    sources = {node.inputs[0] for node in linears(model).values()}
    read = {value.name: value for value in sources if value is not None and value.name}
    counts = {name: np.zeros(1 << 16, np.int64) for name in read}
    model.graph.outputs[:] = list(read.values())
    with tempfile.TemporaryDirectory(prefix="slmdeploy-ranges-") as folder:
        write_models({MODEL: model}, Path(folder))
        session = open_session(Path(folder) / MODEL, threads=config.threads, spinning=False)
        taken = {node.name for node in session.get_inputs()}
        for row in rows:
            feeds = {name: array for name, array in feed([row], config).items() if name in taken}
            for name, output in zip(read, session.run(list(read), feeds), strict=True):
                halves = np.clip(output, -_LARGEST, _LARGEST).astype(np.float16)
                counts[name] += np.bincount(halves.view(np.uint16).ravel(), minlength=1 << 16)
    return counts
