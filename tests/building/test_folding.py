"""folding.py: which places a decoder has, and that moving factors into them changes nothing but the numbers inside."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.building.folding import linear_behind, places
from slmdeploy.building.onnxruntime import open_folder, read_model, write_folder
from slmdeploy.building.rewriting import MICROSOFT
from slmdeploy.specs import SessionOptions
from tests.building.small import Array, constant, linear, model_of, normal, run, write_graph

IDS = [0, 5, 9, 33, 100, 7, 8]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(tmp_path_factory.mktemp("folding") / "graph")


def test_a_decoder_has_places_in_front_of_every_linear_layer_that_something_linear_feeds(graph: Path) -> None:
    found = places(read_model(graph).graph)
    assert {(place.name, place.kind) for place in found if place.name.endswith("0")} == {
        ("n0", "norm"),
        ("context0", "attention"),
        ("m0", "norm"),
    }
    attention = next(place for place in found if place.kind == "attention")
    assert (attention.size, attention.heads, len(attention.channels)) == (32, 2, 64)
    assert attention.channels.reshape(4, 16)[:, 0].tolist() == [0, 0, 16, 16]


def test_powers_of_two_move_without_a_change_of_a_single_bit(graph: Path, tmp_path: Path) -> None:
    model = read_model(graph)
    for place in places(model.graph):
        place.divide(np.exp2(np.random.default_rng(0).integers(-6, 7, place.size)).astype(np.float32))
    write_folder(model, graph, tmp_path, precision="fp32", session=SessionOptions())
    np.testing.assert_array_equal(open_folder(tmp_path).logits(IDS), open_folder(graph).logits(IDS))
    np.testing.assert_array_equal(
        open_folder(tmp_path).score_ids([1, 2], [[3], [4, 5]]), open_folder(graph).score_ids([1, 2], [[3], [4, 5]])
    )


def test_a_gated_mlp_hands_factors_to_its_linear_half_bias_included() -> None:
    weights, bias, down = normal(8, 24), normal(24, seed=1), normal(12, 8, seed=2)
    model = gated(weights, bias, down)
    x = normal(5, 8, seed=3)
    before = run(model, x)[0]
    (place,) = [place for place in places(model.graph) if place.kind == "product"]
    place.divide(np.full(12, 4, np.float32))
    np.testing.assert_array_equal(run(model, x)[0], before)
    assert {maker.constant.name: (maker.start, maker.stop) for maker in place.makers} == {
        "gate_up.weight": (12, 24),
        "gate_up.bias": (12, 24),
    }
    np.testing.assert_array_equal(place.weights()[0], down * 4)


def test_halves_of_the_rows_are_no_columns() -> None:
    model = gated(normal(8, 24), normal(24, seed=1), normal(24, 8, seed=2), axis=0)
    assert [place.kind for place in places(model.graph)] == []


def test_a_bias_of_the_sum_is_none_of_its_norm() -> None:
    gain, bias, weight = constant("gain", normal(16)), constant("bias", normal(16, seed=1)), normal(16, 4, seed=2)
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", 1, 16]))
    layer = constant("layer.weight", weight)
    kind, epsilon = "SkipSimplifiedLayerNormalization", {"epsilon": 1e-5}
    norm = ir.node(kind, [source, source, gain, bias], attributes=epsilon, domain=MICROSOFT, name="norm")
    product = ir.node("MatMul", [norm.outputs[0], layer], name="layer")
    norm.outputs[0].name, product.outputs[0].name = "normed", "y0"
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model, x = model_of([norm, product], source, [gain, bias, layer]), normal(5, 1, 16, seed=3)
    (before,) = run(model, x)
    (place,) = places(model.graph)
    place.divide(np.full(16, 4, np.float32))
    np.testing.assert_array_equal(run(model, x)[0], before)


def gated(weight: Array, bias: Array, down: Array, axis: int = -1) -> ir.Model:
    """silu-like(gate) * up of x @ weight + bias, times down; gate and up are halves along ``axis``."""
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", len(weight)]))
    constants = [
        constant("gate_up.weight", weight),
        constant("gate_up.bias", bias),
        constant("sizes", np.array([12, 12], np.int64)),
        constant("down.weight", down),
    ]
    product = ir.node("MatMul", [source, constants[0]], name="gate_up")
    added = ir.node("Add", [product.outputs[0], constants[1]], name="gate_up.add")
    halves = ir.node("Split", [added.outputs[0], constants[2]], attributes={"axis": axis}, num_outputs=2, name="split")
    active = ir.node("Sigmoid", [halves.outputs[0]], name="active")
    both = ir.node("Mul", [active.outputs[0], halves.outputs[1]], name="both")
    end = ir.node("MatMul", [both.outputs[0], constants[3]], name="down")
    for node in (product, added, halves, active, both, end):
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}.{index}"
    end.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return model_of([product, added, halves, active, both, end], source, constants)


def test_what_anything_else_depends_on_is_no_place() -> None:
    assert places(linear(normal(8, 8)).graph) == [], "x comes from outside"
    model = gated(normal(8, 24), normal(24), normal(12, 8))
    split = next(node for node in model.graph if node.op_type == "Split")
    model.graph.outputs.append(split.outputs[1])
    assert places(model.graph) == []


def test_a_bias_belongs_to_the_product_that_only_it_reads() -> None:
    model = gated(normal(8, 24), normal(24), normal(12, 8))
    added = next(node for node in model.graph if node.op_type == "Add")
    found = linear_behind(added.outputs[0])
    assert found is not None
    assert (found[0].name, found[1] is not None) == ("gate_up", True)
    model.graph.outputs.append(found[0].outputs[0])
    assert linear_behind(added.outputs[0]) is None
