"""genai_config.json: what onnxruntime-genai has to know to generate from a graph folder.

Written from what lies in the folder already, config.json, generation_config.json and runtime.json, for the graph of the
standard interface. Keys as onnxruntime-genai 0.18 reads them: an unknown one stops its loader. Knows nothing of graphs.
"""

import json
from pathlib import Path
from typing import Any

from slmdeploy.building.standard_graph import STANDARD
from slmdeploy.checkpoint import read_json
from slmdeploy.runtime.bundle import RuntimeConfig, read_runtime
from slmdeploy.runtime.decoding import GRAPH

GENAI = "genai_config.json"
_TYPES = frozenset(
    ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo", "phi", "phi3", "phimoe",
     "qwen2", "qwen3", "smollm3")
)  # fmt: skip
"""The model types that it knows as its own `decoder`; it chooses special tokens by them. Its gpt2 has another cache."""
_SEARCH: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
}
"""How to search where generation_config.json does not say; by the same names there."""


def write_genai_config(folder: Path) -> None:
    """Write genai_config.json into a folder that has runtime.json, config.json and generation_config.json."""
    config, generation = (read_json(folder / f"{name}.json") for name in ("config", "generation_config"))
    value = genai_config(read_runtime(folder), config, generation)
    (folder / GENAI).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def genai_config(runtime: RuntimeConfig, config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """The content of genai_config.json.

    Its loader wants a beginning and a padding token of every model: where a model has none, the first end token stands
    for both, as in onnxruntime-genai's own builder for padding.
    """
    shared = runtime.interface == "shared"
    ends = list(runtime.eos_token_ids)
    spare = ends[0] if ends else 0
    ids = {key: _stated(generation, key, _stated(config, key, spare)) for key in ("bos_token_id", "pad_token_id")}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": STANDARD if shared else GRAPH,
        "head_size": runtime.head_dim,
        "num_hidden_layers": runtime.layers,
        # Only a default: where layers differ, it takes each layer's number from the graph.
        "num_key_value_heads": runtime.kv_heads[0],
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    # Two sizes for its readers' information, which it does not compute with; GPT-2 has names of its own for them.
    names = {"hidden_size": ("hidden_size", "n_embd"), "num_attention_heads": ("num_attention_heads", "n_head")}
    decoder |= {key: config[name] for key, either in names.items() for name in either if name in config}
    model = {
        "type": config["model_type"] if config["model_type"] in _TYPES else "decoder",
        "vocab_size": runtime.vocab_size,
        "context_length": runtime.max_length,
        "eos_token_id": ends,
        **ids,
        "decoder": decoder,
    }
    search = {key: _stated(generation, key, default) for key, default in _SEARCH.items()}
    search |= {"early_stopping": True, "max_length": runtime.max_length, "past_present_share_buffer": shared}
    return {"model": model, "search": search}


def _stated(config: dict[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value
