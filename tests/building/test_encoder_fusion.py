"""encoder_fusion.py: each form gives what the graph gave, and what does not look as expected is left alone."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from slmdeploy.building.encoder_fusion import Fused, fuse

WIDTH, HEADS = 24, 4
HEADER = f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
small (float[batch,sequence,{WIDTH}] x, float[batch,1,1,sequence] mask) => (float[batch,sequence,{WIDTH}] y)"""
ATTENTION = """{
    many = MatMul(x, packed)
    q0, k0, v0 = Split<axis = -1>(many, thirds)
    q1 = Add(q0, qb)
    k1 = Add(k0, kb)
    v1 = Add(v0, vb)
    q2 = Reshape(q1, cut)
    k2 = Reshape(k1, cut)
    v2 = Reshape(v1, cut)
    q = Transpose<perm = [0, 2, 1, 3]>(q2)
    k = Transpose<perm = [0, 2, 3, 1]>(k2)
    v = Transpose<perm = [0, 2, 1, 3]>(v2)
    raw = MatMul(q, k)
    scaled = Mul(raw, scale)
    size = Shape<start = 3>(mask)
    one = Constant<value_ints = [1]>()
    sizes = Concat<axis = 0>(one, one, size, size)
    bias = Expand(mask, sizes)
    masked = Add(scaled, bias)
    shares = Softmax<axis = -1>(masked)
    mixed = MatMul(shares, v)
    turned = Transpose<perm = [0, 2, 1, 3]>(mixed)
    y = Reshape(turned, join)
}"""
SKIP_NORM = "{ y, m, v, sum = com.microsoft.SkipLayerNormalization<epsilon = 0.00001>(x, x, gain, shift, addend) }"


def model_of(body: str) -> ir.Model:
    random = np.random.default_rng(0)
    constants: dict[str, NDArray[Any]] = {
        "packed": random.standard_normal((WIDTH, 3 * WIDTH)).astype(np.float32),
        "thirds": np.array([WIDTH] * 3),
        "cut": np.array([0, 0, HEADS, -1]),
        "join": np.array([0, 0, WIDTH]),
        "scale": np.float32(0.4),
    } | {
        name: random.standard_normal(WIDTH).astype(np.float32) for name in ("qb", "kb", "vb", "gain", "shift", "addend")
    }
    proto = parser.parse_model(HEADER + body)
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items() if k in read)
    for i, node in enumerate(proto.graph.node):
        node.name = f"node{i}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model) -> NDArray[np.float32]:
    random = np.random.default_rng(1)
    feed = {"x": random.standard_normal((2, 7, WIDTH)).astype(np.float32), "mask": np.zeros((2, 1, 1, 7), np.float32)}
    feed["mask"][1, ..., 4:] = -1e30
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(["y"], feed)[0]
    return found


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_an_attention_becomes_one_node_behind_one_addition_of_biases() -> None:
    model = model_of(ATTENTION)
    expected = run(model)
    assert fuse(model) == Fused(attention=1, biases=1, norms=0)
    found = operators(model)
    assert [found.count(name) for name in ("MultiHeadAttention", "Softmax", "Transpose", "Add")] == [1, 0, 0, 1]
    np.testing.assert_allclose(run(model), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("k = Transpose<perm = [0, 2, 3, 1]>(k2)", "k = Transpose<perm = [0, 2, 3, 1]>(v2)\n unused = Identity(k2)"),
        ("masked = Add(scaled, bias)", "halved = Mul(scaled, scale)\n masked = Add(halved, bias)"),
        ("masked = Add(scaled, bias)", "masked = Add(bias, scaled)"),
        ("mixed = MatMul(shares, v)", "doubled = Add(shares, shares)\n mixed = MatMul(doubled, v)"),
    ],
)
def test_an_attention_of_another_form_still_computes_what_it_did(old: str, new: str) -> None:
    model = model_of(ATTENTION.replace(old, new))
    expected = run(model)
    fuse(model)
    np.testing.assert_allclose(run(model), expected, atol=1e-5)


def test_a_norm_becomes_plain_operators_with_the_sum_that_others_read() -> None:
    body = SKIP_NORM.replace("{ y,", "{ normal,").replace("}", " y = Add(normal, sum) }")
    model = model_of(body)
    expected = run(model)
    assert fuse(model).norms == 1
    assert "SkipLayerNormalization" not in operators(model)
    np.testing.assert_allclose(run(model), expected, atol=1e-5)


def test_a_norm_over_other_axes_stays() -> None:
    flat = "{ y = LayerNormalization<axis = 1>(x, square) }"
    proto = model_of("{ y = LayerNormalization<axis = -1>(x, gain) }")
    assert fuse(proto) == Fused(0, 0, 1)
    assert fuse(model_of(flat)) == Fused(0, 0, 0)
