"""The Trainer as a distiller: optimisers whose learning rate arrives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from slmdeploy.compress.training import ADAMW_SHARE, MuonAdamW


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(student: Path) -> None:
    model = load(student)
    optimizer = MuonAdamW(model, 0.02)
    muon, adamw = ({id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    for name, parameter in model.named_parameters():
        expected = muon if parameter.ndim == 2 and "layers." in name else adamw
        assert id(parameter) in expected, name
    assert len(muon) + len(adamw) == len(list(model.parameters()))


def test_the_schedule_reaches_both_optimisers_after_accelerate_wrapped_them(student: Path) -> None:
    # accelerate reloads the optimiser's state on wrapping, which gives each part new groups.
    model = load(student)
    optimizer = MuonAdamW(model, 0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    wrapped.load_state_dict(wrapped.state_dict())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(torch.arange(2, 12)[None]).logits.sum().backward()
    wrapped.step()
    schedule.step()
    rates = [group["lr"] for part in optimizer.parts for group in part.param_groups]
    assert rates == pytest.approx([0.01, 0.01 * ADAMW_SHARE])
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
