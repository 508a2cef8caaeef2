"""The decoder families, each a row of data: where its tensors are, and which config fields say how it computes.

A row's value is either what the family always has, or a `Field`: the name in config.json, its default in transformers'
config class, and what to make of it. Supporting a family means adding a row. Reads nothing itself: reading.py makes a
DecoderSpec of a config.json by a row. Knows nothing of ONNX.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slmdeploy.exporting.spec import Flow, Names


@dataclass(frozen=True)
class Field:
    """A field of config.json; `default` where it is absent, `convert` what its value stands for."""

    name: str
    default: Any = ...
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Family:
    """A row of the table.

    `sizes`: the family's own names for the fields of llama's config. `windows`: which layers see a window only.
    `shared_norm`: where attention and MLP are parallel they have one norm. `grouped`: key-value heads may be fewer.
    `rope`: which layers are rotated how; "two" is one embedding for windows and one for the rest. `one_value`: fields
    with one implemented value. `read`: fields that rope and windows read.
    """

    model_type: str
    names: Names = field(default_factory=Names)
    sizes: Mapping[str, str] = field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    eps: Field = field(default_factory=lambda: Field("rms_norm_eps", 1e-6))
    flow: Flow | Field = "pre"
    shared_norm: bool = False
    grouped: bool = True
    gated: bool = True
    activation: Field = field(default_factory=lambda: Field("hidden_act", "silu"))
    qkv_bias: bool | Field = False
    output_bias: bool | Field = False
    mlp_bias: bool | Field = False
    qk_norm: Literal["none", "head", "whole"] = "none"
    windows: Literal["none", "all", "types", "from_layer", "without_rope"] = "none"
    window_default: int | None = None
    rope: Literal["one", "none", "two", "listed"] = "one"
    rotary_share: float = 1.0
    theta: float = 10_000.0
    scale: Field | None = None
    attention_softcap: Field | None = None
    logits_softcap: Field | None = None
    embedding_multiplier: Field | Literal["root of hidden"] | None = None
    residual_multiplier: Field | None = None
    logits_multiplier: Field | None = None
    tied: bool = False
    bos: int | None = None
    eos: int | None = None
    length: int = 2048
    one_value: Mapping[str, Any] = field(default_factory=dict)
    read: frozenset[str] = frozenset()

    def fields(self) -> frozenset[str]:
        """Every field that this row reads, beside those that are read for all families."""
        own = {value.name for value in vars(self).values() if isinstance(value, Field)}
        return frozenset(own | self.read | set(self.sizes.values()))


_SANDWICH = Names(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_POST = Names(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
_GPT2 = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    qkv=("attn.c_attn",),
    attention_out="attn.c_proj",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    before_attention="ln_1",
    before_mlp="ln_2",
    transposed=True,
)
_NEOX = Names(
    embedding="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    qkv=("attention.query_key_value",),
    attention_out="attention.dense",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    interleaved=True,
)
_GPT2_SIZES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_PARALLEL = Field("use_parallel_residual", False, lambda parallel: "parallel" if parallel else "pre")
_ATTENTION_BIAS, _MLP_BIAS = Field("attention_bias", False), Field("mlp_bias", False)
_TANH = Field("hidden_activation", "gelu_pytorch_tanh")
_QUERY_SCALE = Field("query_pre_attn_scalar", 256, lambda dimension: dimension**-0.5)
_GEMMA: dict[str, Any] = {
    **{"norm_offset": 1.0, "flow": "sandwich", "activation": _TANH, "embedding_multiplier": "root of hidden"},
    **{"qkv_bias": _ATTENTION_BIAS, "output_bias": _ATTENTION_BIAS, "scale": _QUERY_SCALE, "names": _SANDWICH},
    **{"windows": "types", "window_default": 4096, "tied": True, "bos": 2, "eos": 1},
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "llama",
        qkv_bias=_ATTENTION_BIAS,
        output_bias=_ATTENTION_BIAS,
        mlp_bias=_MLP_BIAS,
        bos=1,
        eos=2,
        one_value={"is_llama_config": True, "rope_interleaved": False, "use_sliding_window": False},
    ),
    "MistralForCausalLM": Family(
        "mistral", windows="all", window_default=4096, bos=1, eos=2, length=131072, read=frozenset({"sliding_window"})
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        qkv_bias=True,
        windows="from_layer",
        length=32768,
        read=frozenset({"sliding_window", "use_sliding_window", "max_window_layers"}),
        one_value={"use_mrope": False},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        qkv_bias=_ATTENTION_BIAS,
        output_bias=_ATTENTION_BIAS,
        qk_norm="head",
        windows="from_layer",
        length=32768,
        read=frozenset({"sliding_window", "use_sliding_window", "max_window_layers"}),
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        qkv_bias=_ATTENTION_BIAS,
        output_bias=_ATTENTION_BIAS,
        mlp_bias=_MLP_BIAS,
        windows="without_rope",
        rope="listed",
        theta=2_000_000.0,
        tied=True,
        bos=128000,
        eos=128001,
        length=32768,
        read=frozenset(
            {"sliding_window", "use_sliding_window", "no_rope_layers", "no_rope_layer_interval", "max_window_layers"}
        ),
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        **_GEMMA,
        attention_softcap=Field("attn_logit_softcapping", 50.0),
        logits_softcap=Field("final_logit_softcapping", 30.0),
        length=8192,
        read=frozenset({"sliding_window"}),
        one_value={"use_bidirectional_attention": False, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        **_GEMMA,
        qk_norm="head",
        logits_softcap=Field("final_logit_softcapping", None),
        rope="two",
        length=131072,
        read=frozenset({"sliding_window", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"}),
        # transformers reads a soft cap of attention here and does not apply it: no released model has one
        one_value={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        names=Names(qkv=("self_attn.qkv_proj",), mlp_in=("mlp.gate_up_proj",)),
        eps=Field("rms_norm_eps", 1e-5),
        windows="all",
        bos=1,
        eos=32000,
        length=4096,
        # its repositories name custom code besides, for transformers that did not have the family yet; never run
        read=frozenset({"sliding_window", "original_max_position_embeddings", "partial_rotary_factor", "auto_map"}),
        one_value={
            **{"attention_bias": False, "lm_head_bias": False, "mlp_bias": False},
            **{"full_attn_mod": 1, "interpolate_factor": 1},
        },
    ),
    "GraniteForCausalLM": Family(
        "granite",
        qkv_bias=_ATTENTION_BIAS,
        output_bias=_ATTENTION_BIAS,
        mlp_bias=_MLP_BIAS,
        scale=Field("attention_multiplier", 1.0),
        embedding_multiplier=Field("embedding_multiplier", 1.0),
        residual_multiplier=Field("residual_multiplier", 1.0),
        logits_multiplier=Field("logits_scaling", 1.0, lambda divisor: 1.0 / divisor),
        bos=1,
        eos=2,
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        names=_POST,
        eps=Field("rms_norm_eps", 1e-5),
        flow="post",
        qkv_bias=_ATTENTION_BIAS,
        output_bias=_ATTENTION_BIAS,
        qk_norm="whole",
        eos=50279,
    ),
    "StableLmForCausalLM": Family(
        "stablelm",
        norm="layer",
        eps=Field("layer_norm_eps", 1e-5),
        flow=_PARALLEL,
        shared_norm=True,
        qkv_bias=Field("use_qkv_bias", False),
        rotary_share=0.25,
        bos=0,
        eos=0,
        length=4096,
        read=frozenset({"partial_rotary_factor"}),
        one_value={"qk_layernorm": False},
    ),
    "GPT2LMHeadModel": Family(
        "gpt2",
        names=_GPT2,
        sizes=_GPT2_SIZES,
        norm="layer",
        eps=Field("layer_norm_epsilon", 1e-5),
        grouped=False,
        gated=False,
        activation=Field("activation_function", "gelu_new"),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        rope="none",
        scale=Field("scale_attn_weights", True),
        tied=True,
        bos=50256,
        eos=50256,
        length=1024,
        one_value={"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False},
    ),
    "GPTNeoXForCausalLM": Family(
        "gpt_neox",
        names=_NEOX,
        norm="layer",
        eps=Field("layer_norm_eps", 1e-5),
        flow=Field("use_parallel_residual", True, _PARALLEL.convert),
        grouped=False,
        gated=False,
        activation=Field("hidden_act", "gelu"),
        qkv_bias=Field("attention_bias", True),
        output_bias=Field("attention_bias", True),
        mlp_bias=True,
        rotary_share=0.25,
        bos=0,
        eos=2,
        read=frozenset({"rotary_pct", "rotary_emb_base", "partial_rotary_factor"}),
    ),
    "Starcoder2ForCausalLM": Family(
        "starcoder2",
        names=Names(mlp_in=("mlp.c_fc",), mlp_out="mlp.c_proj"),
        norm="layer",
        eps=Field("norm_epsilon", 1e-5),
        gated=False,
        activation=Field("hidden_act", "gelu_pytorch_tanh"),
        qkv_bias=Field("use_bias", True),
        output_bias=Field("use_bias", True),
        mlp_bias=Field("use_bias", True),
        windows="all",
        tied=True,
        bos=50256,
        eos=50256,
        length=4096,
        read=frozenset({"sliding_window"}),
        one_value={"mlp_type": "default", "norm_type": "layer_norm", "use_layer_norm": True},
    ),
}
