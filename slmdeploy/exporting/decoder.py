"""A decoder as an ONNX graph, built from its weights and never traced: the one definition of all families and dialects.

A `DecoderSpec` says what differs between families, an `Emitter` with which operators. Because attention is the last
thing that mixes tokens, a dialect that gives logits of chosen rows picks them right behind the last layer's attention,
so that its projection and its MLP are computed for them alone: a prompt needs one row, and a sixth of a six-layer
model's linear work is then hardly done at all.

Query, key and value share one MatMul, as do gate and up: within noise in fp32 (benchmarks/fusion.py), but a quantised
build then quantises the activations once instead of two or three times. Knows nothing of files.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slmdeploy.checkpoint import Weights
from slmdeploy.exporting.dialect import OrtDialect
from slmdeploy.exporting.emitter import Emitter
from slmdeploy.exporting.spec import DecoderSpec, LayerSpec, head_rows

_STRIPE = 64
Labels = tuple[str, tuple[int, ...]]
Stream = tuple[ir.Value, ir.Value]
"""The input of the next branch, and the residual stream beside it."""


def build_decoder(
    spec: DecoderSpec, weights: Weights, emitter: Emitter | None = None, labels: Labels | None = None
) -> ir.Model:
    """The float32 graph of a decoder, in the `ort` dialect unless the emitter of another is given.

    Inputs: input_ids int64 [batch, sequence]; attention_mask int64 [batch, total], right-padded, total being past and
    sequence together; logits_positions int64 [rows], indices into batch x sequence; past_key_values.{i}.key and .value
    float32 [batch, kv_heads, past, head_dim]. Outputs: logits float32 [rows, vocabulary]; present.{i}.key and .value,
    which may be the same buffers as the past when those are long enough. portable.py has the interface of the other.
    labels: a name for the head and the token ids that it is computed for, instead of the whole vocabulary.
    """
    return _Decoder(spec, weights, emitter or OrtDialect(spec), labels).build()


class _Decoder:
    def __init__(self, spec: DecoderSpec, weights: Weights, emit: Emitter, labels: Labels | None) -> None:
        self.spec, self.names, self.weights, self.emit, self.labels = spec, spec.names, weights, emit, labels

    def build(self) -> ir.Model:
        input_ids = self.emit.begin()
        stream = self._first(self._embedded(input_ids))
        for index, layer in enumerate(self.spec.layers):
            stream = self._layer(index, layer, stream)
        logits = self.emit.linear("lm_head", stream[0], self._head(), None)
        return self.emit.finish(self.emit.softcapped("lm_head.softcap", logits, self.spec.logits_softcap))

    def _embedded(self, input_ids: ir.Value) -> ir.Value:
        spec, emit = self.spec, self.emit
        table = self._tensor("model.embed_tokens", self.names.embedding, (spec.vocab_size, spec.hidden))
        x = emit.scaled(
            "model.embed_scale", emit.embedding("model.embed_tokens", table, input_ids), spec.embedding_multiplier
        )
        if self.names.positions is None:
            return x
        table = self._tensor("model.embed_positions", self.names.positions, (spec.positions, spec.hidden))
        return emit.add("model.embed_sum", x, emit.embedding("model.embed_positions", table, emit.positions()))

    def _first(self, x: ir.Value) -> Stream:
        name = self.names.before_attention
        return (x if name is None else self._norm(f"model.layers.0.{name}", 0, name, x)), x

    def _layer(self, index: int, layer: LayerSpec, stream: Stream) -> Stream:
        attended, stream = self._attended(index, layer, stream)
        path = f"model.layers.{index}"
        branch = self._linear(index, f"{path}.attn.o_proj", (self.names.attention_out,), attended)
        if self.spec.flow == "parallel":
            return self._parallel(index, layer, stream, branch)
        branch = self._behind(index, self.names.after_attention, branch)
        x, residual = self._joined(f"{path}.attn", index, self.names.before_mlp, stream[1], branch)
        branch = self._behind(index, self.names.after_mlp, self._mlp(index, layer, x))
        return self._to_next(index, residual, branch)

    def _attended(self, index: int, layer: LayerSpec, stream: Stream) -> tuple[ir.Value, Stream]:
        """What attention gives, and the stream; in the last layer both for the rows that the head is computed for."""
        spec, emit, path = self.spec, self.emit, f"model.layers.{index}"
        qkv = self._linear(index, f"{path}.attn.qkv_proj", self.names.qkv, stream[0])
        norms = self._qk_norms(index, layer) if spec.qk_norm != "none" else None
        if spec.qk_norm == "whole" and norms is not None:
            query, key, value = emit.split_qkv(f"{path}.attn", qkv, layer)
            query, key = (
                emit.norm(f"{path}.attn.{name}_norm", x, norm)
                for name, x, norm in zip("qk", (query, key), norms, strict=True)
            )
            attended = emit.attention(f"{path}.attn", index, layer, (query, key, value), None)
        else:
            attended = emit.attention(f"{path}.attn", index, layer, qkv, norms)
        if index < len(spec.layers) - 1:
            return attended, stream
        attended = emit.select_rows("model.attended_rows", attended, layer.heads * spec.head_dim)
        residual = emit.select_rows("model.residual_rows", stream[1], spec.hidden)
        shared = spec.flow == "parallel" and self.names.before_mlp is None
        x = emit.select_rows("model.normed_rows", stream[0], spec.hidden) if shared else stream[0]
        return attended, (x, residual)

    def _qk_norms(self, index: int, layer: LayerSpec) -> tuple[ir.Value, ir.Value]:
        whole, dim = self.spec.qk_norm == "whole", self.spec.head_dim
        names, heads = (self.names.query_norm, self.names.key_norm), (layer.heads, layer.kv_heads)
        query, key = (
            self._norm_weight(f"model.layers.{index}.attn.{part}_norm", index, name, count * dim if whole else dim)
            for part, name, count in zip("qk", names, heads, strict=True)
        )
        return query, key

    def _parallel(self, index: int, layer: LayerSpec, stream: Stream, attention: ir.Value) -> Stream:
        """x + attention(norm(x)) + mlp(norm(x)), the norms being one where the family has one."""
        x, residual = stream
        if (name := self.names.before_mlp) is not None:
            x = self._norm(f"model.layers.{index}.{name}", index, name, residual)
        branch = self.emit.add(f"model.layers.{index}.branches", attention, self._mlp(index, layer, x))
        return self._to_next(index, residual, branch)

    def _mlp(self, index: int, layer: LayerSpec, x: ir.Value) -> ir.Value:
        spec, emit, path = self.spec, self.emit, f"model.layers.{index}.mlp"
        if spec.gated:
            both = self._linear(index, f"{path}.gate_up_proj", self.names.mlp_in, x)
            active = emit.gated(f"{path}.act", spec.activation, both, layer.intermediate)
        else:
            wide = self._linear(index, f"{path}.up_proj", self.names.mlp_in, x)
            active = emit.activation(f"{path}.act", spec.activation, wide)
        return self._linear(index, f"{path}.down_proj", (self.names.mlp_out,), active)

    def _behind(self, index: int, name: str | None, branch: ir.Value) -> ir.Value:
        """The branch, normalised where the family does so behind it."""
        return branch if name is None else self._norm(f"model.layers.{index}.{name}", index, name, branch)

    def _to_next(self, index: int, residual: ir.Value, branch: ir.Value) -> Stream:
        """The stream behind the layer; behind the last one it ends in the final norm."""
        if index + 1 < len(self.spec.layers):
            return self._joined(f"model.layers.{index}.mlp", index + 1, self.names.before_attention, residual, branch)
        weight, bias = self._norm_tensors("model.norm", self.names.final_norm)
        return self.emit.add_and_norm("model.norm", residual, branch, weight, bias)

    def _joined(self, place: str, index: int, name: str | None, residual: ir.Value, branch: ir.Value) -> Stream:
        """The sum of both, and its normalisation by the norm `name` of layer `index` if there is one.

        place: what the branch came from.
        """
        if name is None:
            total = self.emit.add(f"{place}.sum", residual, branch)
            return total, total
        path = f"model.layers.{index}.{name}"
        weight, bias = self._norm_tensors(path, f"{self.names.layers}.{index}.{name}")
        return self.emit.add_and_norm(path, residual, branch, weight, bias)

    def _norm(self, path: str, index: int, name: str, x: ir.Value) -> ir.Value:
        weight, bias = self._norm_tensors(path, f"{self.names.layers}.{index}.{name}")
        return self.emit.norm(path, x, weight, bias)

    def _norm_tensors(self, path: str, source: str) -> tuple[ir.Value, ir.Value | None]:
        weight = self._offset_weight(path, source, self.spec.hidden)
        if not self.spec.norm.bias:
            return weight, None
        return weight, self.emit.weight(
            f"{path}.bias", (self.spec.hidden,), lambda: self.weights.read(f"{source}.bias")
        )

    def _norm_weight(self, path: str, index: int, name: str, width: int) -> ir.Value:
        return self._offset_weight(path, f"{self.names.layers}.{index}.{name}", width)

    def _offset_weight(self, path: str, source: str, width: int) -> ir.Value:
        offset = np.float32(self.spec.norm.offset)

        def read() -> NDArray[np.float32]:
            weight = self.weights.read(f"{source}.weight")
            return weight + offset if offset else weight

        return self.emit.weight(f"{path}.weight", (width,), read)

    def _linear(self, index: int, name: str, sources: tuple[str, ...], x: ir.Value) -> ir.Value:
        """The linear layer `name`, fused from the checkpoint's parts where there are several."""
        parts = [f"{self.names.layers}.{index}.{source}" for source in sources]
        axes = (1, 0) if self.names.transposed else (0, 1)
        shapes = [self.weights.shape(f"{part}.weight") for part in parts]
        outputs, inputs = sum(shape[axes[0]] for shape in shapes), shapes[0][axes[1]]
        read = _LinearReader(self.spec, self.weights, parts, index)
        weight = self.emit.weight(f"{name}.weight", (inputs, outputs), read.weight)
        bias = None
        if f"{parts[0]}.bias" in self.weights:
            bias = self.emit.weight(f"{name}.bias", (outputs,), read.bias)
        return self.emit.linear(name, x, weight, bias)

    def _tensor(self, name: str, source: str, shape: tuple[int, ...]) -> ir.Value:
        return self.emit.weight(f"{name}.weight", shape, lambda: self.weights.read(f"{source}.weight"))

    def _head(self) -> ir.Value:
        if self.labels is None:
            return self.emit.weight("lm_head.weight", (self.spec.hidden, self.spec.vocab_size), self._read_head)
        name, ids = self.labels
        return self.emit.weight(name, (self.spec.hidden, len(ids)), lambda: self._read_head()[:, list(ids)])

    def _read_head(self) -> NDArray[np.float32]:
        """The head [hidden, vocabulary]; a tied one is stored too, as ONNX Runtime packs its own copy of either."""
        return transposed(head_rows(self.spec, self.weights))


class _LinearReader:
    """Reads a linear layer as the graph has it: parts side by side, [in, out], branch multipliers folded in."""

    def __init__(self, spec: DecoderSpec, weights: Weights, parts: list[str], index: int) -> None:
        self.spec, self.weights, self.parts, self.index = spec, weights, parts, index

    def weight(self) -> NDArray[np.float32]:
        """[in, sum of outs]."""
        arrays = [self._ordered(self.weights.read(f"{part}.weight")) for part in self.parts]
        if self.spec.names.transposed:
            return self._scaled(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1))
        return self._scaled(transposed(arrays[0] if len(arrays) == 1 else np.concatenate(arrays)))

    def bias(self) -> NDArray[np.float32]:
        """[sum of outs]."""
        return self._scaled(np.concatenate([self._ordered(self.weights.read(f"{part}.bias")) for part in self.parts]))

    def _scaled(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        names, factor = self.spec.names, self.spec.residual_multiplier
        ends_branch = self.parts[0].endswith((names.attention_out, names.mlp_out))
        return array * np.float32(factor) if factor != 1 and ends_branch else array

    def _ordered(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        """Query, key and value one after the other, where the checkpoint has those of each head together."""
        if not self.spec.names.interleaved or not self.parts[0].endswith(self.spec.names.qkv):
            return array
        heads = self.spec.layers[self.index].heads
        apart = array.reshape(heads, 3, self.spec.head_dim, *array.shape[1:])
        return np.ascontiguousarray(np.moveaxis(apart, 1, 0)).reshape(array.shape)


def transposed(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix's transpose as a contiguous array, copied in stripes that stay in the cache: up to five times faster."""
    result = np.empty(array.shape[::-1], array.dtype)
    for start in range(0, len(array), _STRIPE):
        result[:, start : start + _STRIPE] = array[start : start + _STRIPE].T
    return result
