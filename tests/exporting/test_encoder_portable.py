"""Traced encoders in their portable form: fewer and standard operators, and the same numbers."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from slmdeploy.exporting.encoder_portable import HIDDEN, make_portable
from tests.building.portable_encoders import BODY, WIDTH, traced

FORMS = {
    "keys heads first": (
        "k = Transpose<perm = [0, 2, 3, 1]>(k2)",
        "k9 = Transpose<perm = [0, 2, 1, 3]>(k2)\n k = Transpose<perm = [0, 1, 3, 2]>(k9)",
    ),
    "queries alone are scaled": ("raw = MatMul(q, kt)", "raw = MatMul(q, k)"),
    "queries without a bias": ("q1 = Add(q0, bq)", "q1 = Identity(q0)"),
}
OTHERS = {
    "the mask multiplies": ("masked = Add(raw, bias)", "masked = Mul(raw, bias)"),
    "shares are changed": ("mixed = MatMul(shares, v)", "more = Relu(shares)\n mixed = MatMul(more, v)"),
    "something stands behind the turned keys": ("kt = Mul(k, root)", "size = Shape(k)\n kt = Reshape(k, size)"),
}


def outputs(model: ir.Model) -> list[NDArray[np.float32]]:
    ids = np.random.default_rng(1).integers(0, 8, (3, 9))
    mask = (np.arange(9) < np.array([[9], [4], [1]])).astype(np.int64)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    states, vectors = session.run(None, {"input_ids": ids, "attention_mask": mask})
    return [states * mask[..., None], vectors]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize("change", [None, *FORMS])
def test_it_computes_the_same_in_fewer_products(opset: int, change: str | None) -> None:
    body = BODY if change is None else BODY.replace(*FORMS[change])
    model = traced(body)
    expected = outputs(model)
    make_portable(model, opset)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for found, exact in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-5)
    assert dict(model.graph.opset_imports) == {"": opset}
    found_operators = operators(model)
    assert found_operators.count("Attention") == (opset == 23)
    assert found_operators.count("Softmax") == (opset == 21)
    assert [n.name for n in model.graph if n.op_type == "MatMul" and constant(n)] == [
        "layer.q0_k1_v0",
        "layer.dense",
        "layer.up",
        "layer.down",
    ]


def constant(node: ir.Node) -> bool:
    return node.inputs[1] is not None and node.inputs[1].const_value is not None


def test_the_joined_product_has_the_weights_side_by_side_and_nothing_where_there_was_no_bias() -> None:
    model = traced()
    parts = {name: model.graph.initializers[name].const_value for name in ("wq", "wk", "wv", "bq", "bv")}
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in parts.items() if tensor is not None}
    make_portable(model, 21)
    held = {name: value.const_value for name, value in model.graph.initializers.items()}
    weight = next(tensor for name, tensor in held.items() if name.endswith("joined_weight"))
    bias = next(tensor for name, tensor in held.items() if name.endswith("joined_bias"))
    assert weight is not None
    assert bias is not None
    assert np.array_equal(weight.numpy(), np.concatenate([arrays["wq"], arrays["wk"], arrays["wv"]], axis=1))
    assert np.array_equal(bias.numpy(), np.concatenate([arrays["bq"], np.zeros(WIDTH, np.float32), arrays["bv"]]))
    assert not {"wq", "wk", "wv", "bq", "bv"}.intersection(held)


@pytest.mark.parametrize("change", OTHERS)
def test_an_attention_of_another_form_stays_written_out(change: str) -> None:
    model = traced(BODY.replace(*OTHERS[change]))
    expected = outputs(model)
    make_portable(model, 23)
    assert "Attention" not in operators(model)
    assert "Softmax" in operators(model)
    if change != "the mask multiplies":  # there the lowest number is not hidden but computed with
        np.testing.assert_allclose(outputs(model)[1], expected[1], atol=1e-5)


def test_masks_are_numbers_that_float16_has() -> None:
    model = traced()
    make_portable(model, 23)
    lowest = model.graph.initializers["lowest"].const_value
    assert lowest is not None
    assert lowest.numpy() == HIDDEN == np.float16(HIDDEN)
