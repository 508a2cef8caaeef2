"""What a decoder checkpoint computes, as data: `DecoderSpec`, and whether its tensors are those that this asks for.

One definition of a decoder (decoder.py) reads nothing else, so that a family is a row of values (families.py) and not a
subclass. A tensor that is missing, left over or mis-shaped is an UnsupportedModelError naming it: what is not accounted
for may change the maths. Knows nothing of config.json and nothing of ONNX.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slmdeploy.checkpoint import Weights
from slmdeploy.errors import UnsupportedModelError

PORTABLE_OPSETS = (21, 23, 24)
"""Opsets of the portable dialect, the default first."""
STATIC_OPSET = 24
"""From here on the portable dialect has a cache of fixed capacity."""
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Flow = Literal["pre", "post", "sandwich", "parallel"]


@dataclass(frozen=True)
class LayerSpec:
    """What one layer has of its own; layers may differ, by design or after structured pruning.

    `window`: how many tokens a query sees, itself included; None for all before it. `rope`: the index of its rotary
    embedding in `DecoderSpec.ropes`; None for a layer without one.
    """

    heads: int
    kv_heads: int
    intermediate: int
    window: int | None = None
    rope: int | None = 0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first `dims` numbers of a head: base `theta` and a scaling by its config name.

    kind: default, linear, llama3, yarn, dynamic or longrope; `parameters` by config name. `original`: the context
    before scaling, in tokens; the frequencies of dynamic and longrope change where a sequence is longer than that.
    """

    theta: float
    kind: str
    dims: int
    parameters: tuple[tuple[str, float | tuple[float, ...]], ...] = ()
    original: int = 0

    def changes_within(self, length: int) -> bool:
        """Whether its frequencies depend on the length of the sequence, up to `length` tokens."""
        return self.kind in ("dynamic", "longrope") and length > self.original


@dataclass(frozen=True)
class Norm:
    """Normalisation: RMS (Zhang and Sennrich 2019) or LayerNorm; `offset` is added to the stored weight."""

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class Names:
    """Where a family keeps its tensors, by path without ".weight" and ".bias"; a layer's are relative to the layer.

    `qkv` and `mlp_in` have several entries where the parts are stored apart, and one where they are fused already.
    The norms are None where a family has none in that place.
    """

    embedding: str = "model.embed_tokens"
    positions: str | None = None
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    transposed: bool = False
    """Linear weights are [in, out], as in GPT-2, and not [out, in]."""
    interleaved: bool = False
    """The fused qkv has query, key and value of each head side by side, as in GPT-NeoX."""

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a layer."""
        every = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in every if name is not None)

    def without_prefix(self) -> "Names":
        """The same without the first component, as a model that was saved without its head has them."""

        def cut(path: str) -> str:
            return path.partition(".")[2]

        positions = self.positions and cut(self.positions)
        embedding, layers, final = cut(self.embedding), cut(self.layers), cut(self.final_norm)
        return replace(self, embedding=embedding, positions=positions, layers=layers, final_norm=final)


@dataclass(frozen=True)
class DecoderSpec:
    """A member of a decoder family: sizes, norms, positions, attention, MLP and head. `layers` has one entry each.

    flow: "pre" normalises before each branch, "post" behind it, "sandwich" both; "parallel" adds attention and MLP of
    one input. `positions`: rows of the table of learned positions, 0 without one. `attention_scale` multiplies the
    products, `attention_softcap` and `logits_softcap` c bound by c tanh(x / c). The multipliers are of the embedding,
    of each branch and of the logits.
    """

    names: Names
    hidden: int
    vocab_size: int
    head_dim: int
    max_length: int
    layers: tuple[LayerSpec, ...]
    norm: Norm
    ropes: tuple[Rope, ...]
    attention_scale: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    flow: Flow = "pre"
    activation: Activation = "silu"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    positions: int = 0
    tied: bool = False

    @property
    def scaled_context(self) -> bool:
        """Whether some frequencies depend on the length of the sequence within this context."""
        return any(rope.changes_within(self.max_length) for rope in self.ropes)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must hold, by Hugging Face name."""
        names = self.names
        shapes: dict[str, tuple[int, ...]] = {f"{names.embedding}.weight": (self.vocab_size, self.hidden)}
        if names.positions:
            shapes[f"{names.positions}.weight"] = (self.positions, self.hidden)
        shapes |= self._norm_shapes(names.final_norm)
        if not self.tied:
            shapes[f"{names.head}.weight"] = (self.vocab_size, self.hidden)
        for index, layer in enumerate(self.layers):
            shapes |= {f"{names.layers}.{index}.{name}": shape for name, shape in self._layer_shapes(layer).items()}
        return shapes

    def _norm_shapes(self, name: str, width: int | None = None) -> dict[str, tuple[int, ...]]:
        shape: tuple[int, ...] = (self.hidden if width is None else width,)
        return {f"{name}.weight": shape} | ({f"{name}.bias": shape} if self.norm.bias else {})

    def _layer_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        names, query, key = self.names, layer.heads * self.head_dim, layer.kv_heads * self.head_dim
        linear = [
            *zip(
                names.qkv, _widths(names.qkv, (query, key, key)), [self.hidden] * 3, [self.qkv_bias] * 3, strict=False
            ),
            (names.attention_out, self.hidden, query, self.output_bias),
            *(
                (name, width, self.hidden, self.mlp_bias)
                for name, width in zip(names.mlp_in, _widths(names.mlp_in, self._mlp_parts(layer)), strict=True)
            ),
            (names.mlp_out, self.hidden, layer.intermediate, self.mlp_bias),
        ]
        shapes: dict[str, tuple[int, ...]] = {}
        for name, outputs, inputs, biased in linear:
            shapes[f"{name}.weight"] = (inputs, outputs) if names.transposed else (outputs, inputs)
            if biased:
                shapes[f"{name}.bias"] = (outputs,)
        for name in names.norms:
            shapes |= self._norm_shapes(name)
        if self.qk_norm != "none":
            whole = self.qk_norm == "whole"
            shapes |= self._norm_shapes(names.query_norm, query if whole else self.head_dim)
            shapes |= self._norm_shapes(names.key_norm, key if whole else self.head_dim)
        return shapes

    def _mlp_parts(self, layer: LayerSpec) -> tuple[int, ...]:
        return (layer.intermediate,) * (2 if self.gated else 1)


def _widths(stored: tuple[str, ...], parts: tuple[int, ...]) -> tuple[int, ...]:
    """Output widths of the tensors that hold these parts: each its own, or one for all."""
    return parts if len(stored) == len(parts) else (sum(parts),)


def located(spec: DecoderSpec, weights: Weights) -> DecoderSpec:
    """The spec with the names under which these weights are stored: older checkpoints lack the model's prefix."""
    plain = spec.names.without_prefix()
    stored = f"{spec.names.embedding}.weight" not in weights and f"{plain.embedding}.weight" in weights
    return replace(spec, names=plain) if stored else spec


def check_tensors(spec: DecoderSpec, weights: Weights) -> None:
    """Raise UnsupportedModelError for the first tensor that is missing, mis-shaped or not accounted for by the spec."""
    where, expected = weights.checkpoint, spec.tensor_shapes()
    for name, shape in expected.items():
        if name not in weights:
            raise UnsupportedModelError(f"{where} has no tensor {name}, which its config.json asks for")
        if weights.shape(name) != shape:
            raise UnsupportedModelError(
                f"{where}: {name} has shape {list(weights.shape(name))}, but its config.json asks for {list(shape)}"
            )
    for name in weights:
        if name not in expected and not _redundant(name, spec, weights):
            raise UnsupportedModelError(f"{where} holds {name}, which its config.json does not account for")


_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def _redundant(name: str, spec: DecoderSpec, weights: Weights) -> bool:
    """True for what older transformers saved besides: frequencies, causal masks, and the head of a tied model."""
    if name.endswith(_BUFFERS):
        return True
    if name == f"{spec.names.head}.weight" and spec.tied and weights.shape(name) == (spec.vocab_size, spec.hidden):
        return bool(np.array_equal(weights.read(name), weights.read(f"{spec.names.embedding}.weight")))
    return False


def head_rows(spec: DecoderSpec, weights: Weights) -> NDArray[np.float32]:
    """The head as the graph applies it, float32 [vocabulary, hidden]: of the embedding where tied, and scaled."""
    rows = weights.read(f"{spec.names.embedding if spec.tied else spec.names.head}.weight")
    return rows if spec.logits_multiplier == 1 else rows * np.float32(spec.logits_multiplier)
