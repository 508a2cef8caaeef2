"""The scoring graph of the `portable` dialect: items side by side behind one prefix, in standard ONNX operators only.

The interface is that of the other dialect's score.onnx (docs/architecture.md), so one runtime feeds both: tokens stand
in blocks, a block's queries meet the keys of the prefix and its own, and a bias hides the rest. A block is to attention
what a sequence of a batch is: rows of queries, keys and values are gathered into [blocks, …], and then attention is the
portable dialect's own, the operator Attention from opset 23 on. No buffer is written in place, so opset 24 has the same
cache. Knows nothing of checkpoints or layer order.
"""

from functools import cached_property

import numpy as np
import onnx_ir as ir

from slmdeploy.exporting.portable import HIDDEN, PortableDialect
from slmdeploy.exporting.spec import PORTABLE_OPSETS, DecoderSpec, LayerSpec

LABELS = "lm_head.labels"
"""The name of the head, which has the rows of the label words alone."""


class PortableScoring(PortableDialect):
    """A portable scoring graph under construction; ``labels`` is how many label words its head has."""

    def __init__(self, spec: DecoderSpec, labels: int, opset: int = PORTABLE_OPSETS[0]) -> None:
        super().__init__(spec, opset)
        self._labels = labels
        self._pasts: list[tuple[ir.Value, ir.Value]] = []

    @property
    def static(self) -> bool:
        """The past is rows, and the present is longer by the new ones."""
        return False

    def begin(self) -> ir.Value:
        """Declare the inputs; returns input_ids."""
        integer, number = ir.DataType.INT64, ir.DataType.FLOAT
        self._ids = self.input("input_ids", integer, (1, "tokens"))
        self._rows = self.input("logits_positions", integer, ("rows",))
        self._positions = self.input("position_ids", integer, (1, "tokens"))
        self._query_tokens = self.input("query_tokens", integer, ("blocks", "slots"))
        self._key_tokens = self.input("key_tokens", integer, ("blocks", "width"))
        self._visible = self.input("attention_bias", number, ("blocks", 1, "slots", "width"))
        self._token_blocks = self.input("token_blocks", integer, ("tokens",))
        self._token_slots = self.input("token_slots", integer, ("tokens",))
        for index, layer in enumerate(self.spec.layers):
            shape = (1, "past", layer.kv_heads * self.spec.head_dim)
            key, value = (self.input(f"past_key_values.{index}.{part}", number, shape) for part in ("key", "value"))
            self._pasts.append((key, value))
        return self._ids

    def select_rows(self, name: str, x: ir.Value, width: int) -> ir.Value:
        """The rows `logits_positions` of x [1, tokens, width]."""
        return self.op("Gather", name, self._as_rows(f"{name}.flat", x, width), self._rows)

    def finish(self, logits: ir.Value) -> ir.Model:
        """Label logits [rows, labels], and the presents as rows."""
        self.output(logits, "label_logits", ("rows", self._labels))
        for index, (layer, present) in enumerate(zip(self.spec.layers, self._presents, strict=True)):
            for part, value in zip(("key", "value"), present, strict=True):
                self.output(value, f"present.{index}.{part}", (1, "present", layer.kv_heads * self.spec.head_dim))
        return self.model("scorer")

    def attended(
        self, name: str, index: int, layer: LayerSpec, query: ir.Value, key: ir.Value, value: ir.Value
    ) -> ir.Value:
        """Attention of each block over what it sees; [1, tokens, heads D]."""
        keys, values = (
            self._seen_rows(f"{name}.{part}s", index, past, x, layer)
            for part, past, x in (("key", self._pasts[index][0], key), ("value", self._pasts[index][1], value))
        )
        self._presents.append((keys[0], values[0]))
        wide = layer.heads * self.spec.head_dim
        rows = self._as_rows(f"{name}.query_rows", query, wide)
        queries = self.op("Gather", f"{name}.query_blocks", rows, self._query_tokens)
        mixed = self.mixed(name, layer, queries, keys[1], values[1])
        tokens = self.op("Gather", f"{name}.tokens", self._as_rows(f"{name}.mixed_rows", mixed, wide), self._places)
        return self._reshape(f"{name}.out", tokens, (1, -1, wide))

    def _seen_rows(
        self, name: str, index: int, past: ir.Value, new: ir.Value, layer: LayerSpec
    ) -> tuple[ir.Value, ir.Value]:
        """Past and new rows [1, present, kv_heads D], and what each block sees of them [blocks, kv_heads, width, D]."""
        every = self.op("Concat", f"{name}.present", past, new, axis=1)
        rows = self._as_rows(f"{name}.rows", every, layer.kv_heads * self.spec.head_dim)
        blocks = self.op("Gather", f"{name}.blocks", rows, self._key_tokens)
        return every, self._heads_first(name, blocks, layer.kv_heads)

    @cached_property
    def _places(self) -> ir.Value:
        """Of each token the row of its query among all places of all blocks, int64 [tokens]."""
        slots = self.op("Shape", "blocks.slots", self._query_tokens, start=1, end=2)
        return self.op(
            "Add", "blocks.places", self.op("Mul", "blocks.first", self._token_blocks, slots), self._token_slots
        )

    def _bias(self, window: int | None) -> ir.Value:
        """The bias, no number of it too low for float16, with keys hidden that lie outside the window."""
        if window not in self._biases:
            hidden = self.constant("mask.hidden", HIDDEN)
            bias = self.op("Max", "mask.bias" if window is None else f"mask.{window}.bounded", self._visible, hidden)
            if window is not None:
                size = self.constant(f"mask.{window}.window", np.int64(window))
                far = self.op("GreaterOrEqual", f"mask.{window}.far", self._apart, size)
                bias = self.op("Where", f"mask.{window}.bias", far, hidden, bias)
            self._biases[window] = bias
        return self._biases[window]

    @cached_property
    def _apart(self) -> ir.Value:
        """How many positions each key lies before each query, int64 [blocks, 1, slots, width]."""
        zero, one = (self.constant(f"mask.{label}", np.int64(n)) for label, n in (("start", 0), ("step", 1)))
        line = self._reshape("mask.line", self._positions, (-1,))
        before = self.op("Range", "mask.before", zero, self._size("mask.past", self._pasts[0][0], 1), one)
        every = self.op("Concat", "mask.every", before, line, axis=0)
        queries = self.op("Gather", "mask.query_positions", line, self._query_tokens)
        keys = self.op("Gather", "mask.key_positions", every, self._key_tokens)
        row, column = (
            self.constant(f"mask.{label}", np.array(axes)) for label, axes in (("row", [1, 3]), ("column", [1, 2]))
        )
        rows = self.op("Unsqueeze", "mask.query_rows", queries, row)
        columns = self.op("Unsqueeze", "mask.key_columns", keys, column)
        return self.op("Sub", "mask.apart", rows, columns)

    def _as_rows(self, name: str, x: ir.Value, width: int) -> ir.Value:
        """x [.., .., width] as [all, width]."""
        return self._reshape(name, x, (-1, width))
