"""rope.py against transformers' own tables, bit for bit: at late positions a last-place difference would show."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slmdeploy.exporting.rope import rope_tables
from slmdeploy.exporting.spec import Rope

POSITIONS, HEAD_DIM = 3000, 32


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    ],
)
def test_tables_equal_those_of_transformers(parameters: dict[str, Any]) -> None:
    config = LlamaConfig(head_dim=HEAD_DIM, max_position_embeddings=POSITIONS, rope_parameters=dict(parameters))
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(POSITIONS)[None])
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_type", "rope_theta")}
    rope = Rope(parameters["rope_theta"], parameters["rope_type"], tuple(sorted(scaling.items())))
    for table, reference in zip(rope_tables(rope, HEAD_DIM, POSITIONS), expected, strict=True):
        assert table.dtype == np.float32
        assert np.array_equal(table, reference[0, :, : HEAD_DIM // 2].numpy())
