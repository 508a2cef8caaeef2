"""The encoder of a compiled plan, over a device that is the host's memory and a phase that ONNX Runtime computes.

As in test_tensorrt_decoding.py: what is tested is ours, and nothing here says that TensorRT and a GPU run.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from slmdeploy.runtime.encoder_config import read_encoder
from slmdeploy.runtime.encoding import Encoder, Row
from slmdeploy.runtime.errors import CorruptArtifactError
from slmdeploy.runtime.tensorrt_encoding import TensorRTEncoder
from tests.runtime.encoder_graphs import write_encoder_graph
from tests.runtime.test_tensorrt_decoding import HostCall, HostDevice

ROWS = [Row(ids, (0,) * len(ids)) for ids in ((4, 5, 6), (7,), (5, 5, 4, 6, 7), (6, 4), (4,))]
SHAPES = {"last_hidden_state": (-1, -1, 3), "sentence_embedding": (-1, 3)}


class CountingCall(HostCall):
    runs = 0

    def run(self) -> None:
        self.runs += 1
        super().run()


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_encoder_graph(tmp_path / "encoder")


def opened(graph: Path, shapes: dict[str, tuple[int, ...]], rows: int) -> tuple[TensorRTEncoder, CountingCall]:
    device = HostDevice()
    call = CountingCall(ort.InferenceSession(str(graph / "model.onnx")), device)
    return TensorRTEncoder(graph, read_encoder(graph), call, device, shapes, rows), call


@pytest.mark.parametrize(("most", "runs"), [(1, 5), (2, 3), (32, 1)])
def test_it_gives_what_the_graph_gives_in_batches_that_the_plan_takes(graph: Path, most: int, runs: int) -> None:
    encoder, call = opened(graph, SHAPES, most)
    plain = Encoder(graph, read_encoder(graph), 1)
    for name in SHAPES:
        call.runs = 0
        found = encoder.rows(ROWS, name)
        assert call.runs == runs
        for got, expected in zip(found, plain.rows(ROWS, name), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_plan_with_other_outputs_than_runtime_json_says_is_refused(graph: Path) -> None:
    for shapes in ({"logits": (-1, 3)}, SHAPES | {"sentence_embedding": (-1, 4)}):
        with pytest.raises(CorruptArtifactError, match=r"model\.plan"):
            opened(graph, shapes, 8)
