"""The contract of an FP8 graph: what an ONNX graph has to be so that TensorRT makes FP8 products of it, and right ones.

TensorRT's parser builds several wrong graphs without a word: another zero point, one scale per channel of activations,
one side of a product in FP8, a quantised softmax by itself. Hence every rule is checked here, before any compiler sees
the graph, and each breach is one sentence that names the node and the remedy. Rules and where they come from are in
docs/tensorrt.md. Knows graphs alone: nothing of calibration, files or TensorRT itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from slmdeploy.errors import GateError

Q, DQ = "QuantizeLinear", "DequantizeLinear"
OLDEST_OPSET, NEWEST_OPSET = 21, 25
MIN_SIDE = 16
"""FP8 products have operands of 16 numbers and more; a narrower layer gains nothing by being one."""
SOFTMAX_SCALE = 1 / 448
"""A softmax is at most 1, which this scale puts at the largest number of E4M3."""

_E4M3 = ir.DataType.FLOAT8E4M3FN
_OTHER_FP8 = (ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ)
_SCALE_TYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_PRODUCTS = ("MatMul", "Gemm")
_ELEMENTWISE = {"Add", "Mul", "Div", "Sub", "Where", "Cast", "Tanh", "Identity", "Max", "Min"}
"""What may stand between the product of queries and keys and its softmax."""


@dataclass(frozen=True)
class Breach:
    """One node against one rule; ``sentence`` says what is wrong and what to do."""

    rule: str
    node: str
    sentence: str


def require_valid(model: ir.Model) -> None:
    """Raise GateError with the first breach, and how many there are."""
    found = breaches(model)
    if found:
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise GateError(f"the FP8 graph breaks its contract at {found[0].node}: {found[0].sentence}{others}")


def breaches(model: ir.Model) -> list[Breach]:
    """Every breach of every rule, in the order of the rules and of the graph. ``model`` is not changed."""
    typed = ShapeInferencePass()(model.clone()).model
    found = [Breach("opset", "the model", text) for text in _opset(typed)]
    nodes = list(typed.graph.all_nodes())
    for rule, check in _RULES.items():
        found += [Breach(rule, _name(node), text) for node in nodes for text in check(node)]
    return found


def _opset(model: ir.Model) -> Iterator[str]:
    opset = model.graph.opset_imports.get("")
    if opset is None or not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        yield f"opset {opset} is outside {OLDEST_OPSET} to {NEWEST_OPSET}, so export the graph in one of these"


def _domain(node: ir.Node) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"operator {node.domain}.{node.op_type} is no standard one: export with the portable dialect"


def _format(node: ir.Node) -> Iterator[str]:
    held = [_dtype(value) for value in (*node.inputs, *node.outputs)]
    held += [ir.DataType(node.attributes.get_int(key, 0)) for key in ("to", "output_dtype")]
    for dtype in _OTHER_FP8:
        if dtype in held:
            yield f"it has the format {dtype.name}, so use FLOAT8E4M3FN, the only one that FP8 products take"


def _quantised_type(node: ir.Node) -> Iterator[str]:
    if node.op_type == Q and (made := _code_type(node)) not in (_E4M3, *_OTHER_FP8):
        yield f"it quantises to {made.name}, so give it a zero point of type FLOAT8E4M3FN"
    if node.op_type == DQ and (read := _dtype(node.inputs[0])) not in (_E4M3, None, *_OTHER_FP8):
        yield f"it reads {_label(read)}, so store FLOAT8E4M3FN, the only format of this graph"


def _zero_point(node: ir.Node) -> Iterator[str]:
    if node.op_type not in (Q, DQ) or (value := _input(node, 2)) is None:
        return
    zeros = _array(value)
    if zeros is None:
        yield "its zero point is computed, so make it a constant zero"
    elif np.any(zeros.astype(np.float32) != 0):
        yield "its zero point is not 0, and FP8 is signed: use 0"


def _scale_values(node: ir.Node) -> Iterator[str]:
    if node.op_type not in (Q, DQ):
        return
    scale = _array(node.inputs[1])
    if scale is None:
        yield "its scale is computed, so make it a constant"
    elif not np.all(np.isfinite(scale.astype(np.float32)) & (scale.astype(np.float32) > 0)):
        yield "its scale is not a finite number above 0, so calibrate again on other data"


def _scale_type(node: ir.Node) -> Iterator[str]:
    if node.op_type not in (Q, DQ):
        return
    scale = _dtype(node.inputs[1])
    if scale not in _SCALE_TYPES:
        yield f"its scale is {_label(scale)}, so make it FLOAT, FLOAT16 or BFLOAT16"
    elif node.op_type == Q and _dtype(node.inputs[0]) not in (scale, None):
        yield f"it reads {_label(_dtype(node.inputs[0]))} with a scale of {_label(scale)}: make them one type"
    elif node.op_type == DQ and (source := _source(node.inputs[0], Q)) and _dtype(source.inputs[1]) != scale:
        yield f"its scale is {_label(scale)} and that of its {Q} {_label(_dtype(source.inputs[1]))}: make them one type"


def _scale_shape(node: ir.Node) -> Iterator[str]:
    if node.op_type not in (Q, DQ) or (scale := _shape(node.inputs[1])) is None:
        return
    if node.attributes.get_int("block_size", 0) or len(scale) > 1:
        yield "its scales are blocked, which FP8 products do not take: use one per tensor, or per channel of a weight"
    elif _is_weight(node):
        yield from _weight_scale_shape(node, scale)
    elif scale not in ((), (1,)):
        yield "activations have more than one scale, which only weights may: use one per tensor"


def _weight_scale_shape(node: ir.Node, scale: tuple[int, ...]) -> Iterator[str]:
    weight = _shape(node.inputs[0])
    if scale in ((), (1,)) or weight is None:
        return
    axis = node.attributes.get_int("axis", 1) % len(weight)
    channels = {_output_axis(product, len(weight)) for product, _ in node.outputs[0].uses()}
    if axis not in channels or scale[0] != weight[axis]:
        yield "its scales are not one per output channel, so put them along the axis of the product's columns"


def _pairing(node: ir.Node) -> Iterator[str]:
    if node.op_type == Q:
        readers = [user for user, _ in node.outputs[0].uses()]
        if not readers or any(user.op_type != DQ for user in readers) or node.outputs[0].is_graph_output():
            yield f"something else than {DQ} reads its FP8 numbers, so put a {DQ} behind it"
    elif node.op_type == DQ and not _is_weight(node):
        source = _source(node.inputs[0], Q)
        if source is None:
            yield f"its FP8 numbers come from no {Q} and no constant: put the pair side by side"
        elif not _same(_array(source.inputs[1]), _array(node.inputs[1])):
            yield f"its scale is not that of its {Q}: use one constant for both"


def _stored_weight(node: ir.Node) -> Iterator[str]:
    if node.op_type == Q and _array(node.inputs[0]) is not None:
        yield "it quantises a constant at run time, so store the constant as FLOAT8E4M3FN"
    weight = _array(node.inputs[0]) if node.op_type == DQ else None
    if weight is not None and np.isnan(weight.astype(np.float32)).any():
        yield "its weight holds codes that are no number, so quantise again from finite values"


def _feeds_products(node: ir.Node) -> Iterator[str]:
    if node.op_type != DQ:
        return
    for user, _ in node.outputs[0].uses():
        if user.op_type not in _PRODUCTS:
            yield (
                f"{user.op_type} {_name(user)} stands between it and the product, so that does not fuse: transpose and "
                f"scale before {Q}, or offline"
            )
    if node.outputs[0].is_graph_output():
        yield f"its result leaves the graph, so take {Q} and {DQ} away"


def _both_sides(node: ir.Node) -> Iterator[str]:
    if node.op_type not in _PRODUCTS:
        return
    sides = [_source(value, DQ) is not None for value in node.inputs[:2]]
    if any(sides) and not all(sides):
        bare = "second" if sides[0] else "first"
        yield f"only one side is FP8, which makes no FP8 product: quantise its {bare} input too"


def _wide_enough(node: ir.Node) -> Iterator[str]:
    if node.op_type not in _PRODUCTS:
        return
    for value in node.inputs[:2]:
        source, shape = _source(value, DQ), _shape(value)
        if source is not None and _is_weight(source) and shape is not None and min(shape[-2:]) < MIN_SIDE:
            yield f"its weight is {' x '.join(map(str, shape))}, a side under {MIN_SIDE}: leave it in float"


def _softmax(node: ir.Node) -> Iterator[str]:
    if node.op_type != Q or (softmax := _source(node.inputs[0], "Softmax")) is None:
        return
    scale = _array(node.inputs[1])
    if scale is not None and not np.allclose(scale.astype(np.float32), SOFTMAX_SCALE, rtol=1e-3):
        yield "the scale of a softmax is not 1/448: use that, the softmax being at most 1"
    product = product_above(softmax.inputs[0])
    if product is None or not all(_source(value, DQ) for value in product.inputs[:2]):
        yield "a softmax is quantised and queries and keys are not: quantise all, the values too, or none"


_RULES: dict[str, Callable[[ir.Node], Iterator[str]]] = {
    "domain": _domain,
    "format": _format,
    "quantised type": _quantised_type,
    "zero point": _zero_point,
    "scale values": _scale_values,
    "scale type": _scale_type,
    "scale shape": _scale_shape,
    "pairing": _pairing,
    "stored weight": _stored_weight,
    "feeds products": _feeds_products,
    "both sides": _both_sides,
    "wide enough": _wide_enough,
    "softmax": _softmax,
}
RULES = ("opset", *_RULES)
"""The names of all rules, in the order in which they are checked."""


def product_above(value: ir.Value | None) -> ir.Node | None:
    """The product that a value is a scaled and masked result of."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type in _PRODUCTS:
        return node
    found = (product_above(x) for x in node.inputs) if node.op_type in _ELEMENTWISE else ()
    return next((product for product in found if product is not None), None)


def _output_axis(product: ir.Node, rank: int) -> int:
    """Which axis of a weight of this rank is the columns of the product."""
    return rank - 2 if product.op_type == "Gemm" and product.attributes.get_int("transB", 0) == 1 else rank - 1


def _is_weight(node: ir.Node) -> bool:
    """Whether a node reads a constant."""
    return node.inputs[0] is not None and node.inputs[0].const_value is not None


def _code_type(node: ir.Node) -> ir.DataType:
    """What a QuantizeLinear gives: by its zero point, by output_dtype, else UINT8."""
    if (zero := _dtype(_input(node, 2))) is not None:
        return zero
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or int(ir.DataType.UINT8))


def _source(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _array(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    return value.const_value.dtype if value.const_value is not None else value.dtype


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value where all of it is known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(size) for size in value.shape.numpy())


def _same(first: npt.NDArray[np.generic] | None, second: npt.NDArray[np.generic] | None) -> bool:
    return first is not None and second is not None and np.array_equal(first.ravel(), second.ravel())


def _label(dtype: ir.DataType | None) -> str:
    return "of an unknown type" if dtype is None else dtype.name


def _name(node: ir.Node) -> str:
    return node.name or (node.outputs[0].name or "") or node.op_type
