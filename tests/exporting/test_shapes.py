"""Published models' shapes with random weights, exported whole: the sizes that the toy models have not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from slmdeploy.exporting.export import export
from tests.exporting.conftest import Record
from tests.graphs import tiny_tokenizer

ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def sizes(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, dim: int, length: int
) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "max_position_embeddings": length,
    }


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": (
        "LlamaConfig",
        sizes(49152, 576, 1536, 30, 9, 3, 64, 8192) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "Qwen2.5-0.5B": (
        "Qwen2Config",
        sizes(151936, 896, 4864, 24, 14, 2, 64, 32768)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "Qwen3-0.6B": (
        "Qwen3Config",
        sizes(151936, 1024, 3072, 28, 16, 8, 128, 40960)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "Llama-3.2-1B": ("LlamaConfig", sizes(128256, 2048, 8192, 16, 32, 8, 64, 131072) | {"rope_parameters": LLAMA3}),
    "Gemma-3-270m": (
        "Gemma3TextConfig",
        sizes(262144, 640, 2048, 18, 4, 1, 256, 32768) | {"query_pre_attn_scalar": 256, "sliding_window": 512},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_published_shape_is_exported_exactly(name: str, tmp_path: Path, record_check: Record) -> None:
    kind, changes = SHAPES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**changes | ENDS, initializer_range=0.04)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint")
    del model
    tiny_tokenizer().save(str(tmp_path / "checkpoint" / "tokenizer.json"))
    artifact = export(tmp_path / "checkpoint", out=tmp_path / "graph", tasks=("generate", "score"))
    rungs = artifact.result["parity"]
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep for three runs
    worst = max(rung["difference"] for rung in rungs)
    parameters = artifact.result["parameters"] / 1e6
    record_check(f"shape: {name}", f"{len(rungs)} rungs", worst, worst <= 1e-4, f"{parameters:.0f}M")
    assert 0 < worst <= 1e-4
