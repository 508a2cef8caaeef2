"""Attention of many short pieces behind one prefix, in plain operators: what the scoring graph has for each layer.

GroupQueryAttention computes every token against every other of a pack and throws most of it away by a bias. Here the
tokens of a run are laid out in blocks of a few whole pieces; a block's queries meet the prefix's keys and the block's
own, and nothing else. Layout, repetition of the prefix for each block and the transposition of heads are one Gather of
rows of head_dim numbers each; the index arithmetic is done once per graph and head layout, not per layer. Exact: the
same products and the same softmax (Vaswani et al., arXiv 1706.03762), with hidden pairs at -1e9.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from slmdeploy.building.rewriting import MICROSOFT, Replacement

_DEPTH = np.float32(60)
_HIDDEN = np.float32(-1e9)
POSITIONS = "positions.output"
"""The value of a generating graph that holds the position of each token, where it has one."""


@dataclass(frozen=True)
class Layout:
    """What the index arithmetic depends on: query heads, key-value heads, head_dim, and the window of the layer."""

    heads: int
    groups: int
    dim: int
    window: int | None

    @property
    def label(self) -> str:
        """Part of the names of what belongs to it."""
        return ".".join(str(n) for n in (self.heads, self.groups, self.dim, *([self.window] if self.window else [])))


class BlockAttention:
    """Replaces the GroupQueryAttention nodes of one graph, whose new inputs it declares.

    position_ids int64 [1, tokens]; query_tokens int64 [blocks, slots], the token in each slot; key_tokens int64
    [blocks, width], the rows that a block sees, counted over past and tokens together; attention_bias float32
    [blocks, 1, slots, width]; token_blocks and token_slots int64 [tokens], where each token's query stands.
    """

    def __init__(self, graph: ir.Graph) -> None:
        integer, number = ir.DataType.INT64, ir.DataType.FLOAT
        self._graph = graph
        self.position_ids = self._input("position_ids", integer, (1, "tokens"))
        self.query_tokens = self._input("query_tokens", integer, ("blocks", "slots"))
        self.key_tokens = self._input("key_tokens", integer, ("blocks", "width"))
        self.bias = self._input("attention_bias", number, ("blocks", 1, "slots", "width"))
        self.token_blocks = self._input("token_blocks", integer, ("tokens",))
        self.token_slots = self._input("token_slots", integer, ("tokens",))
        self._indices: dict[Layout, _Indices] = {}
        positions = next((value for node in graph for value in node.outputs if value.name == POSITIONS), None)
        if positions is not None:
            ir.convenience.replace_all_uses_with(positions, self.position_ids)

    def _input(self, name: str, dtype: ir.DataType, shape: tuple[int | str, ...]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._graph.inputs.append(value)
        return value

    def replace(self, node: ir.Node) -> None:
        """Put block attention in the place of ``node``; its past and present become rows [1, length, kv_heads x D]."""
        layout = _layout(node)
        heads, groups, dim = layout.heads, layout.groups, layout.dim
        new = Replacement(node)
        past_key, past_value = (_as_rows(past, groups * dim) for past in node.inputs[3:5])
        if layout not in self._indices:
            self._indices[layout] = _Indices(self, new, layout, past_key)
        index = self._indices[layout]
        query, key, value = self._rotated(new, node, layout)
        keys, values = (
            new.add("Concat", past, rows, name=f"{part}s", axis=1)
            for part, past, rows in (("key", past_key, key), ("value", past_value, value))
        )
        flat = new.constant("block.flat", np.array([-1, dim], np.int64), shared=True)
        queries = new.add("Gather", new.add("Reshape", query, flat, name="query_rows"), index.queries, name="queries")
        queries = new.add("Reshape", queries, index.query_shape, name="query_blocks")
        seen_keys, seen_values = (
            new.add("Gather", new.add("Reshape", rows, flat, name=f"{part}_rows"), index.keys, name=f"{part}_blocks")
            for part, rows in (("key", keys), ("value", values))
        )
        scale = _number(node, "scale") or dim**-0.5
        products = new.add("FusedMatMul", queries, seen_keys, name="products", domain=MICROSOFT, transB=1, alpha=scale)
        products = _softcapped(new, products, _number(node, "softcap"))
        weights = _softmax(new, new.add("Add", products, index.bias, name="biased"))
        mixed = new.add("Reshape", new.add("MatMul", weights, seen_values, name="mixed"), flat, name="mixed_rows")
        wide = new.constant("wide", np.array([1, -1, heads * dim], np.int64))
        out = new.add("Reshape", new.add("Gather", mixed, index.outputs, name="tokens"), wide, name="out")
        new.finish(out, keys, values)

    def _rotated(self, new: Replacement, node: ir.Node, layout: Layout) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Query and key with rotary embedding, and value: [1, tokens, heads x D] each."""
        heads, groups, dim = layout.heads, layout.groups, layout.dim
        query, key, value = node.inputs[:3]
        if key is None:
            sizes = new.constant("sizes", np.array([heads * dim, groups * dim, groups * dim], np.int64))
            query, key, value = new.split(query, sizes, ("query", "key", "value"))
        assert query is not None
        assert value is not None
        if not node.attributes["do_rotary"].as_int():
            return query, key, value
        return (
            self._turned(new, node, "query", query, heads, dim),
            self._turned(new, node, "key", key, groups, dim),
            value,
        )

    def _turned(self, new: Replacement, node: ir.Node, name: str, x: ir.Value, heads: int, dim: int) -> ir.Value:
        cos, sin = node.inputs[7:9]
        assert cos is not None
        assert cos.shape is not None
        half = cos.shape[1]
        assert isinstance(half, int)
        sizes = {"num_heads": heads} | ({} if 2 * half == dim else {"rotary_embedding_dim": 2 * half})
        inputs = (x, self.position_ids, cos, sin)
        return new.add("RotaryEmbedding", *inputs, name=f"{name}.rotary", domain=MICROSOFT, **sizes)


class _Indices:
    """Which rows of head_dim numbers go where, for one layout of heads; and the bias for its stacked query heads."""

    def __init__(self, inputs: BlockAttention, new: Replacement, layout: Layout, past: ir.Value) -> None:
        heads, groups, dim = layout.heads, layout.groups, layout.dim
        shared = heads // groups
        self._new, self._name = new, f"blocks.{layout.label}"
        blocks, slots = (
            new.add("Shape", inputs.query_tokens, name=f"{self._name}.{name}", start=axis, end=axis + 1)
            for axis, name in enumerate(("blocks", "slots"))
        )
        stacked = self._op("Mul", "stacked", slots, self._constant("shared", [shared]))
        self.query_shape = new.add(
            "Concat",
            blocks,
            self._constant("groups", [groups]),
            stacked,
            self._constant("dim", [dim]),
            name=f"{self._name}.query_shape",
            axis=0,
        )
        self.queries = self._rows(inputs.query_tokens, heads, "queries")
        self.keys = self._rows(inputs.key_tokens, groups, "keys")
        block = self._head_rows(inputs.token_blocks, heads, "outputs", np.arange(heads)[None, :])
        slot = self._op("Unsqueeze", "slot", inputs.token_slots, self._constant("head_axis", [1]))
        self.outputs = self._op("Add", "outputs", self._op("Mul", "outputs.slots", block, slots), slot)
        tiles = self._constant("tiles", [1, 1, shared, 1])
        bias = inputs.bias if layout.window is None else self._windowed(inputs, layout.window, past)
        self.bias = self._op("Tile", "bias", bias, tiles) if shared > 1 else bias

    def _windowed(self, inputs: BlockAttention, window: int, past: ir.Value) -> ir.Value:
        """The bias with keys hidden that lie `window` or more positions before the query."""
        line = self._op("Reshape", "positions", inputs.position_ids, self._constant("flat", [-1]))
        zero, one = (self._new.constant(f"block.{n}", np.int64(n), shared=True) for n in (0, 1))
        length = self._new.add("Shape", past, name=f"{self._name}.past", start=1, end=2)
        before = self._op("Range", "before", zero, self._op("Squeeze", "past.length", length), one)
        every = self._new.add("Concat", before, line, name=f"{self._name}.every", axis=0)
        query = self._op("Gather", "query.positions", line, inputs.query_tokens)
        key = self._op("Gather", "key.positions", every, inputs.key_tokens)
        query = self._op("Unsqueeze", "query.column", query, self._constant("column", [1, 3]))
        key = self._op("Unsqueeze", "key.row", key, self._constant("row", [1, 2]))
        apart = self._op("Sub", "apart", query, key)
        size = self._new.constant(f"{self._name}.window", np.int64(window), shared=True)
        far = self._op("GreaterOrEqual", "far", apart, size)
        hidden = self._new.constant("block.hidden", _HIDDEN, shared=True)
        return self._op("Where", "windowed", far, hidden, inputs.bias)

    def _rows(self, tokens: ir.Value, heads: int, name: str) -> ir.Value:
        """Row numbers [blocks, heads, n] of tokens [blocks, n], where each token has ``heads`` rows."""
        return self._head_rows(tokens, heads, name, np.arange(heads)[None, :, None])

    def _head_rows(self, tokens: ir.Value, heads: int, name: str, offsets: np.ndarray) -> ir.Value:
        apart = self._op("Unsqueeze", f"{name}.apart", tokens, self._constant("head_axis", [1]))
        first = self._op("Mul", f"{name}.first", apart, self._constant(f"{name}.heads", [heads]))
        return self._op("Add", f"{name}.rows", first, self._constant(f"{name}.offsets", offsets))

    def _constant(self, name: str, values: list[int] | np.ndarray) -> ir.Value:
        return self._new.constant(f"{self._name}.{name}", np.asarray(values, np.int64), shared=True)

    def _op(self, operator: str, name: str, *inputs: ir.Value) -> ir.Value:
        return self._new.add(operator, *inputs, name=f"{self._name}.{name}")


def _number(node: ir.Node, name: str) -> float | None:
    """A float attribute; None where it is absent."""
    return node.attributes[name].as_float() if name in node.attributes else None


def _softcapped(new: Replacement, products: ir.Value, cap: float | None) -> ir.Value:
    """cap tanh(products / cap); the products themselves without a cap."""
    if cap is None:
        return products
    value = new.constant("softcap", np.float32(cap))
    bounded = new.add("Tanh", new.add("Div", products, value, name="divided"), name="bounded")
    return new.add("Mul", bounded, value, name="softcapped")


def _softmax(new: Replacement, scores: ir.Value) -> ir.Value:
    """Softmax of the last axis with hidden scores raised to the row's largest less _DEPTH, as numbers that are normal.

    exp(-1e9) comes out of ONNX Runtime's kernel as a denormal number, and arithmetic on those made this softmax four
    times slower. e^-60 is 1e-26: sums of a million of them are still lost in float32, so the result is the same.
    """
    last_axis = new.constant("block.last_axis", np.array([-1], np.int64), shared=True)
    depth = new.constant("block.depth", _DEPTH, shared=True)
    floor = new.add("Sub", new.add("ReduceMax", scores, last_axis, name="largest"), depth, name="floor")
    return new.add("Softmax", new.add("Max", scores, floor, name="raised"), name="weights", axis=-1)


def _layout(node: ir.Node) -> Layout:
    heads, groups = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    window = node.attributes["local_window_size"].as_int() if "local_window_size" in node.attributes else None
    past = node.inputs[3]
    assert past is not None
    assert past.shape is not None
    dim = past.shape[3]
    assert isinstance(dim, int)
    return Layout(heads, groups, dim, window)


def _as_rows(past: ir.Value | None, width: int) -> ir.Value:
    assert past is not None
    past.shape = ir.Shape((1, "past", width))
    return past
