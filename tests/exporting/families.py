"""Toy checkpoints of every decoder family, from transformers' own config classes: what the table of families tests."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.graphs import tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MQA, MHA = {"num_key_value_heads": 1}, {"num_key_value_heads": 4}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 48}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.7 * i for i in range(6)],
    "partial_rotary_factor": 0.75,
}
GPT2_SIZES: dict[str, Any] = {
    **{"vocab_size": 272, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 192, "bos_token_id": 0},
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Case:
    """One variant of a family: transformers' config class, what to change, and how long a context to export."""

    family: str
    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None

    def make_config(self) -> Any:
        sizes = GPT2_SIZES if self.config == "GPT2Config" else SIZES
        if self.config == "GPTNeoXConfig":
            sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
        return getattr(transformers, self.config)(**sizes | self.changes)


LAYERS_24 = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}
CASES: dict[str, Case] = {
    "llama-gqa": Case("Llama 2/3, SmolLM2", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-mqa-head-dim": Case("Llama 2/3, SmolLM2", "LlamaConfig", {**MQA, **TIED, "head_dim": 32}),
    "llama-head-dim-24": Case("Llama 2/3, SmolLM2", "LlamaConfig", {"head_dim": 24}),
    "llama-mha-linear": Case(
        "Llama 2/3, SmolLM2",
        "LlamaConfig",
        {
            **MHA,
            "max_position_embeddings": 96,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
        max_length=192,
    ),
    "llama3-rope": Case("Llama 2/3, SmolLM2", "LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-dynamic": Case(
        "Llama 2/3, SmolLM2",
        "LlamaConfig",
        {"max_position_embeddings": 48, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
        max_length=192,
    ),
    "mistral-window": Case("Mistral", "MistralConfig", {"sliding_window": 24, "head_dim": 16}),
    "mistral-full": Case("Mistral", "MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "qwen2": Case("Qwen2/2.5", "Qwen2Config", TIED),
    "qwen2-window-yarn": Case(
        "Qwen2/2.5",
        "Qwen2Config",
        {**MQA, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "rope_parameters": YARN},
    ),
    "qwen3": Case("Qwen3", "Qwen3Config", {**TIED, "head_dim": 32}),
    "qwen3-mqa-bias": Case("Qwen3", "Qwen3Config", {**MQA, "head_dim": 16, "attention_bias": True}),
    "smollm3": Case("SmolLM3", "SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "smollm3-window": Case(
        "SmolLM3",
        "SmolLM3Config",
        {**MHA, "use_sliding_window": True, "sliding_window": 24, "no_rope_layers": [1, 0, 1]},
    ),
    "gemma2": Case(
        "Gemma 2",
        "Gemma2Config",
        {**LAYERS_24, "head_dim": 32, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": Case(
        "Gemma 3",
        "Gemma3TextConfig",
        {
            **LAYERS_24,
            **MQA,
            "head_dim": 32,
            "query_pre_attn_scalar": 40,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "gemma3-softcap": Case(
        "Gemma 3",
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 24, "final_logit_softcapping": 2.0},
    ),
    "phi3": Case("Phi-3, Phi-4-mini", "Phi3Config", {**MHA, "sliding_window": 24}),
    "phi3-longrope": Case(
        "Phi-3, Phi-4-mini",
        "Phi3Config",
        {**TIED, "original_max_position_embeddings": 48, "rope_parameters": LONGROPE},
    ),
    "granite": Case(
        "Granite",
        "GraniteConfig",
        {
            **TIED,
            **{"attention_multiplier": 0.11, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
            "residual_multiplier": 0.22,
        },
    ),
    "olmo2": Case("OLMo 2", "Olmo2Config", MHA),
    "olmo2-gqa": Case("OLMo 2", "Olmo2Config", {"attention_bias": True}),
    "stablelm": Case("StableLM", "StableLmConfig", {"use_qkv_bias": True}),
    "stablelm-parallel": Case("StableLM", "StableLmConfig", {**MHA, "use_parallel_residual": True}),
    "gpt2": Case("GPT-2", "GPT2Config"),
    "gpt2-untied-relu": Case("GPT-2", "GPT2Config", {**UNTIED, "activation_function": "relu", "n_inner": 37}),
    "gpt-neox": Case("GPT-NeoX", "GPTNeoXConfig"),
    "gpt-neox-serial": Case(
        "GPT-NeoX", "GPTNeoXConfig", {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"}
    ),
    "starcoder2": Case("StarCoder2", "Starcoder2Config", {"sliding_window": 24}),
    "starcoder2-mqa": Case("StarCoder2", "Starcoder2Config", {**MQA, **UNTIED, "use_bias": False}),
}


def write_case(case: Case, folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Save a random model of the case with its tokenizer; norms and biases are random too, so a swapped one shows."""
    torch.manual_seed(0)
    config = case.make_config()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        plain = parameter.dim() == 1
        mean = float(plain and name.endswith("weight") and "gemma" not in config.model_type)
        torch.nn.init.normal_(parameter, mean=mean, std=0.3 if plain else 0.15)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return model.eval()
