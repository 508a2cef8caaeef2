"""Where a decoder's graph can be rescaled without a change in what it computes: places in front of linear layers.

What a linear layer reads is made by something linear in its own constants: a norm in its gain, a gated MLP in the half
that is not activated, attention in its values. Divide those constants by a factor per channel, multiply the rows of the
readers by it, and the product is the same. Finds such places by the operators and constants of the graph, not by names,
and changes constants alone. Knows nothing of why one would: smooth.py chooses factors, rotation.py turns. Attention is
found in the form of the dialect ort (GroupQueryAttention), norms and MLPs in both dialects.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.rewriting import weight_array

Floats = npt.NDArray[np.float32]
_NORMS = {
    "SimplifiedLayerNormalization": slice(1, 2),
    "RMSNormalization": slice(1, 2),
    "LayerNormalization": slice(1, 3),
    "SkipSimplifiedLayerNormalization": slice(2, 3),
    "SkipLayerNormalization": slice(2, 4),
}
"""Operators that end in a gain per channel, perhaps with a bias behind it, and which inputs those are."""


@dataclass(frozen=True)
class Columns:
    """Some columns of a constant, counted along its last axis."""

    constant: ir.Value
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """A value [..., K] that linear layers read, and the constants that its channels come from.

    ``channels``, int64 [K], says for each channel which of the makers' columns it comes from: where query heads share
    a KV head, several come from one. ``kind`` is norm, product or attention, ``heads`` the KV heads of the latter.
    """

    value: ir.Value
    kind: str
    makers: tuple[Columns, ...]
    readers: tuple[ir.Node, ...]
    channels: npt.NDArray[np.int64]
    heads: int = 1

    @property
    def name(self) -> str:
        """That of the value."""
        assert self.value.name
        return self.value.name

    @property
    def size(self) -> int:
        """How many factors the place takes."""
        return self.makers[0].stop - self.makers[0].start

    def weights(self) -> list[Floats]:
        """The weights [K, N] of the readers."""
        return [weight_array(constant_of(node, 1)) for node in self.readers]

    def divide(self, factors: Floats) -> None:
        """Divide the value's channels by ``factors`` [size], all above 0, and multiply its readers' rows by them."""
        for maker in self.makers:
            array = weight_array(maker.constant).copy()
            array[..., maker.start : maker.stop] /= factors
            put(maker.constant, array)
        for node in self.readers:
            weight = constant_of(node, 1)
            put(weight, weight_array(weight) * factors[self.channels][:, None])


def places(graph: ir.Graph) -> list[Place]:
    """All places of ``graph``, in its order; values whose makers or readers anything else depends on are left out."""
    found = []
    for value in _read_by_linear(graph):
        readers = tuple(use.node for use in value.uses())
        place = _norm(value, readers) or _product(value, readers) or _attention(value, readers)
        if place is not None:
            found.append(place)
    return found


def constant_of(node: ir.Node, position: int) -> ir.Value:
    """The constant that a node has at this input."""
    value = node.inputs[position]
    assert value is not None
    assert value.const_value is not None
    return value


def put(constant: ir.Value, array: Floats) -> None:
    """Give a constant this content."""
    constant.const_value = ir.tensor(np.ascontiguousarray(array, np.float32), name=constant.name)


def is_linear(node: ir.Node | None) -> bool:
    """Whether a node is a MatMul with a constant fp32 matrix that nothing else reads."""
    return node is not None and node.op_type == "MatMul" and _own(node.inputs[1], axes=2)


def linear_behind(value: ir.Value) -> tuple[ir.Node, ir.Value | None] | None:
    """The linear layer whose output ``value`` is, with its bias if one is added; None for anything else.

    Nothing but the addition reads the product where there is one.
    """
    node = value.producer()
    if node is not None and node.op_type == "Add":
        for product, bias in (node.inputs, tuple(reversed(node.inputs))):
            if product is not None and _own(bias, axes=1) and is_linear(product.producer()):
                return (_node(product), bias) if _read_once(product) else None
    return (_node(value), None) if is_linear(node) else None


def behind_rows(value: ir.Value) -> ir.Value:
    """What ``value`` holds some rows of: the value in front of a Reshape and a Gather that choose rows."""
    node = value.producer()
    if node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return value
    flat = node.inputs[0]
    reshape = flat.producer() if flat is not None else None
    if reshape is None or reshape.op_type != "Reshape" or flat is None or not _read_once(flat):
        return value
    shape, source = reshape.inputs[1], reshape.inputs[0]
    if source is None or shape is None or shape.const_value is None or len(shape.const_value.numpy()) != 2:
        return value
    return source


def _read_by_linear(graph: ir.Graph) -> Iterator[ir.Value]:
    """Values that linear layers read and nothing else does, each once."""
    seen: set[ir.Value] = set()
    for node in graph:
        source = node.inputs[0] if is_linear(node) else None
        if source is None or source in seen or source.is_graph_output():
            continue
        seen.add(source)
        if all(is_linear(use.node) and use.idx == 0 for use in source.uses()):
            yield source


def _norm(value: ir.Value, readers: tuple[ir.Node, ...]) -> Place | None:
    """The output of a norm, or of a product with a constant vector, which is how a norm is spelt out."""
    node = value.producer()
    if node is None or node.outputs[0] is not value:
        return None
    at = _NORMS.get(node.op_type)
    vectors = node.inputs if node.op_type == "Mul" else node.inputs[at] if at is not None else ()
    makers = tuple(_whole(vector) for vector in vectors if vector is not None and _own(vector, axes=1))
    expected = len([vector for vector in vectors if vector is not None]) if at is not None else 1
    if len(makers) != expected or not makers:
        return None
    return Place(value, "norm", makers, readers, np.arange(makers[0].stop))


def _product(value: ir.Value, readers: tuple[ir.Node, ...]) -> Place | None:
    """activation(gate) * up: the half that is not activated is the output of a linear layer."""
    node = value.producer()
    if node is None or node.op_type != "Mul":
        return None
    for factor in node.inputs:
        makers = _columns(factor) if factor is not None and _read_once(factor) else ()
        if makers:
            return Place(value, "product", makers, readers, np.arange(makers[0].stop - makers[0].start))
    return None


def _attention(value: ir.Value, readers: tuple[ir.Node, ...]) -> Place | None:
    """The output of GroupQueryAttention, a mixture of values, which are columns of a linear layer's output."""
    attended = behind_rows(value)
    node = attended.producer()
    if node is None or node.op_type != "GroupQueryAttention" or node.outputs[0] is not attended:
        return None
    if not _read_once(attended):
        return None
    heads, groups = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    packed = node.inputs[2] is None
    source = node.inputs[0 if packed else 2]
    makers = _columns(source) if source is not None and _read_once(source) else ()
    if not makers:
        return None
    whole = makers[0].stop - makers[0].start
    dim = whole // (heads + 2 * groups) if packed else whole // groups
    values = tuple(Columns(maker.constant, maker.stop - groups * dim, maker.stop) for maker in makers)
    shared = np.arange(heads)[:, None] // (heads // groups) * dim + np.arange(dim)
    return Place(value, "attention", values, readers, shared.ravel(), groups)


def _columns(value: ir.Value) -> tuple[Columns, ...]:
    """The columns of weight and bias that ``value`` comes from: a linear layer's output, or one part of its Split."""
    node = value.producer()
    if node is None or node.op_type != "Split":
        return _linear_columns(value, 0, None)
    whole, sizes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if whole is None or sizes is None or sizes.const_value is None or not _read_once(whole):
        return ()
    if node.attributes.get_int("axis", 0) != -1:
        return ()
    ends = np.cumsum(sizes.const_value.numpy())
    index = node.outputs.index(value)
    return _linear_columns(whole, int(ends[index - 1]) if index else 0, int(ends[index]))


def _linear_columns(value: ir.Value, start: int, stop: int | None) -> tuple[Columns, ...]:
    found = linear_behind(value)
    if found is None:
        return ()
    weight, bias = constant_of(found[0], 1), found[1]
    stop = stop if stop is not None else weight_array(weight).shape[1]
    return tuple(Columns(constant, start, stop) for constant in (weight, bias) if constant is not None)


def _whole(vector: ir.Value) -> Columns:
    return Columns(vector, 0, weight_array(vector).shape[0])


def _own(value: ir.Value | None, *, axes: int) -> bool:
    """Whether a value is a constant of fp32 with so many axes, longer than 1, that only one node reads."""
    if value is None or value.const_value is None or len(tuple(value.uses())) != 1:
        return False
    shape = value.const_value.shape.numpy()
    return value.const_value.dtype == ir.DataType.FLOAT and len(shape) == axes and shape[-1] > 1


def _read_once(value: ir.Value) -> bool:
    return len(tuple(value.uses())) == 1 and not value.is_graph_output()


def _node(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
