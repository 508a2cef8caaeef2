"""A float32 graph of the portable dialect as one that computes in float16: what strongly typed compilers take.

Weights, activations, attention and the KV cache become float16. What float16 cannot hold stays float32 between casts:
the angles of rotations (positions times frequencies), the mean of squares of a normalisation that is written out, and
an encoder's pooling, sums over tokens and what follows them; the single operators for normalisation compute in float32
inside, by their attribute stash_type. Logits leave in float32, and inputs other than the cache come in it. Scales of
FP8 become float16 like what they scale, so fp8.py rounds them beforehand. Knows nothing of quality: a model whose
activations leave float16's range shows it in the gate.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_ANGLES = ("Cos", "Sin")
_NORM_STEPS = ("Add", "Sqrt", "Div", "Mul")
"""What follows the mean of squares of a written-out RMS normalisation, in this order."""
_SUMS = ("ReduceSum", "ReduceL2")
CACHE = ("past_key_values.", "present.")
"""How the inputs and outputs that hold keys and values begin; all other outputs stay float32."""
_LARGEST = np.float32(np.finfo(np.float16).max)


def to_half(model: ir.Model) -> None:
    """Make float16 of ``model``'s float32, but for what has to stay; interfaces keep their names and shapes."""
    graph = model.graph
    for inner in (value for node in graph for value in node.outputs if not value.is_graph_output()):
        inner.shape = None  # a tracer's may contradict what is inferred, and then no type would be
    ShapeInferencePass()(model)
    exact = {id(node) for node in _exact(graph)}
    for given in graph.inputs:
        if _is_float(given) and (given.name or "").startswith(CACHE):
            given.type = ir.TensorType(_HALF)
    made = _Casts(graph)
    for node in list(graph):
        wanted = _FLOAT if id(node) in exact else _HALF
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (_FLOAT, _HALF) and value.dtype != wanted:
                node.replace_input_with(index, made.of(value, wanted, node))
        _retype(node, wanted)
    for index, result in enumerate(graph.outputs):
        if result.dtype == _HALF and not (result.name or "").startswith(CACHE):
            graph.outputs[index] = made.output(result)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _retype(node: ir.Node, wanted: ir.DataType) -> None:
    for value in node.outputs:
        if _is_float(value):
            value.type = ir.TensorType(wanted)
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == int(_FLOAT):
        node.attributes["to"] = ir.AttrInt64("to", int(wanted))


def _exact(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes that stay float32."""
    for node in graph:
        if node.op_type in _ANGLES:
            yield from _with_ancestors(node)
        elif node.op_type == "ReduceMean":
            yield from _norm_around(node)
        elif node.op_type in _SUMS:
            yield from _with_followers(node)
        elif _makes_floats(node):
            yield node


def _with_ancestors(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None and any(_is_float(output) for output in producer.outputs):
            yield from _with_ancestors(producer)


def _with_followers(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for value in node.outputs:
        if _is_float(value):
            for user in {user for user, _ in value.uses()}:
                yield from _with_followers(user)


def _norm_around(mean: ir.Node) -> Iterator[ir.Node]:
    """The square before a mean, and what follows it up to the product with the weight."""
    yield mean
    square = mean.inputs[0].producer() if mean.inputs[0] is not None else None
    if square is not None:
        yield square
    node = mean
    for operator in _NORM_STEPS:
        users = [user for user, _ in node.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type != operator:
            return
        node = users[0]
        yield node


def _makes_floats(node: ir.Node) -> bool:
    """Whether a node gives float32 whatever it reads, such as ConstantOfShape; a Cast can give float16 itself."""
    reads = any(value is not None and _is_float(value) for value in node.inputs)
    return not reads and node.op_type != "Cast" and any(_is_float(value) for value in node.outputs)


class _Casts:
    """Values in the other precision, each made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[int, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node) -> ir.Value:
        """``value`` in ``dtype``, in front of ``reader``: a constant converted here, anything else by a Cast."""
        key = id(value), dtype
        if key not in self._made:
            constant = value.const_value is not None
            self._made[key] = self._constant(value) if constant else self._cast(value, dtype, reader)
        return self._made[key]

    def _constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy()
        name = f"{value.name}.half"
        tensor = ir.tensor(np.clip(array, -_LARGEST, _LARGEST).astype(np.float16), name=name)
        made = ir.Value(name=name, type=ir.TensorType(_HALF), shape=ir.Shape(array.shape), const_value=tensor)
        self._graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node | None) -> ir.Value:
        name = f"{value.name}.{'half' if dtype == _HALF else 'float'}"
        node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=name)
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{name}.out", ir.TensorType(dtype), value.shape
        if reader is None:
            self._graph.append(node)
        else:
            self._graph.insert_before(reader, node)
        return made

    def output(self, value: ir.Value) -> ir.Value:
        """A float32 output that takes over the name of the float16 ``value``."""
        name = value.name
        value.name = f"{name}.half"
        made = self._cast(value, _FLOAT, None)
        made.name = name
        return made


def _is_float(value: ir.Value) -> bool:
    return bool(value.dtype == _FLOAT)
