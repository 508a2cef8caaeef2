"""The operators that a decoder graph is made of, as ONNX Runtime runs them fastest: the `ort` dialect.

Opset 21 and com.microsoft 1. decoder.py says what a decoder computes; this file says with which nodes. One method emits
one step and returns its output; a step's name is its weight's path without ".weight", and its output is that name with
".output", which is how build/ finds the layers to quantise and the value where a head may be cut. Knows nothing of
checkpoints or layer order. Weights arrive as functions and are read only when the file is written, one at a time.
"""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape

OPSETS = {"": 21, "com.microsoft": 1}
_IR_VERSION = 10  # the first that knows opset 21; a newer one would shut out older runtimes for nothing
_MICROSOFT = "com.microsoft"
Read = Callable[[], NDArray[np.float32]]
Dim = int | str


class OrtDialect:
    """A graph under construction.

    Shapes in the docstrings: B batch, S tokens of this call, T tokens with the past, H hidden, N rows asked for.
    """

    def __init__(self, norm_eps: float) -> None:
        self._tape = tape.Tape()
        self._norm_eps = norm_eps
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """A graph input; dimensions given by name are free."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[Dim]) -> None:
        """Make a float32 value a graph output under `name`."""
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self._outputs.append(value)

    def weight(self, name: str, shape: Sequence[int], read: Read) -> ir.Value:
        """A float32 initializer that is read when the model is saved."""
        tensor = ir.LazyTensor(lambda: ir.tensor(read(), name=name), ir.DataType.FLOAT, ir.Shape(shape), name=name)
        return self._tape.initializer(tensor)

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """An initializer that is known now."""
        return self._tape.initializer(ir.tensor(array, name=name))

    def model(self, name: str) -> ir.Model:
        """The finished model, with inputs and outputs in the order they were declared."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=dict(OPSETS),
            name=name,
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="slmdeploy")

    def embedding(self, name: str, table: ir.Value, ids: ir.Value) -> ir.Value:
        """Rows [B, S, H] of the table [V, H]."""
        return self._op("Gather", name, table, ids)

    def linear(self, name: str, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """x [..., in] times weight [in, out], plus the bias [out] if there is one."""
        product = self._op("MatMul", name, x, weight)
        return product if bias is None else self._op("Add", f"{name}.add_bias", product, bias)

    def norm(self, name: str, x: ir.Value, weight: ir.Value) -> ir.Value:
        """RMS normalisation over the last axis."""
        return self._op("SimplifiedLayerNormalization", name, x, weight, epsilon=self._norm_eps, axis=-1)

    def add_and_norm(self, name: str, x: ir.Value, branch: ir.Value, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """RMS normalisation of x + branch, and the sum itself (the residual stream), in one node."""
        outputs = self._outputs_of(name, "output", "", "", "residual")
        inputs = [x, branch, weight]
        self._add_node("SkipSimplifiedLayerNormalization", name, inputs, outputs, _MICROSOFT, epsilon=self._norm_eps)
        return outputs[0], outputs[3]

    def lengths(self, attention_mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """From the mask [B, T]: each row's index of its last token, int32 [B], and the width T, int32 scalar."""
        one = self.constant("attention_mask.one", np.array(1, np.int64))
        axis = self.constant("attention_mask.axis", np.array([1], np.int64))
        counts = self._op("ReduceSum", "attention_mask.counts", attention_mask, axis, keepdims=0)
        last = self._op("Sub", "attention_mask.last", counts, one)
        width = self._op("Shape", "attention_mask.width", attention_mask, start=1, end=2)
        scalar = self._op("Squeeze", "attention_mask.width_scalar", width)
        as_int32 = [self._op("Cast", f"{v.name}.int32", v, to=int(ir.DataType.INT32)) for v in (last, scalar)]
        return as_int32[0], as_int32[1]

    def attention(
        self,
        name: str,
        qkv: ir.Value,
        past: tuple[ir.Value, ir.Value],
        lengths: tuple[ir.Value, ir.Value],
        rope: tuple[ir.Value, ir.Value],
        *,
        heads: int,
        kv_heads: int,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Causal grouped-query attention with rotary embedding over packed query, key and value.

        qkv [B, S, (heads + 2 kv_heads) D]; past key and value [B, kv_heads, P, D]. Returns the heads' outputs
        [B, S, heads D] and the present key and value, which the runtime binds to the buffer of the past.
        """
        outputs = self._outputs_of(name, "output", "present_key", "present_value")
        inputs = [qkv, None, None, *past, *lengths, *rope]
        counts = {"num_heads": heads, "kv_num_heads": kv_heads}
        self._add_node("GroupQueryAttention", name, inputs, outputs, _MICROSOFT, **counts, do_rotary=1)
        return outputs[0], outputs[1], outputs[2]

    def gated_silu(self, name: str, gate_up: ir.Value, width: int) -> ir.Value:
        """silu(gate) * up, where gate_up [..., 2 width] holds the gate first."""
        sizes = self.constant(f"{name}.sizes", np.array([width, width], np.int64))
        halves = self._outputs_of(f"{name}.split", "gate", "up")
        self._add_node("Split", f"{name}.split", [gate_up, sizes], halves, axis=-1)
        # alpha = 1 makes QuickGelu silu: one pass over memory instead of the two of Sigmoid and Mul
        active = self._op("QuickGelu", f"{name}.silu", halves[0], domain=_MICROSOFT, alpha=1.0)
        return self._op("Mul", name, active, halves[1])

    def select_rows(self, name: str, x: ir.Value, rows: ir.Value, width: int) -> ir.Value:
        """Rows [N, width] of x [B, S, width], counted over batch and sequence together."""
        shape = self.constant(f"{name}.shape", np.array([-1, width], np.int64))
        return self._op("Gather", name, self._op("Reshape", f"{name}.flat", x, shape), rows)

    def _op(self, kind: str, name: str, *inputs: ir.Value, domain: str = "", **attributes: float | int) -> ir.Value:
        outputs = self._outputs_of(name, "output")
        self._add_node(kind, name, list(inputs), outputs, domain, **attributes)
        return outputs[0]

    def _outputs_of(self, name: str, *suffixes: str) -> list[ir.Value]:
        return [ir.Value(name=f"{name}.{suffix}" if suffix else "") for suffix in suffixes]

    def _add_node(
        self,
        kind: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[ir.Value],
        domain: str = "",
        **attributes: float | int,
    ) -> None:
        self._tape.op_multi_out(kind, inputs, attributes, outputs=outputs, domain=domain, name=name)
