"""Static forms of encoders: ranges that span what layers read, and products that add their own biases."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from slmdeploy.building.encoder_parts import quantize
from slmdeploy.building.encoder_ranges import ranges_of
from slmdeploy.building.static_w8a8 import Range
from slmdeploy.runtime.encoder_config import EncoderConfig, read_encoder
from slmdeploy.runtime.encoding import Row
from slmdeploy.specs import Weights
from tests.runtime.encoder_graphs import table, write_encoder_graph

WIDTH = 3
STATIC = Weights(scheme="w8a8-static", bits=8)
HEADER = f"""<ir_version: 10, opset_import: ["": 21]>
small (int64[batch,sequence] input_ids) => (float[batch,sequence,{WIDTH}] y)"""
BODIES = {
    "behind": "{ x = Gather(table, input_ids) p = MatMul(x, weight) y = Add(p, bias) }",
    "in front": "{ x = Gather(table, input_ids) p = MatMul(x, weight) y = Add(bias, p) }",
    "another reader": "{ x = Gather(table, input_ids) p = MatMul(x, weight) b = Add(p, bias) y = Mul(b, p) }",
    "no constant": "{ x = Gather(table, input_ids) p = MatMul(x, weight) y = Add(p, x) }",
}


def model_of(body: str) -> ir.Model:
    random = np.random.default_rng(1)
    constants: dict[str, NDArray[Any]] = {
        "table": table(WIDTH),
        "weight": random.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "bias": random.standard_normal(WIDTH).astype(np.float32),
    }
    proto = parser.parse_model(HEADER + body)
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items() if k in read)
    for i, node in enumerate(proto.graph.node):
        node.name = f"node{i}"
    return ir.from_proto(proto)


@pytest.fixture
def config(tmp_path: Any) -> EncoderConfig:
    return read_encoder(write_encoder_graph(tmp_path / "encoder"))


def test_a_range_spans_what_was_read_and_no_padding(config: EncoderConfig) -> None:
    rows = [Row((4, 5), (0, 0)), Row((6,), (0,))]
    (found,) = ranges_of(model_of(BODIES["behind"]), config, rows).items()
    seen = table(WIDTH)[[4, 5, 6]]
    assert found[0] == "x"
    low, high = (0 - found[1].zero_point) * found[1].step, (255 - found[1].zero_point) * found[1].step
    assert low == pytest.approx(seen.min(), rel=0.05)
    assert high == pytest.approx(seen.max(), rel=0.05)


@pytest.mark.parametrize(("name", "taken"), [(name, name in ("behind", "in front")) for name in BODIES])
def test_a_product_adds_the_bias_that_only_it_gets(name: str, taken: bool) -> None:
    model, exact = model_of(BODIES[name]), model_of(BODIES[name])
    product = next(node.name for node in model.graph if node.op_type == "MatMul")
    assert product
    quantize(model, {product: STATIC}, {"x": Range.spanning(-3, 3)})
    (integer,) = (node for node in model.graph if node.op_type == "MatMulIntegerToFloat")
    assert (len(integer.inputs) == 7) == taken
    assert ("Add" in [node.op_type for node in model.graph]) != taken
    ids = np.array([[4, 5, 6, 7]])
    one, other = (
        onnxruntime.InferenceSession(ir.to_proto(each).SerializeToString()).run(None, {"input_ids": ids})[0]
        for each in (exact, model)
    )
    np.testing.assert_allclose(other, one, atol=0.1)
