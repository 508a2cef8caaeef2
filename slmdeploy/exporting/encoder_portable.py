"""A traced encoder in the form that compilers for GPUs take: standard operators of opset 21 or 23, and few of them.

    products of one input   query, key, value (or gate, up) each     ->  one product, one bias, and a split
    masks                   the lowest float32                       ->  -30000, which float16 has too
    attention, opset 23     scaled products, softmax, products       ->  the operator Attention

A quantised build then rounds an input once for three layers, and TensorRT fuses the operator, where it does not fuse
the products. An attention that does not look exactly as expected (DeBERTa's has terms of its own) stays written out.
Whether the result is right is measured by the caller's parity ladder. Knows nothing of checkpoints or families.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.version_converter import convert_version

from slmdeploy.building.rewriting import Replacement, remove_unused_initializers, weight_array

OPERATOR_OPSET = 23
"""The first with the operator Attention."""
HIDDEN = np.float32(-3e4)
"""Far below every product, and still a number in float16."""
Found = TypeVar("Found")
_HEADS_FIRST, _LAST_TWO, _LAST_TWO_OF_THREE, _KEYS_TURNED = (0, 2, 1, 3), (0, 1, 3, 2), (0, 2, 1), (0, 2, 3, 1)


def make_portable(model: ir.Model, opset: int) -> None:
    """Change ``model``, traced in standard operators, in place."""
    convert_version(model, opset)
    _bound_masks(model.graph)
    for layers in list(_siblings(model.graph)):
        _fuse(layers)
    if opset >= OPERATOR_OPSET:
        for found in list(_attentions(model.graph)):
            _replace(found)
    RemoveUnusedNodesPass()(model)
    remove_unused_initializers(model.graph)


def _bound_masks(graph: ir.Graph) -> None:
    """No single number below HIDDEN: what masks add or multiply by."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.size == 1 and tensor.dtype == ir.DataType.FLOAT:
            array = tensor.numpy()
            if array.ravel()[0] < HIDDEN:
                value.const_value = ir.tensor(np.full(array.shape, HIDDEN), name=value.name)


@dataclass(frozen=True)
class _Linear:
    """A product with a constant matrix, and the addition of a constant vector behind it where there is one."""

    product: ir.Node
    addition: ir.Node | None
    bias: ir.Value | None

    @property
    def result(self) -> ir.Value:
        return (self.addition or self.product).outputs[0]


def _siblings(graph: ir.Graph) -> Iterator[list[_Linear]]:
    """Linear layers that read one value, two or more."""
    groups: dict[ir.Value, list[_Linear]] = {}
    for node in graph:
        if node.op_type == "MatMul" and node.inputs[0] is not None and _is_constant(node.inputs[1], 2):
            groups.setdefault(node.inputs[0], []).append(_linear(node))
    yield from (layers for layers in groups.values() if len(layers) > 1)


def _linear(product: ir.Node) -> _Linear:
    addition = _only_reader(product.outputs[0], "Add")
    vectors = [value for value in addition.inputs if _is_constant(value, 1)] if addition else []
    return _Linear(product, addition if vectors else None, vectors[0] if vectors else None)


def _fuse(layers: list[_Linear]) -> None:
    """One product in front of the first of these layers, whose parts stand for their results."""
    first = layers[0].product
    weights = [weight_array(_given(layer.product.inputs[1])) for layer in layers]
    sizes = [weight.shape[1] for weight in weights]
    new = Replacement(first)
    names = [str(layer.product.name) for layer in layers]
    value = new.add("MatMul", first.inputs[0], new.constant("joined_weight", np.concatenate(weights, axis=1)))
    _given(value.producer()).name = _joined_name(names)
    if any(layer.bias for layer in layers):
        vectors = [
            weight_array(layer.bias) if layer.bias else np.zeros(size, np.float32)
            for layer, size in zip(layers, sizes, strict=True)
        ]
        value = new.add("Add", value, new.constant("joined_bias", np.concatenate(vectors)))
    parts = new.split(value, new.constant("sizes", np.array(sizes)), tuple(map(str, range(len(sizes)))))
    for layer, part in zip(layers, parts, strict=True):
        old = layer.result
        part.name, part.type, part.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, part, replace_graph_outputs=True)
        old.name = f"{old.name}.alone"
    graph = first.graph
    assert isinstance(graph, ir.Graph)
    graph.remove([node for layer in layers for node in (layer.addition, layer.product) if node], safe=True)


def _joined_name(names: list[str]) -> str:
    """``self.query``, ``self.key`` and ``self.value`` as ``self.query_key_value``."""
    modules = {name.rpartition(".")[0] for name in names}
    if len(modules) > 1 or "" in modules:
        return names[0]
    return f"{modules.pop()}.{'_'.join(name.rpartition('.')[2] for name in names)}"


@dataclass(frozen=True)
class _Attention:
    """What one attention reads, heads first, and its last product. ``turned``: keys are [B, S, heads, D] instead."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    turned: bool
    bias: ir.Value
    scale: float
    last: ir.Node


def _attentions(graph: ir.Graph) -> Iterator[_Attention]:
    for node in graph:
        found = _attention(node) if node.op_type == "Softmax" else None
        if found is not None:
            yield found


def _attention(softmax: ir.Node) -> _Attention | None:
    """What a Softmax is the middle of, if it is as torch's scaled products are traced with a mask that is added."""
    biased, last = _made_by(softmax.inputs[0], "Add"), _only_reader(softmax.outputs[0], "MatMul")
    product = _made_by(biased.inputs[0], "MatMul") if biased is not None else None
    if biased is None or product is None or last is None or last.inputs[0] is not softmax.outputs[0]:
        return None
    query, factor = _unscaled(product.inputs[0])
    turned_keys, other = _unscaled(product.inputs[1])
    key, turned = _unturned(turned_keys)
    value, bias = last.inputs[1], biased.inputs[1]
    if query is None or key is None or value is None or bias is None or bias.shape is None or len(bias.shape) != 4:
        return None
    return _Attention(query, key, value, turned, bias, factor * other, last)


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What was multiplied by a single number, and that number; 1 where nothing was."""
    scaled = _made_by(value, "Mul")
    for index in (0, 1) if scaled is not None else ():
        tensor = ir.convenience.get_const_tensor(_given(_given(scaled).inputs[index]))
        if tensor is not None and tensor.size == 1:
            return _given(scaled).inputs[1 - index], float(tensor.numpy().ravel()[0])
    return value, 1.0


def _unturned(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The keys whose transpose a value is, None if it is none; whether their heads are behind the tokens."""
    around = _made_by(value, "Reshape")
    node = _made_by(around.inputs[0] if around else value, "Transpose")
    order = tuple(node.attributes.get_ints("perm", ())) if node else ()
    inner = _made_by(node.inputs[0], "Reshape") if node else None
    if around and inner and order == _LAST_TWO_OF_THREE:
        return inner.inputs[0], False
    if node is None or around or order not in (_LAST_TWO, _KEYS_TURNED):
        return None, False
    return node.inputs[0], order == _KEYS_TURNED


def _replace(found: _Attention) -> None:
    new, key = Replacement(found.last), found.key
    if found.turned:
        node = ir.node("Transpose", [key], attributes={"perm": _HEADS_FIRST}, name=f"{found.last.name}.keys")
        _given(found.last.graph).insert_before(found.last, node)
        key = node.outputs[0]
        key.name = f"{node.name}.out"
    assert math.isfinite(found.scale)
    inputs = (found.query, key, found.value, _for_each_query(new, found))
    new.finish(new.add("Attention", *inputs, scale=found.scale))


def _for_each_query(new: Replacement, found: _Attention) -> ir.Value:
    """The bias with a row for each query: ONNX Runtime's Attention repeats none."""
    if _given(found.bias.shape)[2] != 1:
        return found.bias
    size = new.add("Shape", found.query, name="queries", start=2, end=3)
    ones = new.constant("one", np.array([1])), new.constant("ones", np.array([1, 1]))
    return new.add("Expand", found.bias, new.add("Concat", ones[1], size, ones[0], name="sizes", axis=0))


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    (use,) = uses
    return use.node if use.node.op_type == operator else None


def _is_constant(value: ir.Value | None, rank: int) -> bool:
    tensor = value.const_value if value is not None else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == rank


def _given(value: Found | None) -> Found:
    assert value is not None
    return value
