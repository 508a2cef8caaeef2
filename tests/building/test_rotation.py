"""rotation.py: Hadamard matrices of the widths that models have, a turned decoder that computes the same, refusals."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.building.onnxruntime import open_folder, read_model, write_folder
from slmdeploy.building.preparing import write_prepared
from slmdeploy.building.rotation import orthogonal, rotate
from slmdeploy.errors import InputError
from slmdeploy.specs import SessionOptions
from tests.building.small import Array, constant, embedding, linear, model_of, normal, relative_error, write_graph

IDS = [0, 5, 9, 33, 100, 7, 8]


@pytest.mark.parametrize("width", [1, 2, 4, 12, 20, 28, 32, 36, 64, 80, 96, 128, 576, 896, 960])
def test_hadamard_matrices_are_orthogonal_and_spread_evenly(width: int) -> None:
    turn = orthogonal(width, 0)
    np.testing.assert_allclose(turn @ turn.T, np.eye(width), atol=1e-9)
    np.testing.assert_allclose(np.abs(turn), width**-0.5)


@pytest.mark.parametrize("width", [3, 7, 92])
def test_widths_without_a_construction_get_a_random_rotation(width: int) -> None:
    turn = orthogonal(width, 0)
    np.testing.assert_allclose(turn @ turn.T, np.eye(width), atol=1e-9)
    assert np.array_equal(turn, orthogonal(width, 0))
    assert not np.allclose(turn, orthogonal(width, 1))


def test_a_turned_decoder_computes_the_same_and_has_no_outliers(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph")
    model = read_model(graph)
    gain = model.graph.initializers["model.layers.0.input_layernorm.weight"]
    loud = np.ones(64, np.float32)
    loud[5] = 100
    gain.const_value = ir.tensor(loud, name=gain.name)
    (tmp_path / "loud").mkdir()
    write_folder(model, graph, tmp_path / "loud", precision="fp32", session=SessionOptions())
    assert rotate(model) == {"reads": 5, "writes": 4, "attentions": 2}
    write_prepared(model, graph, tmp_path / "turned")
    before, after = open_folder(tmp_path / "loud"), open_folder(tmp_path / "turned")
    assert relative_error(after.logits(IDS), before.logits(IDS)) < 1e-4
    assert relative_error(after.score_ids([1, 2], [[3]]), before.score_ids([1, 2], [[3]])) < 1e-4
    np.testing.assert_array_equal(gain.const_value.numpy(), np.ones(64))


def normed(weight: Array, gain: Array, *, kind: str = "SimplifiedLayerNormalization") -> ir.Model:
    """A table whose rows are normalised and read by one layer."""
    model = embedding(normal(8, len(weight)))
    gather = next(iter(model.graph))
    gather.outputs[0].name = "stream"
    model.graph.inputs[0].name = "input_ids"
    constants = [constant("gain", gain), constant("layer.weight", weight)]
    norm = ir.node(kind, [gather.outputs[0], constants[0]], attributes={"axis": -1, "epsilon": 1e-5}, name="norm")
    norm.outputs[0].name = "normed"
    layer = ir.node("MatMul", [norm.outputs[0], constants[1]], name="layer")
    layer.outputs[0].name, layer.outputs[0].type = "y0", ir.TensorType(ir.DataType.FLOAT)
    return rebuilt(model, [gather, norm, layer], constants)


def rebuilt(model: ir.Model, nodes: list[ir.Node], constants: list[ir.Value]) -> ir.Model:
    """A graph of the same input with these nodes."""
    source, table = model.graph.inputs[0], next(iter(model.graph.initializers.values()))
    model.graph.outputs.clear()
    model.graph.remove(nodes[0])
    model.graph.inputs.clear()
    del model.graph.initializers[table.name or ""]
    return model_of(nodes, source, [table, *constants])


def test_norms_that_take_a_mean_are_refused_before_anything_changes() -> None:
    model = normed(normal(16, 16), np.full(16, 2, np.float32), kind="LayerNormalization")
    with pytest.raises(InputError, match=r"LayerNormalization 'norm' does more.*leave rotate out"):
        rotate(model)
    np.testing.assert_array_equal(model.graph.initializers["gain"].const_value.numpy(), np.full(16, 2))


def test_a_stream_that_leaves_the_graph_and_a_shared_table_are_refused() -> None:
    model = normed(normal(16, 16), np.ones(16, np.float32))
    (norm,) = [node for node in model.graph if node.name == "norm"]
    added = ir.node("Add", [norm.inputs[0], norm.inputs[0]], name="twice")
    added.outputs[0].name, added.outputs[0].type = "twice", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(added)
    model.graph.outputs.append(added.outputs[0])
    with pytest.raises(InputError, match="Add 'twice' does more"):
        rotate(model)
    model = normed(normal(16, 16), np.ones(16, np.float32))
    (norm,) = [node for node in model.graph if node.name == "norm"]
    model.graph.outputs.append(norm.outputs[0])
    with pytest.raises(InputError, match="SimplifiedLayerNormalization 'norm' does more"):
        rotate(model)
    model = normed(normal(16, 16), np.ones(16, np.float32))
    table = next(node for node in model.graph if node.op_type == "Gather").inputs[0]
    model.graph.append(ir.node("Identity", [table], name="again"))
    with pytest.raises(InputError, match=r"Gather .* does more"):
        rotate(model)


def test_a_graph_without_an_embedding_is_refused() -> None:
    with pytest.raises(InputError, match="no fp32 embedding"):
        rotate(linear(normal(8, 8)))
