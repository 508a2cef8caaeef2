"""The short benchmark: its model is what onnx reads, its figures are plausible."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from slmdeploy.profiling import microbench


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(microbench, "_SECONDS", 0.01)
    monkeypatch.setattr(microbench, "_SIZE", 64)


def test_the_model_that_is_encoded_by_hand_is_one_of_onnx():
    model = onnx.load_model_from_string(microbench.matmul_integer_model(300))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMulInteger"]
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    assert (weight.dtype, weight.shape) == (np.int8, (300, 300))


def test_the_model_multiplies():
    session = ort.InferenceSession(microbench.matmul_integer_model(4), providers=["CPUExecutionProvider"])
    x = np.arange(16, dtype=np.uint8).reshape(4, 4)
    (found,) = session.run(None, {"x": x})
    assert found.tolist() == (x.astype(int) @ np.ones((4, 4), int)).tolist()


def test_figures_are_plausible():
    # The lower ends are those of a machine on which much else runs.
    assert 1e6 < microbench.read_bandwidth(1, 64 << 20) < 1e13
    assert 1e3 < microbench.fp32_peak() < 1e15
    assert 1e3 < microbench.int8_peak(1) < 1e16


def test_a_machine_that_stands_still_until_time_is_up_has_a_figure_all_the_same(monkeypatch):
    monkeypatch.setattr(microbench, "_SECONDS", 0.0)
    assert microbench.fp32_peak() > 0
