"""contract.py: a graph that keeps every rule passes, and the smallest change that breaks one is named."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.building.contract import RULES, SOFTMAX_SCALE, breaches, require_valid
from slmdeploy.building.fp8 import quantize_linears
from slmdeploy.building.quantize import parts
from slmdeploy.errors import GateError
from slmdeploy.specs import Fp8
from tests.building.small import constant, linear, normal

E4M3 = ml_dtypes.float8_e4m3fn
SCALE = np.float32(0.01)


def fp8(*shape: int, per_channel: bool = True) -> ir.Model:
    """y0 = x @ W with both sides in FP8."""
    model = linear(normal(*(shape or (64, 32))))
    del model.graph.opset_imports["com.microsoft"]
    quantize_linears(model.graph, parts(model), {"x": SCALE}, Fp8(per_channel=per_channel))
    return model


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def replace(model: ir.Model, name: str, index: int, value: object, label: str = "changed") -> None:
    new = constant(label, np.asarray(value))
    model.graph.register_initializer(new)
    node(model, name).replace_input_with(index, new)


def insert(model: ir.Model, operator: str, in_front_of: str, index: int, **attributes: int | list[int]) -> ir.Node:
    """A node between a node and one of its inputs."""
    reader = node(model, in_front_of)
    new = ir.node(operator, [reader.inputs[index]], attributes=attributes, name=f"new.{operator}")
    new.outputs[0].name = f"new.{operator}.out"
    model.graph.insert_before(reader, new)
    reader.replace_input_with(index, new.outputs[0])
    return new


INPUT_Q, INPUT_DQ, WEIGHT_DQ = "layer0.input_fp8", "layer0.input", "layer0.weight"


@pytest.mark.parametrize("per_channel", [True, False])
def test_what_our_own_pass_writes_keeps_the_contract(per_channel: bool) -> None:
    model = fp8(per_channel=per_channel)
    before = ir.to_proto(model).SerializeToString()
    assert breaches(model) == []
    require_valid(model)
    assert ir.to_proto(model).SerializeToString() == before, "checking changes nothing"


def old_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 19


def future_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 26


def foreign_operator(model: ir.Model) -> None:
    insert(model, "FastGelu", INPUT_Q, 0).domain = "com.microsoft"
    model.graph.opset_imports["com.microsoft"] = 1


def e5m2(model: ir.Model) -> None:
    replace(model, INPUT_Q, 2, np.zeros((), ml_dtypes.float8_e5m2))


def fnuz_weight(model: ir.Model) -> None:
    replace(model, WEIGHT_DQ, 0, normal(64, 32).astype(ml_dtypes.float8_e4m3fnuz))


def cast_to_e5m2(model: ir.Model) -> None:
    insert(model, "Cast", INPUT_Q, 0, to=int(ir.DataType.FLOAT8E5M2))


def eight_bit_integer(model: ir.Model) -> None:
    replace(model, INPUT_Q, 2, np.int8(0))


def no_zero_point_is_uint8(model: ir.Model) -> None:
    node(model, INPUT_Q).resize_inputs(2)


def integer_weight(model: ir.Model) -> None:
    replace(model, WEIGHT_DQ, 0, np.ones((64, 32), np.int8))


def zero_point_of_one(model: ir.Model) -> None:
    replace(model, INPUT_Q, 2, np.ones((), E4M3))


def computed_zero_point(model: ir.Model) -> None:
    insert(model, "Identity", INPUT_Q, 2)


def scale_of_zero(model: ir.Model) -> None:
    replace(model, INPUT_Q, 1, np.float32(0))


def negative_scale(model: ir.Model) -> None:
    replace(model, INPUT_DQ, 1, np.float32(-0.01))


def scale_of_no_number(model: ir.Model) -> None:
    replace(model, WEIGHT_DQ, 1, np.full(32, np.nan, np.float32))


def computed_scale(model: ir.Model) -> None:
    insert(model, "Identity", INPUT_Q, 1)


def half_precision_scale_over_float(model: ir.Model) -> None:
    replace(model, INPUT_Q, 1, np.float16(0.01))


def half_precision_scale_behind_float(model: ir.Model) -> None:
    replace(model, INPUT_DQ, 1, np.float16(0.01))


def double_scale(model: ir.Model) -> None:
    replace(model, WEIGHT_DQ, 1, np.full(32, 0.01, np.float64))


def scale_per_channel_of_activations(model: ir.Model) -> None:
    replace(model, INPUT_Q, 1, np.full(64, SCALE), "q_scale")
    replace(model, INPUT_DQ, 1, np.full(64, SCALE), "dq_scale")


def blocked_weight(model: ir.Model) -> None:
    replace(model, WEIGHT_DQ, 1, np.full((2, 32), SCALE))
    node(model, WEIGHT_DQ).attributes["axis"] = ir.AttrInt64("axis", 0)
    node(model, WEIGHT_DQ).attributes["block_size"] = ir.AttrInt64("block_size", 32)


def scales_along_the_sum(model: ir.Model) -> None:
    replace(model, WEIGHT_DQ, 1, np.full(64, SCALE))
    node(model, WEIGHT_DQ).attributes["axis"] = ir.AttrInt64("axis", 0)


def other_scale_behind(model: ir.Model) -> None:
    replace(model, INPUT_DQ, 1, np.float32(0.02))


def something_between_the_pair(model: ir.Model) -> None:
    insert(model, "Identity", INPUT_DQ, 0)


def weight_quantised_at_run_time(model: ir.Model) -> None:
    replace(model, INPUT_Q, 0, normal(5, 64))


def weight_with_codes_of_no_number(model: ir.Model) -> None:
    replace(model, WEIGHT_DQ, 0, np.full((64, 32), np.nan, E4M3))


def transposed_behind(model: ir.Model) -> None:
    insert(model, "Transpose", "layer0", 1, perm=[0, 1])


def result_leaves_the_graph(model: ir.Model) -> None:
    value = node(model, INPUT_DQ).outputs[0]
    value.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.outputs.append(value)


def only_weights(model: ir.Model) -> None:
    node(model, "layer0").replace_input_with(0, model.graph.inputs[0])


def only_activations(model: ir.Model) -> None:
    replace(model, "layer0", 1, normal(64, 32))


def narrow(model: ir.Model) -> None:
    replace(model, WEIGHT_DQ, 0, normal(64, 8).astype(E4M3), "codes")
    replace(model, WEIGHT_DQ, 1, np.full(8, SCALE), "scales")
    model.graph.outputs[0].shape = None


BROKEN: list[tuple[Callable[[ir.Model], None], str, str]] = [
    (old_opset, "opset", "opset 19 is outside 21 to 25"),
    (future_opset, "opset", "opset 26"),
    (foreign_operator, "domain", "com.microsoft.FastGelu"),
    (e5m2, "format", "FLOAT8E5M2, so use FLOAT8E4M3FN"),
    (fnuz_weight, "format", "FLOAT8E4M3FNUZ"),
    (cast_to_e5m2, "format", "FLOAT8E5M2"),
    (eight_bit_integer, "quantised type", "INT8"),
    (no_zero_point_is_uint8, "quantised type", "UINT8"),
    (integer_weight, "quantised type", "it reads INT8"),
    (zero_point_of_one, "zero point", "is not 0"),
    (computed_zero_point, "zero point", "is computed"),
    (scale_of_zero, "scale values", "above 0"),
    (negative_scale, "scale values", "above 0"),
    (scale_of_no_number, "scale values", "finite"),
    (computed_scale, "scale values", "is computed"),
    (half_precision_scale_over_float, "scale type", "reads FLOAT with a scale of FLOAT16"),
    (half_precision_scale_behind_float, "scale type", "FLOAT16 and that of its QuantizeLinear FLOAT"),
    (double_scale, "scale type", "its scale is DOUBLE"),
    (scale_per_channel_of_activations, "scale shape", "use one per tensor"),
    (blocked_weight, "scale shape", "blocked"),
    (scales_along_the_sum, "scale shape", "one per output channel"),
    (other_scale_behind, "pairing", "not that of its QuantizeLinear"),
    (something_between_the_pair, "pairing", "something else than DequantizeLinear"),
    (weight_quantised_at_run_time, "stored weight", "store the constant as FLOAT8E4M3FN"),
    (weight_with_codes_of_no_number, "stored weight", "codes that are no number"),
    (transposed_behind, "feeds products", "Transpose new.Transpose stands between"),
    (result_leaves_the_graph, "feeds products", "leaves the graph"),
    (only_weights, "both sides", "quantise its first input too"),
    (only_activations, "both sides", "quantise its second input too"),
    (narrow, "wide enough", "64 x 8, a side under 16"),
]


@pytest.mark.parametrize(("change", "rule", "words"), BROKEN, ids=[change.__name__ for change, _, _ in BROKEN])
def test_each_rule_is_broken_and_named(change: Callable[[ir.Model], None], rule: str, words: str) -> None:
    model = fp8()
    change(model)
    found = [breach for breach in breaches(model) if breach.rule == rule]
    assert found, [breach.rule for breach in breaches(model)]
    assert any(words in breach.sentence for breach in found), found
    with pytest.raises(GateError, match="breaks its contract at"):
        require_valid(model)


def attention(*, queries: bool, scale: float = SOFTMAX_SCALE) -> ir.Model:
    """softmax(q k' * factor) v with the softmax and the values in FP8, and queries and keys too if ``queries``."""
    q, k, v = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in (("q", [2, 32, 16]), ("k", [2, 16, 32]), ("v", [2, 32, 16]))
    )
    constants = [constant(f"{name}.scale", np.asarray(0.02, np.float32)) for name in "qkv"]
    constants += [constant("softmax.scale", np.asarray(scale, np.float32)), constant("zero", np.zeros((), E4M3))]
    constants += [constant("factor", np.asarray(0.25, np.float32))]
    named = {value.name: value for value in constants}
    nodes: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value, name: str) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs), name=name))
        nodes[-1].outputs[0].name = f"{name}.out"
        return nodes[-1].outputs[0]

    def pair(value: ir.Value, label: str) -> ir.Value:
        scale = named[f"{label}.scale"]
        return op("DequantizeLinear", op("QuantizeLinear", value, scale, named["zero"], name=f"{label}.q"), scale,
                  name=f"{label}.dq")  # fmt: skip

    products = op("MatMul", *((pair(q, "q"), pair(k, "k")) if queries else (q, k)), name="products")
    weights = op("Softmax", op("Mul", products, named["factor"], name="scaled"), name="softmax")
    mixed = op("MatMul", pair(weights, "softmax"), pair(v, "v"), name="mixed")
    graph = ir.Graph([q, k, v], [mixed], nodes=nodes, initializers=constants, opset_imports={"": 21}, name="attention")
    mixed.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(graph, ir_version=10)


def test_attention_is_fp8_in_all_of_its_four_inputs_or_in_none() -> None:
    assert breaches(attention(queries=True)) == []
    (lone,) = breaches(attention(queries=False))
    assert (lone.rule, lone.node) == ("softmax", "softmax.q")
    assert "queries and keys are not" in lone.sentence
    (scale,) = breaches(attention(queries=True, scale=0.01))
    assert "1/448" in scale.sentence


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert set(RULES) == {rule for _, rule, _ in BROKEN} | {"softmax"}
