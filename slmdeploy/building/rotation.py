"""Rotation: the residual stream and attention's values turned by Hadamard matrices, folded into the weights.

An orthogonal matrix spreads what one channel holds over all of them, so that no channel stands out, and RMS norms do
not see it: a decoder whose norms carry no gain computes the same in the turned stream (Ashkboos et al., arXiv
2404.00456). Gains go into the layers behind them, then the embedding and all that writes to the stream is turned by Q,
all that reads from it by Q transposed. Values of attention are turned within each head, o_proj back. What would have to
be turned while the graph runs (the input of down_proj, queries and keys) is left as it is. A tied embedding and head
become two tables. Walks graphs of the dialect ort, and portable ones whose norms are one operator, of which values of
attention stay as they are; refuses whatever it does not know to be exact: LayerNorm takes a mean, norms behind a branch
have gains that nothing behind them can take.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.folding import Place, constant_of, is_linear, linear_behind, places, put
from slmdeploy.building.rewriting import weight_array
from slmdeploy.errors import InputError

Floats = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
_NORMS = {"RMSNormalization": 1, "SimplifiedLayerNormalization": 1, "SkipSimplifiedLayerNormalization": 2}
"""RMS norms, and which input their gain is."""
_SKIP = "SkipSimplifiedLayerNormalization"


def rotate(model: ir.Model, *, seed: int = 0) -> dict[str, int]:
    """Turn the constants of a fp32 decoder in place; what it computes stays the same up to float32's rounding.

    ``seed`` draws the signs of the Hadamard matrices. Returns how many linear layers read the turned stream, how many
    write to it, and in how many attentions values are turned. Raises InputError for a graph that cannot be turned so.
    """
    walk = _Walk(model.graph)  # refuses before anything is changed
    heads = [place for place in places(model.graph) if place.kind == "attention"]
    turn = orthogonal(walk.width, seed)
    walk.fold_gains()
    _turn_rows(walk.table, turn, last=True)
    for node in walk.reads:
        _turn_rows(constant_of(node, 1), turn, last=False)
    for constant in walk.writes:
        _turn_rows(constant, turn, last=True)
    for place in heads:
        _turn_values(place, orthogonal(place.size // place.heads, seed + 1))
    return {"reads": len(walk.reads), "writes": walk.layers, "attentions": len(heads)}


def orthogonal(width: int, seed: int) -> Matrix:
    """A Hadamard matrix of this width over its root, with random signs; where none is known, a random rotation.

    Hadamard matrices are Sylvester's products of a smaller one from Paley's constructions (1933) with one of two rows;
    all entries are of one size, so nothing stays in one channel. A random rotation comes near to that.
    """
    random = np.random.default_rng(seed)
    signs = random.choice([-1.0, 1.0], width)
    found = _hadamard(width)
    if found is None:
        upper = np.linalg.qr(random.standard_normal((width, width)))
        return np.asarray(upper[0] * np.sign(np.diag(upper[1])))
    return np.asarray(signs[:, None] * found / np.sqrt(width))


def _hadamard(width: int) -> Matrix | None:
    small, doublings = width, 0
    while True:
        base = np.ones((1, 1)) if small == 1 else _paley(small)
        if base is not None:
            for _ in range(doublings):
                base = np.asarray(np.kron([[1, 1], [1, -1]], base), np.float64)
            return base
        if small % 2:
            return None
        small, doublings = small // 2, doublings + 1


def _paley(width: int) -> Matrix | None:
    """A Hadamard matrix of p + 1 rows for a prime p = 3 mod 4, or of 2 (p + 1) for p = 1 mod 4; None for others."""
    if width % 4 == 0 and _is_prime(width - 1):
        skew = _bordered(width - 1)
        skew[1:, 0] = -1
        return np.eye(width) + skew
    half = width // 2
    if width % 4 == 0 and half > 2 and (half - 1) % 4 == 1 and _is_prime(half - 1):
        return np.kron(_bordered(half - 1), [[1, 1], [1, -1]]) + np.kron(np.eye(half), [[1, -1], [-1, -1]])
    return None


def _bordered(prime: int) -> Matrix:
    """The quadratic characters of i - j, with a row and a column of ones around and zero in the corner."""
    squares = {i * i % prime for i in range(1, prime)}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, prime)])
    inside = character[(np.arange(prime)[:, None] - np.arange(prime)) % prime]
    found = np.ones((prime + 1, prime + 1))
    found[0, 0], found[1:, 1:] = 0, inside
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


class _Walk:
    """What a decoder's graph does to its residual stream, found before anything is turned.

    ``gains`` are the norms with the layers that read them, ``reads`` the linear layers that read the stream, ``writes``
    the constants (weights and biases) whose columns are added to it.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.gains: list[tuple[ir.Value, list[ir.Node]]] = []
        self.reads: list[ir.Node] = []
        self.writes: list[ir.Value] = []
        self.layers = 0
        self._stream: set[ir.Value] = set()
        self._normed: dict[ir.Value, list[ir.Node]] = {}
        embedding = next((node for node in graph if self._is_table(node)), None)
        if embedding is None:
            raise InputError("the graph has no fp32 embedding, so it cannot be rotated: export it again")
        self.table = constant_of(embedding, 0)
        if len(tuple(self.table.uses())) > 1:
            raise self._refused(embedding)
        self.width = weight_array(self.table).shape[1]
        self._stream.add(embedding.outputs[0])
        for node in graph:
            if any(value in self._stream or value in self._normed for value in node.inputs):
                self._visit(node)
                turned = (value for value in node.outputs if value in self._stream or value in self._normed)
                if any(value.is_graph_output() for value in turned):
                    raise self._refused(node)

    def fold_gains(self) -> None:
        """Put each norm's gain into the rows of the layers behind it, and ones in its place."""
        for gain, readers in self.gains:
            factors = weight_array(gain)
            for node in readers:
                weight = constant_of(node, 1)
                put(weight, weight_array(weight) * factors[:, None])
            put(gain, np.ones_like(factors))

    def _is_table(self, node: ir.Node) -> bool:
        table = node.inputs[0] if node.op_type == "Gather" else None
        tensor = table.const_value if table is not None else None
        ids = any(value is not None and value.name == "input_ids" for value in node.inputs[1:])
        return ids and tensor is not None and tensor.dtype == ir.DataType.FLOAT

    def _visit(self, node: ir.Node) -> None:
        source, kind = node.inputs[0], node.op_type
        if kind in _NORMS:
            self._norm(node)
        elif source in self._normed and is_linear(node):
            self._normed[source].append(node)
            self.reads.append(node)
        elif source is not None and (source in self._stream or source in self._normed) and self._chooses_rows(node):
            self._pass_on(source, node.outputs[0])
        elif kind == "Add":
            self._join(node, node.inputs[:2])
            self._stream.add(node.outputs[0])
        elif kind == "Mul" and source in self._stream and self._scalar(node):
            self._stream.add(node.outputs[0])
        elif kind == "Shape":
            return
        else:
            raise self._refused(node)

    def _norm(self, node: ir.Node) -> None:
        place = _NORMS[node.op_type]
        if len(node.inputs) > place + 1 and node.inputs[place + 1] is not None:
            raise self._refused(node)
        self._join(node, node.inputs[:place])
        readers: list[ir.Node] = []
        gain = constant_of(node, place)
        if len(tuple(gain.uses())) > 1:
            raise self._refused(node)
        self.gains.append((gain, readers))
        self._normed[node.outputs[0]] = readers
        if node.op_type == _SKIP and len(node.outputs) > 3:
            self._stream.add(node.outputs[3])

    def _join(self, node: ir.Node, values: Sequence[ir.Value | None]) -> None:
        """The stream and branches that are added to it: each branch ends in a linear layer, whose columns turn."""
        for value in values:
            if value is None or value in self._stream:
                continue
            found = linear_behind(value)
            if found is None or len(tuple(value.uses())) > 1:
                raise self._refused(node)
            self.layers += 1
            self.writes += [constant for constant in (constant_of(found[0], 1), found[1]) if constant is not None]

    def _pass_on(self, source: ir.Value, result: ir.Value) -> None:
        if source in self._stream:
            self._stream.add(result)
        else:
            self._normed[result] = self._normed[source]

    def _chooses_rows(self, node: ir.Node) -> bool:
        """Whether a node gives rows of what it reads, all channels of each."""
        if node.op_type == "Gather":
            return node.attributes.get_int("axis", 0) == 0
        if node.op_type != "Reshape":
            return False
        shape = constant_of(node, 1).const_value
        return shape is not None and int(shape.numpy()[-1]) == self.width

    def _scalar(self, node: ir.Node) -> bool:
        factor = node.inputs[1]
        return factor is not None and factor.const_value is not None and factor.const_value.size == 1

    def _refused(self, node: ir.Node) -> InputError:
        return InputError(
            f"the graph cannot be rotated: {node.op_type} {node.name!r} does more with the residual stream than RMS "
            "norms and sums do: leave rotate out of the profile"
        )


def _turn_rows(constant: ir.Value, turn: Matrix, *, last: bool) -> None:
    """constant · turn along the last axis, or turnᵀ · constant along the first; computed in float64."""
    array = weight_array(constant).astype(np.float64)
    put(constant, (array @ turn if last else turn.T @ array).astype(np.float32))


def _turn_values(place: Place, turn: Matrix) -> None:
    """Each KV head's values times ``turn``, and its transpose in the rows that read them."""
    dim = len(turn)
    for maker in place.makers:
        array = weight_array(maker.constant).astype(np.float64)
        part = array[..., maker.start : maker.stop]
        array[..., maker.start : maker.stop] = (part.reshape(-1, place.heads, dim) @ turn).reshape(part.shape)
        put(maker.constant, array.astype(np.float32))
    for node in place.readers:
        weight = constant_of(node, 1)
        array = weight_array(weight).astype(np.float64)
        turned = np.einsum("de,hdn->hen", turn, array.reshape(-1, dim, array.shape[1]))
        put(weight, turned.reshape(array.shape).astype(np.float32))
