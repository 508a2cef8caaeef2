"""w8a8.py: against numpy, and the properties that one scale per token and one per channel are for."""

import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.building.quantize import quantize
from slmdeploy.building.w8a8 import quantize_columns
from slmdeploy.specs import Weights
from tests.building.small import Array, constant, linear, model_of, normal, relative_error, run

W8A8 = Weights(scheme="w8a8", bits=8)


def quantised(*weights: Array) -> ir.Model:
    model = linear(*weights)
    quantize(model, {f"layer{i}": W8A8 for i in range(len(weights))})
    return model


def reference(x: Array, weight: Array) -> Array:
    """The same arithmetic in numpy, in float64 where the graph has float32."""
    values, scales = quantize_columns(weight)
    steps = np.abs(x).max(axis=-1, keepdims=True) / 127
    rows = np.rint(x / np.where(steps > 0, steps, 1))
    return rows @ values.astype(np.float64) * steps * scales


def test_columns_are_signed_and_each_has_its_own_scale() -> None:
    weight = normal(64, 6) * np.array([1, 1e-3, 1e3, 1, 1, 0], np.float32)
    values, scales = quantize_columns(weight)
    assert values.dtype == np.int8
    assert (np.abs(values.astype(int)).max(axis=0) == [127, 127, 127, 127, 127, 0]).all()
    assert (np.abs(values * scales - weight).max(axis=0) <= scales / 2 * 1.0001).all()


@pytest.mark.parametrize("width", [64, 100, 33])
def test_the_graph_computes_what_numpy_does(width: int) -> None:
    x, weight = normal(7, width, seed=1), normal(width, 40)
    (found,) = run(quantised(weight), x)
    assert relative_error(found, reference(x, weight)) < 1e-3  # one code may round the other way
    assert relative_error(found, x @ weight) < 0.02


def test_a_row_is_not_changed_by_its_neighbours() -> None:
    x, model = normal(5, 64), quantised(normal(64, 32))
    x[3] *= 1000
    (together,) = run(model, x)
    alone = np.concatenate([run(model, row[None])[0] for row in x])
    np.testing.assert_array_equal(together, alone)


def test_an_outlier_row_or_channel_costs_the_others_nothing() -> None:
    x, weight = normal(6, 64), normal(64, 16, seed=2)
    x[2] *= 1e4
    weight[:, 5] *= 1e4
    (found,) = run(quantised(weight), x)
    sizes = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight, axis=0)
    assert (np.abs(found - x @ weight) < 0.02 * sizes).all()


def test_an_outlier_inside_a_row_costs_that_row_precision() -> None:
    x, weight = normal(2, 256), normal(256, 64, seed=3)
    x[1, 7] = 100
    weight[7] = 0  # the outlier itself adds nothing, so what is left is what the others lost
    (found,) = run(quantised(weight), x)
    exact = x @ weight
    assert relative_error(found[0], exact[0]) < 0.02 < relative_error(found[1], exact[1])


def test_rows_and_columns_of_zeros_stay_zero() -> None:
    x, weight = normal(3, 64), normal(64, 8)
    x[1], weight[:, 4] = 0, 0
    (found,) = run(quantised(weight), x)
    assert np.isfinite(found).all()
    assert not found[1].any()
    assert not found[:, 4].any()
    assert found[0, :4].all()


def test_no_chosen_rows_give_no_rows() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", 64]))
    rows = ir.Value(name="logits_positions", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["chosen"]))
    weight = constant("layer0.weight", normal(64, 8))
    chosen = ir.node("Gather", [x, rows], name="choose")
    node = ir.node("MatMul", [chosen.outputs[0], weight], name="layer0")
    node.outputs[0].name, node.outputs[0].type = "y0", ir.TensorType(ir.DataType.FLOAT)
    model = model_of([chosen, node], x, [weight])
    model.graph.inputs.append(rows)
    quantize(model, {"layer0": W8A8})
    for positions in ([], [2, 0]):
        (found,) = run(model, normal(3, 64), logits_positions=np.array(positions, np.int64))
        assert found.shape == (len(positions), 8)


def gated(weight: Array, down: Array) -> ir.Model:
    """y0 = (sigmoid(gate) * up) @ down, where x @ weight has gate and up side by side, as decoders have them."""
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", weight.shape[0]]))
    half = weight.shape[1] // 2
    constants = [constant("layer0.weight", weight), constant("layer1.weight", down)]
    constants.append(constant("sizes", np.array([half, half], np.int64)))
    both = ir.node("MatMul", [source, constants[0]], name="layer0")
    split = ir.node("Split", [both.outputs[0], constants[2]], attributes={"axis": -1}, num_outputs=2, name="split")
    act = ir.node("Sigmoid", [split.outputs[0]], name="act")
    product = ir.node("Mul", [act.outputs[0], split.outputs[1]], name="product")
    node = ir.node("MatMul", [product.outputs[0], constants[1]], name="layer1")
    node.outputs[0].name, node.outputs[0].type = "y0", ir.TensorType(ir.DataType.FLOAT)
    for i, value in enumerate(split.outputs):
        value.name = f"half{i}"
    return model_of([both, split, act, product, node], source, constants)


def test_a_gated_layer_is_cut_in_two_and_the_scale_of_up_waits() -> None:
    weight, down = normal(64, 96) / 8, normal(48, 16, seed=1)
    x = normal(7, 64, seed=2) * np.logspace(-2, 1, 7, dtype=np.float32)[:, None]
    exact = run(gated(weight, down), x)[0]
    both = gated(weight, down)
    quantize(both, {"layer0": W8A8, "layer1": W8A8})
    operators = [node.op_type for node in both.graph]
    assert "Split" not in operators
    assert operators.count("MatMulIntegerToFloat") == 3
    readers = {node.op_type for node in both.graph for value in node.inputs if value and "half1" in str(value.name)}
    assert readers == set(), "up is read under the name of its unscaled rows"
    for found, row in zip(run(both, x)[0], exact, strict=True):
        assert relative_error(found, row) < 0.03


def test_a_scale_does_not_wait_where_another_reads_the_product() -> None:
    weight, down = normal(64, 96) / 8, normal(48, 16, seed=1)
    model = gated(weight, down)
    product = next(node for node in model.graph if node.name == "product")
    product.outputs[0].name, product.outputs[0].type = "y1", ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(product.outputs[0])
    x = normal(5, 64, seed=3)
    exact = run(model, x)
    quantize(model, {"layer0": W8A8, "layer1": W8A8})
    for found, expected in zip(run(model, x), exact, strict=True):
        assert relative_error(found, expected) < 0.03


def test_only_the_first_layer_quantised_keeps_its_scale() -> None:
    model, x = gated(normal(64, 96) / 8, normal(48, 16, seed=1)), normal(5, 64, seed=3)
    (exact,) = run(model, x)
    quantize(model, {"layer0": W8A8})
    assert relative_error(run(model, x)[0], exact) < 0.03


def test_layers_that_read_the_same_value_share_its_quantised_rows() -> None:
    x, weights = normal(4, 64), (normal(64, 8), normal(64, 12, seed=1))
    model = quantised(*weights)
    operators = [node.op_type for node in model.graph]
    assert operators.count("ReduceMax") == 1
    assert operators.count("MatMulIntegerToFloat") == 2
    for found, weight in zip(run(model, x), weights, strict=True):
        assert relative_error(found, reference(x, weight)) < 1e-3


def test_weights_are_signed_and_rows_unsigned_in_the_graph() -> None:
    """The other signs are correct too and many times slower, so nothing else would notice."""
    model = quantised(normal(64, 8))
    (product,) = [node for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
    types = [value.const_value.dtype for value in product.inputs[1:] if value and value.const_value]
    assert types[0] == ir.DataType.INT8
    assert types[-1] == ir.DataType.UINT8
    assert "layer0.weight" not in model.graph.initializers
