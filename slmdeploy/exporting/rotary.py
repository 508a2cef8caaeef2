"""Rotary embedding in a graph: the tables that queries and keys are turned by, and which row each token takes.

Mostly two constants, [positions, dims / 2], of which a token takes the row of its position. Where frequencies depend on
the length of the sequence the graph chooses between two tables (LongRoPE) or computes its own (dynamic NTK scaling); a
token's keys keep the rotation that they had when they were computed, as they do in transformers. The numbers are
rope.py's.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from slmdeploy.exporting.emitter import Emitter
from slmdeploy.exporting.rope import rope_tables
from slmdeploy.exporting.spec import Rope


@dataclass(frozen=True)
class Tables:
    """Cosines and sines [rows, dims / 2] for the first `dims` of a head.

    rows: each token's row, int64 [B, S]; None for constant tables, where a token's row is its position.
    """

    cos: ir.Value
    sin: ir.Value
    dims: int
    rows: ir.Value | None = None


class Rotary:
    """Emits the tables of a spec's ropes.

    length: tokens of the whole sequence, int64 scalar or, where rows may differ, [B, 1]. Positions are the emitter's
    own, int64 [B, S].
    """

    def __init__(self, emit: Emitter, length: ir.Value) -> None:
        self.emit, self.length = emit, length

    def tables(self, index: int, rope: Rope) -> Tables:
        """The tables of the rope with this index."""
        name, context = f"rope.{index}" if index else "rope", self.emit.spec.max_length
        if not rope.changes_within(context):
            cos, sin = self._constants(index, *rope_tables(rope, context))
            return Tables(cos, sin, rope.dims)
        if rope.kind == "longrope":
            return self._chosen(index, name, rope, context)
        return self._computed(name, rope)

    def _constants(self, index: int, *tables: np.ndarray) -> tuple[ir.Value, ir.Value]:
        names = [f"{kind}_cache.{index}" if index else f"{kind}_cache" for kind in ("cos", "sin")]
        cos, sin = (self.emit.constant(name, table) for name, table in zip(names, tables, strict=True))
        return cos, sin

    def _chosen(self, index: int, name: str, rope: Rope, context: int) -> Tables:
        """The short table above the long one, from which sequences beyond the original context take all their rows."""
        emit = self.emit
        short, long = rope_tables(rope, rope.original), rope_tables(rope, context, long=True)
        cos, sin = self._constants(index, *(np.concatenate(pair) for pair in zip(short, long, strict=True)))
        original = emit.constant(f"{name}.original", np.int64(rope.original))
        beyond = emit.op("Greater", f"{name}.beyond", self.length, original)
        flag = emit.op("Cast", f"{name}.flag", beyond, to=int(ir.DataType.INT64))
        offset = emit.op("Mul", f"{name}.offset", flag, original)
        return Tables(cos, sin, rope.dims, emit.op("Add", f"{name}.rows", self.emit.positions(), offset))

    def _computed(self, name: str, rope: Rope) -> Tables:
        """A row for each token of this call, by a base that grows with the sequence (bloc97 and emozilla 2023)."""
        emit = self.emit
        last = emit.constant("rope.last_axis", np.array([-1], np.int64))
        periods = self._periods(name, rope, emit.op("Unsqueeze", f"{name}.lengths", self.length, last))
        column = emit.op("Unsqueeze", f"{name}.positions", self.emit.positions(), last)
        column = emit.op("Cast", f"{name}.column", column, to=int(ir.DataType.FLOAT))
        flat = emit.constant(f"{name}.flat", np.array([-1, rope.dims // 2], np.int64))
        angles = emit.op("Reshape", f"{name}.angles", emit.op("Div", f"{name}.turns", column, periods), flat)
        count = emit.op("Size", f"{name}.count", self.emit.positions())
        zero, one = (emit.constant(f"rope.{label}", np.int64(n)) for label, n in (("zero", 0), ("one", 1)))
        line = emit.op("Range", f"{name}.line", zero, count, one)
        rows = emit.op("Reshape", f"{name}.rows", line, emit.op("Shape", f"{name}.shape", self.emit.positions()))
        cos, sin = (emit.op(kind, f"{name}.{kind.lower()}", angles) for kind in ("Cos", "Sin"))
        return Tables(cos, sin, rope.dims, rows)

    def _periods(self, name: str, rope: Rope, tokens: ir.Value) -> ir.Value:
        """Positions per radian [dims / 2] or [B, 1, dims / 2], by the number n of `tokens`, [1] or [B, 1, 1].

        They are powers of the base theta (factor n / original - (factor - 1)) ^ (d / (d - 2)).
        """
        emit, factor = self.emit, dict(rope.parameters)["factor"]
        assert isinstance(factor, float)

        def number(label: str, value: float) -> ir.Value:
            return emit.constant(f"{name}.{label}", np.float32(value))

        length = emit.op("Cast", f"{name}.length", tokens, to=int(ir.DataType.FLOAT))
        seen = emit.op("Max", f"{name}.seen", length, number("original", rope.original))
        stretched = emit.op("Mul", f"{name}.stretched", seen, number("ratio", factor / rope.original))
        grown = emit.op("Sub", f"{name}.grown", stretched, number("less", factor - 1))
        power = emit.op("Pow", f"{name}.power", grown, number("exponent", rope.dims / (rope.dims - 2)))
        base = emit.op("Mul", f"{name}.base", power, number("theta", rope.theta))
        exponents = emit.constant(f"{name}.exponents", (np.arange(0, rope.dims, 2) / rope.dims).astype(np.float32))
        return emit.op("Pow", f"{name}.periods", base, exponents)
