"""A decoder as an ONNX graph, built from its weights and never traced.

Follows the names that ONNX users expect (input_ids, past_key_values.0.key, logits ...) and adds `logits_positions`:
only those rows reach the output. Because attention is the last thing that mixes tokens, the rows are picked right
behind the last layer's attention, so that its projection and its MLP are computed for them alone: a prompt needs one
row, and a sixth of a six-layer model's linear work is then hardly done at all.

Query, key and value share one MatMul, as do gate and up: within noise in fp32 (benchmarks/fusion.py), but a quantised
build then quantises the activations once instead of two or three times. Knows nothing of files.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slmdeploy.checkpoint import Weights
from slmdeploy.exporting.dialect import OrtDialect
from slmdeploy.exporting.rope import rope_tables
from slmdeploy.exporting.spec import DecoderSpec, LayerSpec


@dataclass(frozen=True)
class _Shared:
    """What every layer reads."""

    lengths: tuple[ir.Value, ir.Value]
    rope: tuple[ir.Value, ir.Value]
    logits_positions: ir.Value


def build_decoder(spec: DecoderSpec, weights: Weights) -> ir.Model:
    """The float32 graph of a decoder.

    Inputs: input_ids int64 [batch, sequence]; attention_mask int64 [batch, total], right-padded, total being past and
    sequence together; logits_positions int64 [rows], indices into batch x sequence; past_key_values.{i}.key and .value
    float32 [batch, kv_heads, past, head_dim]. Outputs: logits float32 [rows, vocabulary]; present.{i}.key and .value,
    which may be the same buffers as the past when those are long enough.
    """
    return _Decoder(spec, weights).build()


class _Decoder:
    def __init__(self, spec: DecoderSpec, weights: Weights) -> None:
        self.spec, self.weights = spec, weights
        self.emit = OrtDialect(spec.norm_eps)

    def build(self) -> ir.Model:
        emit, spec = self.emit, self.spec
        # 1. inputs, in the order in which they are declared
        input_ids = emit.input("input_ids", ir.DataType.INT64, ("batch", "sequence"))
        attention_mask = emit.input("attention_mask", ir.DataType.INT64, ("batch", "total"))
        positions = emit.input("logits_positions", ir.DataType.INT64, ("rows",))
        pasts = [self._past(index, layer) for index, layer in enumerate(spec.layers)]
        # 2. what every layer reads
        tables = rope_tables(spec.rope, spec.head_dim, spec.max_length)
        cos, sin = (emit.constant(name, table) for name, table in zip(("cos_cache", "sin_cache"), tables, strict=True))
        shared = _Shared(emit.lengths(attention_mask), (cos, sin), positions)
        # 3. the stack: `x` is normalised, `residual` the running sum
        table = self._tensor("model.embed_tokens.weight", (spec.vocab_size, spec.hidden))
        residual = emit.embedding("model.embed_tokens", table, input_ids)
        x = emit.norm("model.layers.0.input_layernorm", residual, self._norm("model.layers.0.input_layernorm"))
        presents = []
        for index, layer in enumerate(spec.layers):
            x, residual, present = self._layer(index, layer, x, residual, pasts[index], shared)
            presents.append(present)
        # 4. outputs
        logits = emit.linear("lm_head", x, self._head(), None)
        emit.output(logits, "logits", ("rows", spec.vocab_size))
        for index, present in enumerate(presents):
            for part, value in zip(("key", "value"), present, strict=True):
                shape = ("batch", spec.layers[index].kv_heads, "present", spec.head_dim)
                emit.output(value, f"present.{index}.{part}", shape)
        return emit.model("decoder")

    def _layer(
        self,
        index: int,
        layer: LayerSpec,
        x: ir.Value,
        residual: ir.Value,
        past: tuple[ir.Value, ir.Value],
        shared: _Shared,
    ) -> tuple[ir.Value, ir.Value, tuple[ir.Value, ir.Value]]:
        emit, path, last = self.emit, f"model.layers.{index}", index == len(self.spec.layers) - 1
        qkv = self._linear(f"{path}.attn.qkv_proj", x)
        heads = {"heads": layer.heads, "kv_heads": layer.kv_heads}
        attended, key, value = emit.attention(f"{path}.attn", qkv, past, shared.lengths, shared.rope, **heads)
        if last:
            width = layer.heads * self.spec.head_dim
            attended = emit.select_rows("model.attended_rows", attended, shared.logits_positions, width)
            residual = emit.select_rows("model.residual_rows", residual, shared.logits_positions, self.spec.hidden)
        branch = self._linear(f"{path}.attn.o_proj", attended)
        norm = f"{path}.post_attention_layernorm"
        x, residual = emit.add_and_norm(norm, residual, branch, self._norm(norm))
        gate_up = self._linear(f"{path}.mlp.gate_up_proj", x)
        active = emit.gated_silu(f"{path}.mlp.act", gate_up, layer.intermediate)
        branch = self._linear(f"{path}.mlp.down_proj", active)
        norm = "model.norm" if last else f"model.layers.{index + 1}.input_layernorm"
        x, residual = emit.add_and_norm(norm, residual, branch, self._norm(norm))
        return x, residual, (key, value)

    def _past(self, index: int, layer: LayerSpec) -> tuple[ir.Value, ir.Value]:
        shape = ("batch", layer.kv_heads, "past", self.spec.head_dim)
        names = (f"past_key_values.{index}.key", f"past_key_values.{index}.value")
        key, value = (self.emit.input(name, ir.DataType.FLOAT, shape) for name in names)
        return key, value

    def _linear(self, name: str, x: ir.Value) -> ir.Value:
        """The linear layer `name`, fused from the checkpoint's parts where there are several."""
        sources = _SOURCES[name.rsplit(".", 1)[1]]
        layer = name.rsplit(".", 2)[0]
        parts = [f"{layer}.{source}" for source in sources]
        shapes = [self.weights.shape(f"{part}.weight") for part in parts]
        outputs, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
        weight = self.emit.weight(f"{name}.weight", (inputs, outputs), lambda: self._joined(parts, "weight"))
        bias = None
        if f"{parts[0]}.bias" in self.weights:
            bias = self.emit.weight(f"{name}.bias", (outputs,), lambda: self._joined(parts, "bias"))
        return self.emit.linear(name, x, weight, bias)

    def _joined(self, parts: list[str], kind: str) -> NDArray[np.float32]:
        """The parts' outputs side by side: weights [in, sum of outs] from [out, in], biases [sum of outs]."""
        arrays = [self.weights.read(f"{part}.{kind}") for part in parts]
        return np.ascontiguousarray(np.concatenate(arrays).T)

    def _norm(self, name: str) -> ir.Value:
        return self._tensor(f"{name}.weight", (self.spec.hidden,))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        return self.emit.weight(name, shape, lambda: self.weights.read(name))

    def _head(self) -> ir.Value:
        """The head [hidden, vocabulary]; a tied one is stored too, as ONNX Runtime packs its own copy of either."""
        source = "model.embed_tokens.weight" if self.spec.tied else "lm_head.weight"
        shape = (self.spec.hidden, self.spec.vocab_size)
        return self.emit.weight("lm_head.weight", shape, lambda: np.ascontiguousarray(self.weights.read(source).T))


_SOURCES = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
