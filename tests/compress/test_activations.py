"""Minitron's importance against the same figures computed from hidden states that transformers hands out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmdeploy.compress.activations import measure
from slmdeploy.compress.frame import Frame, Rows
from slmdeploy.compress.prune import prune


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rows(valid: int) -> Rows:
    ids = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(2))
    real = torch.zeros(3, 20, dtype=torch.bool)
    real[:, :valid] = True
    return Rows(ids, torch.arange(20).expand(3, 20), real)


def l2_of_means(tokens: torch.Tensor) -> torch.Tensor:
    """[rows, tokens, width] to [width]."""
    return tokens.double().mean(1).square().sum(0).sqrt()


@torch.no_grad()
def test_scores_are_means_over_tokens_and_norms_over_rows(teacher: Path) -> None:
    model, calibration = load(teacher), rows(20)
    streams = model(calibration.input_ids, output_hidden_states=True).hidden_states
    found = measure(Frame(model), calibration, 16)
    layer = model.model.layers[0]
    normed = layer.input_layernorm(streams[0])
    positions = model.model.rotary_emb(normed, calibration.position_ids)
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    caught: list[torch.Tensor] = []
    hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    attended, _ = layer.self_attn(normed, position_embeddings=positions, attention_mask=mask)
    hook.remove()
    middle = layer.post_attention_layernorm(streams[0] + attended)
    neurons = layer.mlp.act_fn(layer.mlp.gate_proj(middle)) * layer.mlp.up_proj(middle)
    torch.testing.assert_close(found.neurons[0], l2_of_means(neurons.abs()), atol=1e-5, rtol=1e-4)
    heads = l2_of_means(caught[0].reshape(3, 20, 4, 16).norm(dim=-1))
    torch.testing.assert_close(found.kv_heads[0], heads, atol=1e-5, rtol=1e-4)
    assert found.hidden.shape == (32,)
    assert (found.hidden > l2_of_means(normed.abs()) + l2_of_means(middle.abs())).all()  # and those of layer 1


def test_padding_does_not_count(teacher: Path) -> None:
    model, padded = load(teacher), rows(12)
    short = Rows(padded.input_ids[:, :12], padded.position_ids[:, :12], padded.valid[:, :12])
    found, expected = (measure(Frame(model), one, 16) for one in (padded, short))
    torch.testing.assert_close(found.hidden, expected.hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.neurons[1], expected.neurons[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(measure(Frame(model), rows(20), 16).hidden, expected.hidden)


@pytest.mark.parametrize("method", ["minitron", "osscar"])
def test_a_silent_channel_and_a_silent_neuron_go(
    tmp_path: Path, checkpoint: Callable[..., Path], data: Path, method: Any
) -> None:
    folder = checkpoint(hidden_size=64)
    model = load(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[5::2] = 1e-4
            layer.post_attention_layernorm.weight[5::2] = 1e-4
            layer.mlp.up_proj.weight[10:42] *= 1e-4
    model.save_pretrained(folder)
    made = prune(
        folder, out=tmp_path / "out", data=data, method=method, ratio=0.5, hidden_ratio=0.25, calibration_tokens=1024
    )
    gone = set(range(64)) - set(made.result["kept_channels"])
    assert len(gone) == 16
    assert gone <= set(range(5, 64, 2))
    assert not any(set(layer["neurons"]) & set(range(10, 42)) for layer in made.result["layers"])
