"""The walk: second moments are those of a plain forward pass, layer by layer, and see what was pruned before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmdeploy.compress.calibration import Walk
from slmdeploy.compress.frame import Frame, Rows
from tests.exporting.families import CASES, write_case

FAMILIES = ["llama-gqa", "gpt2", "gemma3", "gpt-neox", "stablelm-parallel", "qwen2-window-yarn", "smollm3-window"]


def calibration() -> Rows:
    ids = torch.randint(2, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 30:] = False
    positions = torch.cat([torch.arange(25), torch.arange(15)])  # two texts in a row
    return Rows(ids, positions.expand(2, 40), valid)


@torch.no_grad()
def moments(model: Any, module: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """XᵀX by whole forward passes of the whole model."""
    caught: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0][0]))
    for ids, positions in zip(rows.input_ids, rows.position_ids, strict=True):
        model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
    hook.remove()
    flat = torch.cat([inputs[valid] for inputs, valid in zip(caught, rows.valid, strict=True)]).double()
    return flat.T @ flat


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_are_those_of_whole_passes_behind_what_was_changed(tmp_path: Path, name: str) -> None:
    write_case(CASES[name], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    frame, rows = Frame(model), calibration()
    walk, layers = Walk(frame, rows), frame.layers
    for index in range(len(layers)):
        for module in (frame.family.attention_out, frame.family.mlp_out):
            found = walk.moments(module)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, moments(model, frame.part(index, module), rows), atol=1e-3, rtol=1e-4)
            frame.set_weight(index, module, frame.weight(index, module).float() * 0.5)
        walk.advance()
    assert frame.layers is layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
