"""tracing.py: the names of a traced graph, that tracing is quiet, and what cannot be traced."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from slmdeploy.errors import UnsupportedModelError
from slmdeploy.exporting.tracing import trace

AXES = {"x": {0: "batch", 1: "sequence"}}


class Model(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"twice": torch.cat([x, x], dim=1), "sum": x.sum(1)}


class Fixed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x.reshape(2, 3, 5)}


def test_axes_and_outputs_have_their_names_and_nothing_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    graph = trace(Model(), {"x": torch.ones(2, 3, 5)}, AXES, fused=False, name="model")
    assert capfd.readouterr() == ("", "")
    shapes = {
        value.name: [str(size) for size in value.shape or ()] for value in (*graph.graph.inputs, *graph.graph.outputs)
    }
    assert shapes["x"] == ["batch", "sequence", "5"]
    assert shapes["sum"] == ["batch", "5"]
    assert "sequence" in shapes["twice"][1]
    assert graph.opset_imports == {"": 18}
    assert not any(node.metadata_props or node.doc_string for node in graph.graph)
    ir.save(graph, tmp_path / "model.onnx")
    x = np.arange(70, dtype=np.float32).reshape(7, 2, 5)
    twice, total = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x})
    assert twice.shape == (7, 4, 5)
    assert np.array_equal(total, x.sum(1))


def test_an_axis_that_the_module_fixes_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^work/mine cannot be exported: transformers.exporters fails"):
        trace(Fixed(), {"x": torch.ones(2, 3, 5)}, AXES, fused=False, name="work/mine")
