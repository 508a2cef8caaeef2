"""What a decoder checkpoint computes, as data: `DecoderSpec`, from its config.json, checked against its tensors.

    LlamaForCausalLM, every field understood          -> DecoderSpec
    another architecture, or custom code (`auto_map`) -> UnsupportedModelError naming the field
    a field of the maths with a value not implemented -> UnsupportedModelError naming field and value
    a field that this file has never heard of         -> the same: it may change the maths, so it is not passed over
    a tensor that is missing, left over or mis-shaped -> UnsupportedModelError naming the tensor

Fields are sorted into what shapes the graph, what has one implemented value, and what changes no number of inference;
absent ones take the defaults of transformers' LlamaConfig. Knows nothing of ONNX. It exists so that supporting a family
means adding data here, and a new field in a new transformers version stops the export instead of bending its result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmdeploy.checkpoint import Weights, read_config
from slmdeploy.errors import UnsupportedModelError

ARCHITECTURES = {"LlamaForCausalLM": "llama"}
_SHAPING: dict[str, Any] = {  # field -> LlamaConfig's default; ... where a checkpoint has to say it
    "vocab_size": ...,
    "hidden_size": ...,
    "intermediate_size": ...,
    "num_hidden_layers": ...,
    "num_attention_heads": ...,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_theta": None,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ONE_VALUE: dict[str, Any] = {
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "is_llama_config": True,
    "add_cross_attention": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "use_bfloat16": False,
    "use_sliding_window": False,
}
_NO_MATHS = frozenset(
    (
        *("_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "bad_words_ids"),
        *("chunk_size_feed_forward", "dtype", "finetuning_task", "id2label", "initializer_range", "label2id"),
        *("model_type", "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp"),
        *("problem_type", "return_dict", "task_specific_params", "tie_last_hidden_states", "tokenizer_class"),
        *("torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "unsloth_version"),
        *("use_cache", "_commit_hash", "is_decoder", "prefix"),
    )
)
_ROPE_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


@dataclass(frozen=True)
class LayerSpec:
    """The sizes of one layer; layers may differ, as they do after structured pruning."""

    heads: int
    kv_heads: int
    intermediate: int


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base `theta` and, for "linear" and "llama3" scaling, its parameters by config name."""

    theta: float
    kind: str
    parameters: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder family member: sizes, norm, rotary embedding, biases and tying. `layers` holds one entry per layer."""

    hidden: int
    vocab_size: int
    head_dim: int
    max_length: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    rope: Rope
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must hold, by Hugging Face name; linear weights are [out, in]."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden)
        for index, layer in enumerate(self.layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in self._layer_shapes(layer).items()}
        return shapes

    def _layer_shapes(self, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
        query, key = layer.heads * self.head_dim, layer.kv_heads * self.head_dim
        linear = {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (key, self.hidden),
            "self_attn.v_proj": (key, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_proj": (layer.intermediate, self.hidden),
            "mlp.up_proj": (layer.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, layer.intermediate),
        }
        biased = {"self_attn": self.attention_bias, "mlp": self.mlp_bias}
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items() if biased[name.split(".")[0]]}
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        return shapes | dict.fromkeys(norms, (self.hidden,))


def read_spec(checkpoint: Path) -> DecoderSpec:
    """The spec of a checkpoint folder; raises UnsupportedModelError as the module's table says."""
    return _Config(checkpoint / "config.json", read_config(checkpoint)).spec()


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


def _redundant(name: str, spec: DecoderSpec, weights: Weights) -> bool:
    """True for what older transformers saved besides: the rotary frequencies, and the head of a tied model."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name == "lm_head.weight" and spec.tied and weights.shape(name) == (spec.vocab_size, spec.hidden):
        return bool(np.array_equal(weights.read(name), weights.read("model.embed_tokens.weight")))
    return False


class _Config:
    """config.json with errors that name it; a field is taken by a method that says what it may hold."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file, self.values = file, values

    def spec(self) -> DecoderSpec:
        self._check_architecture()
        self._check_fields()
        heads = self._size("num_attention_heads")
        kv_heads = self._size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self._refusal("num_key_value_heads", f"it does not divide num_attention_heads = {heads}")
        layer = LayerSpec(heads, kv_heads, self._size("intermediate_size"))
        head_dim = self._size("head_dim", self._size("hidden_size") // heads)
        if head_dim % 16:
            raise self._refusal("head_dim", "ONNX Runtime's GroupQueryAttention needs a multiple of 16", head_dim)
        return DecoderSpec(
            hidden=self._size("hidden_size"),
            vocab_size=self._size("vocab_size"),
            head_dim=head_dim,
            max_length=self._size("max_position_embeddings"),
            layers=(layer,) * self._size("num_hidden_layers"),
            norm_eps=self._number("rms_norm_eps", self._value("rms_norm_eps")),
            rope=self._rope(),
            attention_bias=self._flag("attention_bias"),
            mlp_bias=self._flag("mlp_bias"),
            tied=self._flag("tie_word_embeddings"),
            bos_token_id=self._token_ids("bos_token_id")[0] if self._token_ids("bos_token_id") else None,
            eos_token_ids=self._token_ids("eos_token_id"),
        )

    def _check_architecture(self) -> None:
        known = " or ".join(ARCHITECTURES)
        named = self.values.get("architectures")
        if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
            raise self._refusal("architectures", f"only {known} is implemented")
        if self.values.get("model_type") != ARCHITECTURES[named[0]]:
            raise self._refusal("model_type", f"{named[0]} goes with {ARCHITECTURES[named[0]]!r}")

    def _check_fields(self) -> None:
        for name, value in self.values.items():
            if name in _SHAPING or name in _NO_MATHS or value is None:
                continue
            if name not in _ONE_VALUE:
                raise self._refusal(name, "this field is not known and may change the maths")
            if value != _ONE_VALUE[name]:
                raise self._refusal(name, f"only {_ONE_VALUE[name]!r} is implemented")

    def _rope(self) -> Rope:
        nested = self.values.get("rope_parameters")
        scaling = self.values.get("rope_scaling")
        if nested is not None and scaling is not None:
            raise self._refusal("rope_scaling", "rope_parameters is there too; keep one of them")
        field = "rope_parameters" if nested is not None else "rope_scaling"
        given = nested if nested is not None else scaling or {}
        if not isinstance(given, dict):
            raise self._refusal(field, "it must be an object")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in _ROPE_KEYS:
            raise self._refusal(f"{field}.rope_type", f"only {', '.join(_ROPE_KEYS)} are implemented", kind)
        for key in given:
            if key not in _ROPE_KEYS[kind] | {"rope_type", "type", "rope_theta"} and given[key] != _ONE_VALUE.get(key):
                raise self._refusal(f"{field}.{key}", f"this key is not known for rope_type {kind!r}", given[key])
        parameters = tuple((key, self._number(f"{field}.{key}", given.get(key))) for key in sorted(_ROPE_KEYS[kind]))
        theta = given.get("rope_theta", self.values.get("rope_theta"))
        return Rope(10000.0 if theta is None else self._number("rope_theta", theta), kind, parameters)

    def _value(self, name: str) -> Any:
        value = self.values.get(name, _SHAPING[name])
        if value is ...:
            raise UnsupportedModelError(f"{self.file} does not say {name}")
        return value

    def _size(self, name: str, default: int | None = None) -> int:
        value = self._value(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._refusal(name, "it must be a whole number above 0")
        return value

    def _number(self, name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self._refusal(name, "it must be a number above 0", value)
        return float(value)

    def _flag(self, name: str) -> bool:
        value = self._value(name)
        if not isinstance(value, bool):
            raise self._refusal(name, "it must be true or false")
        return value

    def _token_ids(self, name: str) -> tuple[int, ...]:
        value = self._value(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self._refusal(name, "it must be a token id or a list of them")
        return tuple(ids)

    def _refusal(self, name: str, reason: str, *value: Any) -> UnsupportedModelError:
        shown = value[0] if value else self.values.get(name)
        return UnsupportedModelError(f"{self.file}: {name} = {shown!r} is not supported: {reason}")
