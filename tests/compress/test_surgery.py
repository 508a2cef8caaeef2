"""Cutting groups out: the cut model computes what the masked one does, for every variant of a Llama config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmdeploy.compress.surgery import Kept, config_shape, cut, group_norms
from tests.compress.conftest import max_difference

IDS = torch.arange(2, 42)[None]


def masked(model: Any, kept: list[Kept]) -> Any:
    """Zero the columns that read removed groups; nothing else needs to go for them to have no effect."""
    shape = config_shape(model.config)
    with torch.no_grad():
        for layer, keep in zip(model.model.layers, kept, strict=True):
            heads = torch.zeros(shape.kv_heads).index_fill(0, torch.tensor(keep.kv_heads), 1)
            neurons = torch.zeros(shape.neurons).index_fill(0, torch.tensor(keep.neurons), 1)
            layer.self_attn.o_proj.weight *= heads.repeat_interleave(shape.group_width)
            layer.mlp.down_proj.weight *= neurons
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 8},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
    ids=str,
)
def test_cut_equals_masked(checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(**changes), dtype=torch.float32).eval()
    before = max_difference(model, model, IDS)
    kept = [Kept((0, 3), tuple(range(0, 64, 2))), Kept((1, 2), tuple(range(32)))]  # each layer its own
    dense_logits = model(IDS).logits
    smaller = cut(masked(model, kept), kept)
    smaller.save_pretrained(tmp_path / "cut")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32).eval()
    assert before == 0
    assert max_difference(model, loaded, IDS) < 1e-4
    assert (loaded(IDS).logits - dense_logits).abs().max() > 1e-2  # the mask did something
    config = loaded.config
    assert (config.num_key_value_heads, config.intermediate_size) == (2, 32)
    assert config.head_dim == model.config.head_dim
    assert config.num_attention_heads == 2 * model.config.num_attention_heads // model.config.num_key_value_heads
    assert config.tie_word_embeddings == model.config.tie_word_embeddings


def test_a_cut_at_the_wrong_place_is_seen(teacher: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    kept = [Kept((0, 1), tuple(range(32)))] * 2
    wrong = [Kept((0, 2), tuple(range(32)))] * 2
    assert max_difference(masked(model, kept), cut(model, wrong), IDS) > 1e-2


def test_norms_cover_every_weight_of_a_group(teacher: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    layer = model.model.layers[0]
    heads, neurons = group_norms(model, 0)
    assert heads.shape == (4,)
    assert neurons.shape == (64,)
    for norms, module in ((heads, layer.self_attn), (neurons, layer.mlp)):
        whole = sum(parameter.detach().double().square().sum() for parameter in module.parameters())
        torch.testing.assert_close(norms.square().sum(), whole)
