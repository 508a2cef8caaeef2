"""rope.py against transformers' own tables, bit for bit: at late positions a last-place difference would show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from slmdeploy.exporting.config import Fields
from slmdeploy.exporting.families import FAMILIES
from slmdeploy.exporting.rope import rope_tables
from slmdeploy.exporting.rope_config import read_ropes
from slmdeploy.exporting.spec import Rope

POSITIONS, HEAD_DIM = 3000, 32
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 256}


def given(parameters: dict[str, Any], family: str = "LlamaForCausalLM", **beside: Any) -> Rope:
    fields = Fields(Path("config.json"), {"rope_parameters": parameters} | beside)
    (rope,) = read_ropes(fields, FAMILIES[family], HEAD_DIM, POSITIONS)
    return rope


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        YARN | {"factor": 4.0},
        YARN | {"factor": 4.0, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    ],
)
def test_tables_equal_those_of_transformers(parameters: dict[str, Any]) -> None:
    config = LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=POSITIONS, rope_parameters=dict(parameters))
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(POSITIONS)[None])
    for table, reference in zip(rope_tables(given(parameters), POSITIONS), expected, strict=True):
        assert table.dtype == np.float32
        assert np.array_equal(table, reference[0, :, : HEAD_DIM // 2].numpy())


@pytest.mark.parametrize("length", [200, POSITIONS])
def test_longrope_has_a_table_for_short_and_one_for_long_sequences(length: int) -> None:
    parameters: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.05 * i for i in range(12)],
        "long_factor": [2.0 + 0.9 * i for i in range(12)],
    }
    sizes = {"hidden_size": 4 * HEAD_DIM, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
    original = {"original_max_position_embeddings": 256}
    config = Phi3Config(**sizes, **original, rope_parameters=dict(parameters), pad_token_id=None)
    expected = Phi3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    rope = given(parameters, "Phi3ForCausalLM", **original)
    assert (rope.dims, rope.original, rope.changes_within(256), rope.changes_within(257)) == (24, 256, False, True)
    for table, reference in zip(rope_tables(rope, length, long=length > 256), expected, strict=True):
        assert np.array_equal(table, reference[0, :, :12].numpy())
