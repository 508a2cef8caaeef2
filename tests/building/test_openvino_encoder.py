"""Encoders in the shape that OpenVINO quantises best: the same numbers, fewer joints, and nothing else touched."""

from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as op

from slmdeploy.building.openvino_encoder import unpack

HIDDEN = 8
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 3, HIDDEN)).astype(np.float32)


def matrix(columns: int) -> Any:
    return op.constant(RANDOM.standard_normal((HIDDEN, columns)).astype(np.float32))


def kinds(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


def answers(model: Any) -> list[Any]:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(X)
    return [found[i].copy() for i in range(len(model.outputs))]


def packed(axis: int = -1, *, turned: bool = False) -> Any:
    x = op.parameter([-1, -1, HIDDEN], np.float32, name="x")
    weight = op.constant(RANDOM.standard_normal((9, HIDDEN) if turned else (HIDDEN, 9)).astype(np.float32))
    product = op.matmul(x, weight, False, turned)
    split = op.variadic_split(product, op.constant(np.int64(axis)), op.constant(np.array([2, 3, 4], np.int64)))
    return openvino.Model([op.relu(part) for part in split.outputs()], [x])


@pytest.mark.parametrize(("axis", "turned"), [(-1, False), (2, False), (-1, True)])
def test_a_product_that_is_cut_becomes_three(axis: int, turned: bool) -> None:
    model = packed(axis, turned=turned)
    expected = answers(model)
    found = unpack(model)
    assert kinds(found).count("MatMul") == 3
    assert "VariadicSplit" not in kinds(found)
    for one, other in zip(expected, answers(found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_product_that_somebody_else_reads_too_stays_whole() -> None:
    x = op.parameter([-1, -1, HIDDEN], np.float32, name="x")
    product = op.matmul(x, matrix(6), False, False)
    halves = op.split(product, op.constant(np.int64(-1)), 2)
    found = unpack(openvino.Model([op.relu(halves.output(0)), op.relu(halves.output(1)), op.exp(product)], [x]))
    assert kinds(found).count("MatMul") == 1
    assert "Split" in kinds(found)


@pytest.mark.parametrize("first", [True, False])
def test_a_bias_joins_its_product_before_the_residual(first: bool) -> None:
    x = op.parameter([-1, -1, HIDDEN], np.float32, name="x")
    product = op.matmul(x, matrix(HIDDEN), False, False)
    bias = op.constant(RANDOM.standard_normal(HIDDEN).astype(np.float32))
    inner = op.add(product, x) if first else op.add(x, product)
    model = openvino.Model([op.relu(op.add(inner, bias))], [x])
    expected = answers(model)
    found = unpack(model)
    biased = next(node for node in found.get_ordered_ops() if node.get_type_name() == "Add")
    assert biased.input_value(0).get_node().get_type_name() == "MatMul"
    assert biased.input_value(1).get_node().get_type_name() == "Constant"
    np.testing.assert_allclose(answers(found)[0], expected[0], atol=1e-5)


@pytest.mark.parametrize(("attended", "value", "dropped"), [(True, 0.0, True), (True, 1.0, False), (False, 0.0, False)])
def test_zeros_are_left_out_behind_attention_alone(attended: bool, value: float, dropped: bool) -> None:
    x = op.parameter([-1, -1, HIDDEN], np.float32, name="x")
    weights = op.softmax(op.matmul(x, x, False, True), -1) if attended else op.relu(op.matmul(x, x, False, True))
    mixed = op.matmul(weights, x, False, False)
    chosen = op.select(op.greater(x, op.constant(np.float32(9))), op.constant(np.float32(value)), mixed)
    found = unpack(openvino.Model([op.relu(chosen)], [x]))
    assert ("Select" not in kinds(found)) == dropped
