"""benchmarks/rounding.py: planted outliers change no bit, one scale per tensor is near, the docs show the results."""

import json
from pathlib import Path

import numpy as np

from benchmarks import rounding
from slmdeploy.building.calibration import count
from slmdeploy.building.fp8 import activation_scale
from slmdeploy.building.onnxruntime import SCORE, open_folder, read_model, write_folder, write_runtime
from slmdeploy.building.quantize import HEAD, parts
from slmdeploy.specs import SessionOptions
from tests.building.small import relative_error, write_graph

IDS = [0, 5, 9, 33, 100, 7, 8]


def test_the_table_in_the_docs_is_that_of_the_results() -> None:
    found = json.loads(rounding.RESULTS.read_text(encoding="utf-8"))
    assert rounding.table(found) in rounding.PAGE.read_text(encoding="utf-8")
    assert found["planted"]["largest_logit_difference"] == 0.0
    assert set(found["cells"]) == {" | ".join(cell) for cell in rounding.cells()}


def test_planted_outliers_change_no_bit(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph")
    model = read_model(graph)
    before = model.graph.initializers["model.layers.0.input_layernorm.weight"].const_value.numpy().copy()
    assert rounding.plant(model) > 0
    after = model.graph.initializers["model.layers.0.input_layernorm.weight"].const_value.numpy()
    assert sorted(set((after / before).tolist())) == [1.0, 64.0]
    (tmp_path / "planted").mkdir()
    write_folder(model, graph, tmp_path / "planted", precision="fp32", session=SessionOptions())
    np.testing.assert_array_equal(open_folder(tmp_path / "planted").logits(IDS), open_folder(graph).logits(IDS))


def test_one_scale_per_tensor_is_near_and_leaves_the_head(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph")
    model = read_model(graph)
    rounding.quantize_per_tensor(model)
    assert set(parts(model)) == {HEAD, "model.embed_tokens"}
    (tmp_path / "built").mkdir()
    write_folder(model, graph, tmp_path / "built", precision="mixed", session=SessionOptions())
    error = relative_error(open_folder(tmp_path / "built").logits(IDS), open_folder(graph).logits(IDS))
    assert 0 < error < 0.1


def test_fp8_is_near_and_leaves_the_head(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph")
    model = read_model(graph)
    scales = {name: activation_scale(found, "max") for name, found in count(graph, [IDS]).items()}
    rounding.quantize_fp8(model, scales)
    left = [node.name for node in model.graph if node.op_type == "MatMul" and node.inputs[1].const_value is not None]
    assert left == [HEAD]
    (tmp_path / "built").mkdir()
    write_folder(model, graph, tmp_path / "built", precision="mixed", session=SessionOptions())
    (tmp_path / "built" / SCORE).unlink()
    write_runtime(tmp_path / "built", tmp_path / "built", numerics_only=True)
    error = relative_error(open_folder(tmp_path / "built").logits(IDS), open_folder(graph).logits(IDS))
    assert 0 < error < 0.2
