"""The `ort` dialect: a decoder with the operators that ONNX Runtime runs fastest.

Opset 21 and com.microsoft 1. Attention is GroupQueryAttention, which rotates, keeps windows and writes into a KV buffer
that past and present share. Only the rows named by `logits_positions` reach the output. Rotary embedding that it cannot
do by itself (frequencies that depend on the length of the sequence, widths that are no multiple of 16) and the
normalisation of query and key heads come before it. Knows nothing of checkpoints or layer order.
"""

from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from slmdeploy.errors import UnsupportedModelError
from slmdeploy.exporting.emitter import Emitter
from slmdeploy.exporting.rotary import Rotary, Tables
from slmdeploy.exporting.spec import Activation, DecoderSpec, LayerSpec

_MICROSOFT = "com.microsoft"
_HEAD_MULTIPLE = 8
_ROTATED_TOGETHER = 16
"""GroupQueryAttention rotates multiples of as many numbers of a head."""


class OrtDialect(Emitter):
    """A graph of the `ort` dialect under construction."""

    opsets = MappingProxyType({"": 21, "com.microsoft": 1})
    ir_version = 10  # the first that knows opset 21; a newer one would shut out older runtimes for nothing

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec)
        if spec.head_dim % _HEAD_MULTIPLE:
            raise UnsupportedModelError(
                f"head_dim = {spec.head_dim} is not supported in dialect 'ort': ONNX Runtime's GroupQueryAttention "
                f"needs a multiple of {_HEAD_MULTIPLE}; export with --dialect portable"
            )
        self._pasts: list[tuple[ir.Value, ir.Value]] = []
        self._presents: list[tuple[ir.Value, ir.Value]] = []
        self._position_ids: ir.Value | None = None
        self._rotations: dict[int, Tables] = {}

    def begin(self) -> ir.Value:
        """Declare the inputs and emit sequence lengths and rotary tables; returns input_ids."""
        self._ids = self.input("input_ids", ir.DataType.INT64, ("batch", "sequence"))
        self._mask = self.input("attention_mask", ir.DataType.INT64, ("batch", "total"))
        self._rows = self.input("logits_positions", ir.DataType.INT64, ("rows",))
        for index, layer in enumerate(self.spec.layers):
            shape = ("batch", layer.kv_heads, "past", self.spec.head_dim)
            names = (f"past_key_values.{index}.key", f"past_key_values.{index}.value")
            key, value = (self.input(name, ir.DataType.FLOAT, shape) for name in names)
            self._pasts.append((key, value))
        self._lengths = self._sequence_lengths()
        return self._ids

    def _sequence_lengths(self) -> tuple[ir.Value, ir.Value]:
        """From the mask [B, T]: each row's index of its last token, int32 [B], and the width T, int32 scalar."""
        one = self.constant("attention_mask.one", np.int64(1))
        axis = self.constant("attention_mask.axis", np.array([1], np.int64))
        self._counts = self.op("ReduceSum", "attention_mask.counts", self._mask, axis, keepdims=0)
        last = self.op("Sub", "attention_mask.last", self._counts, one)
        width = self.op("Shape", "attention_mask.width", self._mask, start=1, end=2)
        self._width = self.op("Squeeze", "attention_mask.width_scalar", width)
        as_int32 = [
            self.op("Cast", f"{value.name}.int32", value, to=int(ir.DataType.INT32)) for value in (last, self._width)
        ]
        return as_int32[0], as_int32[1]

    def positions(self) -> ir.Value:
        """Positions int64 [B, S]: those of the last S tokens that each row's mask counts, from 0 in a first call.

        Rows of unequal lengths come padded on the right in a first call, whose positions are all 0 to S - 1, and in
        steps of one token, each at the end of its own row.
        """
        if self._position_ids is None:
            size = self.op("Shape", "positions.size", self._ids, start=1, end=2)
            length = self.op("Squeeze", "positions.length", size)
            zero, one = (self.constant(f"attention_mask.{name}", np.int64(n)) for name, n in (("zero", 0), ("one", 1)))
            past = self.op("Max", "positions.past", self.op("Sub", "positions.before", self._counts, length), zero)
            axis = self.constant("attention_mask.axis", np.array([1], np.int64))
            first = self.op("Unsqueeze", "positions.first", past, axis)
            line = self.op("Range", "positions.range", zero, length, one)
            self._position_ids = self.op("Add", "positions", first, line)
        return self._position_ids

    def _tables(self, index: int) -> Tables:
        if index not in self._rotations:
            rope, length = self.spec.ropes[index], self._width
            if rope.changes_within(self.spec.max_length):  # by each row's own length, so that a batch is exact
                axis = self.constant("attention_mask.axis", np.array([1], np.int64))
                length = self.op("Unsqueeze", f"rope.{index}.row_lengths", self._counts, axis)
            self._rotations[index] = Rotary(self, length).tables(index, rope)
        return self._rotations[index]

    def norm(self, name: str, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
        """RMS normalisation or LayerNorm over the last axis."""
        kind = "SimplifiedLayerNormalization" if self.spec.norm.kind == "rms" else "LayerNormalization"
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return self.op(kind, name, *inputs, epsilon=self.spec.norm.eps, axis=-1)

    def add_and_norm(
        self, name: str, x: ir.Value, branch: ir.Value, weight: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Normalisation of x + branch, and the sum itself (the residual stream), in one node."""
        outputs = self.outputs_of(name, "output", "", "", "residual")
        kind = "SkipSimplifiedLayerNormalization" if self.spec.norm.kind == "rms" else "SkipLayerNormalization"
        inputs = [x, branch, weight] if bias is None else [x, branch, weight, bias]
        self.add_node(kind, name, inputs, outputs, _MICROSOFT, epsilon=self.spec.norm.eps)
        return outputs[0], outputs[3]

    def attention(
        self,
        name: str,
        index: int,
        layer: LayerSpec,
        projected: ir.Value | tuple[ir.Value, ir.Value, ir.Value],
        head_norms: tuple[ir.Value, ir.Value] | None,
    ) -> ir.Value:
        """GroupQueryAttention over the layer's KV buffers; see Emitter.attention."""
        tables = None if layer.rope is None else self._tables(layer.rope)
        apart = tables is not None and not (tables.rows is None and tables.dims % _ROTATED_TOGETHER == 0)
        if apart or head_norms is not None:
            query, key, value = projected if isinstance(projected, tuple) else self.split_qkv(name, projected, layer)
            query, key = (
                self._prepared(f"{name}.{part}", x, heads, norm, tables if apart else None)
                for part, x, heads, norm in zip(
                    ("query", "key"),
                    (query, key),
                    (layer.heads, layer.kv_heads),
                    head_norms or (None, None),
                    strict=True,
                )
            )
            projected = query, key, value
        inside = None if apart else tables
        sources = projected if isinstance(projected, tuple) else (projected, None, None)
        caches = () if inside is None else (inside.cos, inside.sin)
        outputs = self.outputs_of(name, "output", "present_key", "present_value")
        inputs = [*sources, *self._pasts[index], *self._lengths, *caches]
        attributes = self._attributes(layer, rotary=inside is not None)
        self.add_node("GroupQueryAttention", name, inputs, outputs, _MICROSOFT, **attributes)
        self._presents.append((outputs[1], outputs[2]))
        return outputs[0]

    def _attributes(self, layer: LayerSpec, *, rotary: bool) -> dict[str, float | int]:
        spec = self.spec
        found: dict[str, float | int] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads}
        found["do_rotary"] = int(rotary)
        if spec.attention_scale != spec.head_dim**-0.5:
            found["scale"] = spec.attention_scale
        if spec.attention_softcap is not None:
            found["softcap"] = spec.attention_softcap
        if layer.window is not None:
            found["local_window_size"] = layer.window
        return found

    def _prepared(self, name: str, x: ir.Value, heads: int, norm: ir.Value | None, tables: Tables | None) -> ir.Value:
        """Query or key, [B, S, heads D], normalised and rotated by what is given.

        ONNX Runtime's kernel for CPUs refuses GroupQueryAttention's own inputs for the normalisation.
        """
        if norm is not None:
            x = self._head_norm(f"{name}_norm", x, heads, norm)
        if tables is None:
            return x
        sizes = {"num_heads": heads}
        if tables.dims != self.spec.head_dim:
            sizes["rotary_embedding_dim"] = tables.dims
        inputs = (x, tables.rows or self.positions(), tables.cos, tables.sin)
        return self.op("RotaryEmbedding", f"{name}_rotary", *inputs, domain=_MICROSOFT, **sizes)

    def _head_norm(self, name: str, x: ir.Value, heads: int, weight: ir.Value) -> ir.Value:
        """RMS normalisation of each head of x [B, S, heads D]."""
        dim = self.spec.head_dim
        apart = self.op(
            "Reshape", f"{name}.heads", x, self.constant(f"heads.{heads}", np.array([0, 0, heads, dim], np.int64))
        )
        wide = self.constant(f"heads.{heads}.wide", np.array([0, 0, heads * dim], np.int64))
        return self.op("Reshape", f"{name}.wide", self.norm(name, apart, weight), wide)

    def activation(self, name: str, kind: Activation, x: ir.Value) -> ir.Value:
        """The activation function of an MLP; silu as QuickGelu with alpha 1: one pass over memory instead of two."""
        if kind == "silu":
            return self.op("QuickGelu", name, x, domain=_MICROSOFT, alpha=1.0)
        return super().activation(name, kind, x)

    def select_rows(self, name: str, x: ir.Value, width: int) -> ir.Value:
        """Rows `logits_positions` of x [B, S, width], counted over batch and sequence together."""
        shape = self.constant(f"{name}.shape", np.array([-1, width], np.int64))
        return self.op("Gather", name, self.op("Reshape", f"{name}.flat", x, shape), self._rows)

    def finish(self, logits: ir.Value) -> ir.Model:
        """Logits [rows, vocabulary] and the presents, which may share the memory of the pasts."""
        self.output(logits, "logits", ("rows", self.spec.vocab_size))
        for index, (layer, present) in enumerate(zip(self.spec.layers, self._presents, strict=True)):
            for part, value in zip(("key", "value"), present, strict=True):
                self.output(value, f"present.{index}.{part}", ("batch", layer.kv_heads, "present", self.spec.head_dim))
        return self.model("decoder")
