"""The operators that both dialects share, and the graph under construction that they are emitted into.

One method emits one step and returns its output; a step's name is its weight's path without ".weight", and its output
is that name with ".output", which is how building/ finds the layers to quantise and the value where a head may be cut.
decoder.py says what a decoder computes; dialect.py and portable.py say with which nodes. Knows nothing of checkpoints
or layer order. Weights arrive as functions and are read only when the file is written, one at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape

from slmdeploy.exporting.spec import Activation, DecoderSpec, LayerSpec

Read = Callable[[], NDArray[np.float32]]
Dim = int | str


class Emitter(ABC):
    """A graph under construction, and the steps of a decoder that every dialect has.

    Shapes in the docstrings: B batch, S tokens of this call, T tokens with the past, H hidden, D head_dim.
    """

    opsets: Mapping[str, int]
    ir_version: int

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        self._tape = tape.Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._constants: dict[str, ir.Value] = {}

    @abstractmethod
    def begin(self) -> ir.Value:
        """Declare the inputs and emit what every layer reads; returns input_ids."""

    @abstractmethod
    def positions(self) -> ir.Value:
        """The position of each token of this call, int64 [B or 1, S]."""

    @abstractmethod
    def add_and_norm(
        self, name: str, x: ir.Value, branch: ir.Value, weight: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Normalisation of x + branch, and the sum itself (the residual stream)."""

    @abstractmethod
    def norm(self, name: str, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
        """Normalisation over the last axis, RMS or LayerNorm as the spec says."""

    @abstractmethod
    def attention(
        self,
        name: str,
        index: int,
        layer: LayerSpec,
        projected: ir.Value | tuple[ir.Value, ir.Value, ir.Value],
        head_norms: tuple[ir.Value, ir.Value] | None,
    ) -> ir.Value:
        """Causal grouped-query attention of layer `index`, which reads its past and leaves its present.

        projected: query, key and value, packed [B, S, (heads + 2 kv_heads) D] or apart. head_norms: weights [D] of the
        normalisation of each query and key head. Returns the heads' outputs [B, S, heads D].
        """

    @abstractmethod
    def select_rows(self, name: str, x: ir.Value, width: int) -> ir.Value:
        """Of x [B, S, width] what the head is computed for."""

    @abstractmethod
    def finish(self, logits: ir.Value) -> ir.Model:
        """Declare the outputs; the finished model."""

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

    def constant(self, name: str, array: NDArray[np.generic] | np.generic) -> ir.Value:
        """An initializer that is known now; one of a name is made once."""
        if name not in self._constants:
            self._constants[name] = self._tape.initializer(ir.tensor(np.asarray(array), name=name))
        return self._constants[name]

    def model(self, name: str) -> ir.Model:
        """The model of what has been emitted, with inputs and outputs in the order they were declared."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=dict(self.opsets),
            name=name,
        )
        return ir.Model(graph, ir_version=self.ir_version, producer_name="slmdeploy")

    def embedding(self, name: str, table: ir.Value, ids: ir.Value) -> ir.Value:
        """Rows [B, S, H] of the table [V, H]."""
        return self.op("Gather", name, table, ids)

    def linear(self, name: str, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """x [..., in] times weight [in, out], plus the bias [out] if there is one."""
        product = self.op("MatMul", name, x, weight)
        return product if bias is None else self.op("Add", f"{name}.add_bias", product, bias)

    def add(self, name: str, *values: ir.Value) -> ir.Value:
        """The sum of two or three values."""
        total = self.op("Add", name, *values[:2])
        return self.op("Add", f"{name}.last", total, values[2]) if len(values) == 3 else total

    def scaled(self, name: str, x: ir.Value, factor: float) -> ir.Value:
        """x times a number; x itself for 1."""
        return x if factor == 1 else self.op("Mul", name, x, self.constant(f"{name}.factor", np.float32(factor)))

    def softcapped(self, name: str, x: ir.Value, cap: float | None) -> ir.Value:
        """cap tanh(x / cap) (Gemma 2 report, arXiv 2408.00118); x itself without a cap."""
        if cap is None:
            return x
        value = self.constant(f"{name}.cap", np.float32(cap))
        bounded = self.op("Tanh", f"{name}.tanh", self.op("Div", f"{name}.divided", x, value))
        return self.op("Mul", name, bounded, value)

    def split(self, name: str, x: ir.Value, widths: Sequence[int], parts: Sequence[str]) -> list[ir.Value]:
        """x cut along its last axis into parts of these widths."""
        sizes = self.constant(f"{name}.sizes", np.array(widths, np.int64))
        outputs = self.outputs_of(name, *parts)
        self.add_node("Split", name, [x, sizes], outputs, axis=-1)
        return outputs

    def split_qkv(self, name: str, packed: ir.Value, layer: LayerSpec) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Query, key and value out of one packed value."""
        query, key = layer.heads * self.spec.head_dim, layer.kv_heads * self.spec.head_dim
        first, second, third = self.split(f"{name}.split", packed, (query, key, key), ("query", "key", "value"))
        return first, second, third

    def activation(self, name: str, kind: Activation, x: ir.Value) -> ir.Value:
        """The activation function of an MLP."""
        match kind:
            case "relu":
                return self.op("Relu", name, x)
            case "gelu":
                return self.op("Gelu", name, x)
            case "gelu_tanh":
                return self.op("Gelu", name, x, approximate="tanh")
        return self.op("Mul", name, x, self.op("Sigmoid", f"{name}.sigmoid", x))

    def gated(self, name: str, kind: Activation, gate_up: ir.Value, width: int) -> ir.Value:
        """activation(gate) * up, where gate_up [..., 2 width] holds the gate first (Shazeer, arXiv 2002.05202)."""
        gate, up = self.split(f"{name}.split", gate_up, (width, width), ("gate", "up"))
        return self.op("Mul", name, self.activation(f"{name}.{kind}", kind, gate), up)

    def op(
        self,
        kind: str,
        name: str,
        *inputs: ir.Value | None,
        domain: str = "",
        **attributes: float | int | str | tuple[int, ...],
    ) -> ir.Value:
        """One node with one output."""
        outputs = self.outputs_of(name, "output")
        self.add_node(kind, name, list(inputs), outputs, domain, **attributes)
        return outputs[0]

    def outputs_of(self, name: str, *suffixes: str) -> list[ir.Value]:
        """New values for the outputs of a node; an empty suffix is an output that nobody reads."""
        return [ir.Value(name=f"{name}.{suffix}" if suffix else "") for suffix in suffixes]

    def add_node(
        self,
        kind: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[ir.Value],
        domain: str = "",
        **attributes: float | int | str | tuple[int, ...],
    ) -> None:
        """One node with the outputs given."""
        self._tape.op_multi_out(kind, inputs, attributes, outputs=outputs, domain=domain, name=name)
