"""The `portable` dialect: a decoder in standard ONNX operators only, for TensorRT, OpenVINO, onnx.reference and others.

    opset 21   normalisation, rotation and attention decomposed; the present is the past and the new keys concatenated
    opset 23   RMSNormalization, RotaryEmbedding and Attention as single operators; the same cache
    opset 24   the same operators over buffers of a fixed capacity, into which TensorScatter writes

Attention with a soft cap is decomposed in every opset: the operator bounds products after the mask, which lets hidden
tokens through. Padding may stand on either side: masks are read as they are and positions are an input. Logits are of
every position. Knows nothing of checkpoints or layer order.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from slmdeploy.exporting.emitter import Emitter
from slmdeploy.exporting.rotary import Rotary, Tables
from slmdeploy.exporting.spec import PORTABLE_OPSETS, STATIC_OPSET, DecoderSpec, LayerSpec

_IR_VERSIONS = {21: 10, 23: 11, 24: 12}
HIDDEN = np.float32(-3e4)
"""Far below every product, and still a number in float16, in which an engine may run the graph."""


@dataclass(frozen=True)
class _Cache:
    """Inputs of one layer: keys and values [B, kv_heads, past or capacity, D]."""

    key: ir.Value
    value: ir.Value


class PortableDialect(Emitter):
    """A graph of the `portable` dialect under construction; `opset` is one of PORTABLE_OPSETS."""

    def __init__(self, spec: DecoderSpec, opset: int = PORTABLE_OPSETS[0]) -> None:
        super().__init__(spec)
        self.opset = opset
        self.opsets = {"": opset}
        self.ir_version = _IR_VERSIONS[opset]
        self._caches: list[_Cache] = []
        self._presents: list[tuple[ir.Value, ir.Value]] = []
        self._biases: dict[int | None, ir.Value] = {}
        self._rotations: dict[int, Tables] = {}
        self._gathered: dict[int, tuple[ir.Value, ir.Value]] = {}

    @property
    def static(self) -> bool:
        """Whether the cache is a buffer of fixed capacity."""
        return self.opset >= STATIC_OPSET

    def begin(self) -> ir.Value:
        """Declare the inputs; returns input_ids.

        Beside those of the standard interface a static cache has cache_lengths int64 [B], the tokens that it holds,
        in the place of attention_mask.
        """
        integer = ir.DataType.INT64
        self._ids = self.input("input_ids", integer, ("batch", "sequence"))
        if self.static:
            self._lengths = self.input("cache_lengths", integer, ("batch",))
        else:
            self._mask = self.input("attention_mask", integer, ("batch", "total"))
        self._positions = self.input("position_ids", integer, ("batch", "sequence"))
        width = "capacity" if self.static else "past"
        for index, layer in enumerate(self.spec.layers):
            shape = ("batch", layer.kv_heads, width, self.spec.head_dim)
            names = (f"past_key_values.{index}.key", f"past_key_values.{index}.value")
            self._caches.append(_Cache(*(self.input(name, ir.DataType.FLOAT, shape) for name in names)))
        return self._ids

    def positions(self) -> ir.Value:
        """The input position_ids."""
        return self._positions

    def norm(self, name: str, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
        """LayerNormalization, or RMS normalisation as one operator where the opset has it."""
        eps = self.spec.norm.eps
        if self.spec.norm.kind == "layer":
            inputs = [x, weight] if bias is None else [x, weight, bias]
            return self.op("LayerNormalization", name, *inputs, axis=-1, epsilon=eps)
        if self.opset >= 23:
            return self.op("RMSNormalization", name, x, weight, axis=-1, epsilon=eps)
        axis = self.constant("norm.axis", np.array([-1], np.int64))
        mean = self.op("ReduceMean", f"{name}.mean", self.op("Mul", f"{name}.square", x, x), axis, keepdims=1)
        root = self.op(
            "Sqrt", f"{name}.root", self.op("Add", f"{name}.sum", mean, self.constant("norm.eps", np.float32(eps)))
        )
        return self.op("Mul", name, self.op("Div", f"{name}.unit", x, root), weight)

    def add_and_norm(
        self, name: str, x: ir.Value, branch: ir.Value, weight: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """The sum and its normalisation."""
        total = self.op("Add", f"{name}.residual", x, branch)
        return self.norm(name, total, weight, bias), total

    def select_rows(self, name: str, x: ir.Value, width: int) -> ir.Value:
        """All rows: the standard interface gives the logits of every position."""
        return x

    def finish(self, logits: ir.Value) -> ir.Model:
        """Logits [B, S, vocabulary] and the presents."""
        self.output(logits, "logits", ("batch", "sequence", self.spec.vocab_size))
        for index, (layer, present) in enumerate(zip(self.spec.layers, self._presents, strict=True)):
            for part, value in zip(("key", "value"), present, strict=True):
                shape = ("batch", layer.kv_heads, "capacity" if self.static else "total", self.spec.head_dim)
                self.output(value, f"present.{index}.{part}", shape)
        return self.model("decoder")

    def attention(
        self,
        name: str,
        index: int,
        layer: LayerSpec,
        projected: ir.Value | tuple[ir.Value, ir.Value, ir.Value],
        head_norms: tuple[ir.Value, ir.Value] | None,
    ) -> ir.Value:
        """Attention over the cache and the new keys; see Emitter.attention."""
        query, key, value = projected if isinstance(projected, tuple) else self.split_qkv(name, projected, layer)
        norms = head_norms or (None, None)
        query = self._prepared(f"{name}.query", query, layer, layer.heads, norms[0])
        key = self._prepared(f"{name}.key", key, layer, layer.kv_heads, norms[1])
        return self.attended(name, index, layer, query, key, value)

    def attended(
        self, name: str, index: int, layer: LayerSpec, query: ir.Value, key: ir.Value, value: ir.Value
    ) -> ir.Value:
        """What query [B, S, heads D] finds in the cache and the new key and value [B, S, kv_heads D]; both kept."""
        keys, values = self._extended(name, index, layer, key, value)
        return self.mixed(name, layer, query, keys, values)

    def mixed(self, name: str, layer: LayerSpec, query: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Softmax(q k' scale + bias) v, [B, S, heads D], over keys and values [B, kv_heads, keys, D]."""
        if self.opset >= 23 and self.spec.attention_softcap is None:
            return self._operator(name, layer, query, keys, values)
        return self._decomposed(name, layer, query, keys, values)

    def _prepared(self, name: str, x: ir.Value, layer: LayerSpec, heads: int, norm: ir.Value | None) -> ir.Value:
        """Query or key [B, S, heads D], heads normalised and rotated."""
        dim = self.spec.head_dim
        if norm is not None:
            apart = self._reshape(f"{name}.heads", x, (0, 0, heads, dim))
            x = self._reshape(f"{name}.wide", self.norm(f"{name}_norm", apart, norm), (0, 0, heads * dim))
        if layer.rope is None:
            return x
        tables = self._tables(layer.rope)
        if self.opset >= 23:
            dims = 0 if tables.dims == dim else tables.dims  # 0: the whole head
            inputs = (x, tables.cos, tables.sin, tables.rows or self._positions)
            return self.op("RotaryEmbedding", f"{name}_rotary", *inputs, num_heads=heads, rotary_embedding_dim=dims)
        return self._turned(f"{name}_rotary", x, heads, layer.rope, tables)

    def _tables(self, index: int) -> Tables:
        if index not in self._rotations:
            self._rotations[index] = Rotary(self, self._length).tables(index, self.spec.ropes[index])
        return self._rotations[index]

    @cached_property
    def _length(self) -> ir.Value:
        """Tokens of the longest sequence with its past, int64 scalar."""
        last = self.op("ReduceMax", "positions.last", self._positions, keepdims=0)
        return self.op("Add", "positions.length", last, self.constant("positions.one", np.int64(1)))

    def _turned(self, name: str, x: ir.Value, heads: int, index: int, tables: Tables) -> ir.Value:
        """(a, b) of each head become (a cos - b sin, b cos + a sin); what is behind `dims` stays."""
        dim, half = self.spec.head_dim, tables.dims // 2
        cos, sin = self._rows_of(index, tables)
        apart = self._reshape(f"{name}.heads", x, (0, 0, heads, dim))
        widths, parts = [half, half], ["first", "second"]
        if tables.dims < dim:
            widths, parts = [*widths, dim - tables.dims], [*parts, "rest"]
        a, b, *rest = self.split(f"{name}.split", apart, widths, parts)
        products = {
            label: self.op("Mul", f"{name}.{label}", half_of, factor)
            for label, half_of, factor in (("a_cos", a, cos), ("b_sin", b, sin), ("b_cos", b, cos), ("a_sin", a, sin))
        }
        first = self.op("Sub", f"{name}.turned_first", products["a_cos"], products["b_sin"])
        second = self.op("Add", f"{name}.turned_second", products["b_cos"], products["a_sin"])
        joined = self.op("Concat", f"{name}.joined", first, second, *rest, axis=-1)
        return self._reshape(name, joined, (0, 0, heads * dim))

    def _rows_of(self, index: int, tables: Tables) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of this call's tokens, [B, S, 1, dims / 2]; emitted once for a rope."""
        found = self._gathered.get(index)
        if found is None:
            axis = self.constant("rope.head_axis", np.array([2], np.int64))
            rows = tables.rows or self._positions
            cos, sin = (
                self.op(
                    "Unsqueeze",
                    f"rope.{index}.{kind}",
                    self.op("Gather", f"rope.{index}.{kind}.rows", table, rows),
                    axis,
                )
                for kind, table in (("cos", tables.cos), ("sin", tables.sin))
            )
            found = self._gathered[index] = cos, sin
        return found

    def _operator(self, name: str, layer: LayerSpec, query: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """The operator Attention over complete keys and values [B, kv_heads, total or capacity, D].

        It could concatenate the past itself, and give the present as further outputs, which TensorRT does not take.
        """
        apart = self._heads_first(f"{name}.query", query, layer.heads)
        bias = self._bias(layer.window)
        mixed = self.op("Attention", f"{name}.mixed", apart, keys, values, bias, scale=self.spec.attention_scale)
        last = self.op("Transpose", f"{name}.tokens_first", mixed, perm=(0, 2, 1, 3))
        return self._reshape(name, last, (0, 0, layer.heads * self.spec.head_dim))

    def _extended(
        self, name: str, index: int, layer: LayerSpec, key: ir.Value, value: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Keys and values with the new ones, [B, kv_heads, total or capacity, D], which become the presents."""
        cache, found = self._caches[index], []
        for part, past, x in (("key", cache.key, key), ("value", cache.value, value)):
            new = self._heads_first(f"{name}.{part}s", x, layer.kv_heads)
            if self.static:
                found.append(self.op("TensorScatter", f"{name}.present_{part}", past, new, self._lengths, axis=2))
            else:
                found.append(self.op("Concat", f"{name}.present_{part}", past, new, axis=2))
        self._presents.append((found[0], found[1]))
        return found[0], found[1]

    def _decomposed(self, name: str, layer: LayerSpec, query: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Softmax(q k' scale + bias) v, with the query heads of one key head side by side: no key is repeated."""
        dim, groups = self.spec.head_dim, layer.kv_heads
        apart = self._reshape(f"{name}.query_heads", query, (0, 0, groups, layer.heads // groups, dim))
        queries = self.op("Transpose", f"{name}.queries", apart, perm=(0, 2, 3, 1, 4))
        axis = self.constant("attention.group_axis", np.array([2], np.int64))
        turned = self.op("Transpose", f"{name}.keys_turned", keys, perm=(0, 1, 3, 2))
        products = self.op(
            "MatMul", f"{name}.products", queries, self.op("Unsqueeze", f"{name}.keys_shared", turned, axis)
        )
        products = self.scaled(f"{name}.scaled", products, self.spec.attention_scale)
        products = self.softcapped(f"{name}.softcap", products, self.spec.attention_softcap)
        bias = self.op("Unsqueeze", f"{name}.bias", self._bias(layer.window), axis)
        weights = self.op("Softmax", f"{name}.weights", self.op("Add", f"{name}.biased", products, bias), axis=-1)
        mixed = self.op("MatMul", f"{name}.mixed", weights, self.op("Unsqueeze", f"{name}.values_shared", values, axis))
        last = self.op("Transpose", f"{name}.tokens_first", mixed, perm=(0, 3, 1, 2, 4))
        return self._reshape(name, last, (0, 0, layer.heads * dim))

    def _heads_first(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        """[B, S, heads D] as [B, heads, S, D]."""
        apart = self._reshape(f"{name}.apart", x, (0, 0, heads, self.spec.head_dim))
        return self.op("Transpose", f"{name}.heads_first", apart, perm=(0, 2, 1, 3))

    def _reshape(self, name: str, x: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """x in another shape; 0 keeps a dimension."""
        label = ".".join(map(str, shape))
        return self.op("Reshape", name, x, self.constant(f"shape.{label}", np.array(shape, np.int64)))

    def _bias(self, window: int | None) -> ir.Value:
        """What is added to the products, [B, 1, S, keys]: 0 for keys that a query sees, else a number far below."""
        if window not in self._biases:
            name = "mask" if window is None else f"mask.{window}"
            seen = self._seen
            if window is not None:
                size = self.constant(f"{name}.window", np.int64(window))
                near = self.op("Less", f"{name}.near", self.op("Sub", f"{name}.distance", *self._columns), size)
                seen = self.op("And", f"{name}.seen", seen, near)
            zero, hidden = self.constant("mask.zero", np.float32(0)), self.constant("mask.hidden", HIDDEN)
            self._biases[window] = self.op("Where", f"{name}.bias", seen, zero, hidden)
        return self._biases[window]

    @cached_property
    def _columns(self) -> tuple[ir.Value, ir.Value]:
        """Places in the cache of the new tokens, [B or 1, 1, S, 1], and of all keys, [1, 1, 1, keys]."""
        zero, one = (self.constant(f"mask.{label}", np.int64(n)) for label, n in (("start", 0), ("step", 1)))
        length = self._size("mask.length", self._ids, 1)
        keys = (
            self._size("mask.keys", self._caches[0].key, 2) if self.static else self._size("mask.keys", self._mask, 1)
        )
        line = self.op("Range", "mask.line", zero, length, one)
        if self.static:
            axis = self.constant("mask.row_axis", np.array([1], np.int64))
            first = self.op("Unsqueeze", "mask.first", self._lengths, axis)
            places = self.op("Add", "mask.places", first, line)
            axes = self.constant("mask.places_axes", np.array([1, 3], np.int64))
        else:
            places = self.op("Add", "mask.places", line, self.op("Sub", "mask.past", keys, length))
            axes = self.constant("mask.places_axes", np.array([0, 1, 3], np.int64))
        every = self.op("Range", "mask.every", zero, keys, one)
        key_axes = self.constant("mask.key_axes", np.array([0, 1, 2], np.int64))
        queries = self.op("Unsqueeze", "mask.queries", places, axes)
        return queries, self.op("Unsqueeze", "mask.columns", every, key_axes)

    @cached_property
    def _seen(self) -> ir.Value:
        """Which keys a query may see without a window: not behind it, and no padding."""
        queries, keys = self._columns
        causal = self.op("LessOrEqual", "mask.causal", keys, queries)
        if self.static:
            return causal
        axes = self.constant("mask.padding_axes", np.array([1, 2], np.int64))
        kept = self.op("Cast", "mask.kept", self._mask, to=int(ir.DataType.BOOL))
        return self.op("And", "mask.seen", causal, self.op("Unsqueeze", "mask.padding", kept, axes))

    def _size(self, name: str, value: ir.Value, axis: int) -> ir.Value:
        return self.op("Squeeze", name, self.op("Shape", f"{name}.shape", value, start=axis, end=axis + 1))
