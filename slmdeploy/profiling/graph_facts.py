"""What an ONNX graph makes a machine do: its matrices with their forms and sizes, and how many operators it runs.

Reads the file's protobuf without the onnx package and without its tensors, so it takes milliseconds and runs on a
device. Sizes come from the graph itself and not from config.json, so pruned models with uneven layers, encoders and
the graphs of a phase split are all the same to it. Knows nothing of time (roofline.py) or of folders (facts.py).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slmdeploy.errors import CorruptArtifactError
from slmdeploy.profiling.wire import Value, fields

FORMS = ("fp32", "w8a8", "int8", "int4")
"""Forms of a matrix, as kernels differ: float32; 8-bit weights and activations; weights in blocks of 8 or 4 bits."""

_BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 10: 16, 11: 64, 16: 16, 17: 8, 21: 4, 22: 4}
"""TensorProto.DataType and the bits of an element, of the types that weights have."""
_BLOCKS = {4: "int4", 8: "int8"}
_INTEGER = {"MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "QLinearMatMul": 3, "QGemm": 3}
"""Operators that multiply 8-bit activations, and which of their inputs the weight is."""
_FLOAT = ("MatMul", "Gemm", "FusedMatMul")
_KEPT = "logits_positions"


@dataclass(frozen=True)
class Linear:
    """One matrix [inputs, outputs]; ``kept``: only the rows that logits are asked of reach it."""

    form: str
    inputs: int
    outputs: int
    bytes: int
    kept: bool


@dataclass(frozen=True)
class GraphFacts:
    """The matrices of a graph and the number of operators that a run of it executes."""

    linears: tuple[Linear, ...]
    nodes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices: what a run reads."""
        return sum(linear.bytes for linear in self.linears)

    @property
    def forms(self) -> frozenset[str]:
        """The forms of the matrices that every row passes; those of the head alone do not count."""
        return frozenset(linear.form for linear in self.linears if not linear.kept)


@dataclass
class _Tensor:
    dims: list[int] = field(default_factory=list)
    element: int = 0

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * _BITS.get(self.element, 32) // 8


@dataclass
class _Node:
    kind: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    integers: dict[str, int] = field(default_factory=dict)


def read_graph(path: Path) -> GraphFacts:
    """The facts of an .onnx file. Raises CorruptArtifactError for one that is no ONNX graph or has no operator."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorruptArtifactError(f"{path} cannot be read: {error}; make or unpack the artifact again") from error
    facts = _facts(content, str(path))
    if facts.nodes == 0:
        raise CorruptArtifactError(f"{path} has no operator: make or unpack the artifact again")
    return facts


def _facts(model: bytes, name: str) -> GraphFacts:
    graph = [part for number, part in fields(model, name) if number == 7]
    parts = [part for one in graph for part in fields(_message(one, name), name)]
    nodes = [_node(_message(value, name), name) for number, value in parts if number == 1]
    tensors = dict(_tensor(_message(value, name), name) for number, value in parts if number == 5)
    return GraphFacts(tuple(_linears(nodes, tensors)), len(nodes))


def _linears(nodes: list[_Node], tensors: Mapping[str, _Tensor]) -> Iterator[Linear]:
    """The matrices in the graph's order, which ONNX wants to be one of execution."""
    kept = {_KEPT}
    source = {name: node for node in nodes for name in node.outputs}
    for node in nodes:
        reached = not kept.isdisjoint(node.inputs)
        if reached:
            kept.update(node.outputs)
        # The positions choose rows of what other operators made; what comes of that has as many rows as there are.
        linear = _linear(node, tensors, source, reached)
        if linear:
            yield linear


def _linear(node: _Node, tensors: Mapping[str, _Tensor], source: Mapping[str, _Node], kept: bool) -> Linear | None:
    if node.kind == "MatMulNBits":
        stored = sum(tensors[name].bytes for name in node.inputs[1:] if name in tensors)
        form = _BLOCKS.get(node.integers.get("bits", 4), "int8")
        return Linear(form, node.integers["K"], node.integers["N"], stored, kept)
    at = 1 if node.kind in _FLOAT else _INTEGER.get(node.kind)
    if at is None or len(node.inputs) <= at:
        return None
    weight = _stored(node.inputs[at], tensors, source)
    if weight is None or len(weight.dims) != 2:
        return None
    rows, columns = weight.dims[::-1] if node.integers.get("transB") else weight.dims
    eight = node.kind in _INTEGER or _BITS.get(weight.element) == 8
    return Linear("w8a8" if eight else "fp32", rows, columns, weight.bytes, kept)


def _stored(name: str, tensors: Mapping[str, _Tensor], source: Mapping[str, _Node]) -> _Tensor | None:
    """The tensor behind a value, through what only changes its form; None for a value that is computed."""
    while name not in tensors:
        node = source.get(name)
        if node is None or node.kind not in ("DequantizeLinear", "Cast", "Transpose") or not node.inputs:
            return None
        name = node.inputs[0]
    return tensors[name]


def _node(message: memoryview, name: str) -> _Node:
    node = _Node()
    for number, value in fields(message, name):
        match number:
            case 1:
                node.inputs.append(_text(value, name))
            case 2:
                node.outputs.append(_text(value, name))
            case 4:
                node.kind = _text(value, name)
            case 5:
                attribute = dict(fields(_message(value, name), name))
                if isinstance(attribute.get(3), int):
                    node.integers[_text(attribute.get(1, memoryview(b"")), name)] = int(attribute[3])
    return node


def _tensor(message: memoryview, name: str) -> tuple[str, _Tensor]:
    tensor, label = _Tensor(), ""
    for number, value in fields(message, name):
        match number:
            case 1 if isinstance(value, int):
                tensor.dims.append(value)
            case 1:  # repeated integers may be packed into one field
                tensor.dims.extend(_packed(_message(value, name), name))
            case 2 if isinstance(value, int):
                tensor.element = value
            case 8:
                label = _text(value, name)
    return label, tensor


def _packed(content: memoryview, name: str) -> list[int]:
    # A varint alone is what `fields` reads behind a tag, so each gets the tag of field 1 in front.
    sizes, start = [], 0
    for at, byte in enumerate(content):
        if byte < 0x80:
            sizes += [value for _, value in fields(b"\x08" + bytes(content[start : at + 1]), name)]
            start = at + 1
    return [size for size in sizes if isinstance(size, int)]


def _message(value: Value, name: str) -> memoryview:
    if isinstance(value, int):
        raise CorruptArtifactError(f"{name} is no ONNX file: make or unpack the artifact again")
    return value


def _text(value: Value, name: str) -> str:
    return bytes(_message(value, name)).decode("utf-8", errors="replace")
