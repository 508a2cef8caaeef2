"""The Trainer as a distiller: optimisers whose learning rate arrives, sampling, packing of responses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from slmdeploy.compress.training import ADAMW_SHARE, MuonAdamW, _pack, _until, sample
from slmdeploy.specs import DistillStage


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


def test_samples_end_at_the_end_of_text_and_repeat_for_a_seed(student: Path) -> None:
    model = load(student).eval()
    stage = DistillStage(steps=1, on_policy=1.0, response_tokens=6, length=32)
    prompts = [[0, 5, 9], [0, 7], [0, 40, 41, 42, 43]]

    def draw() -> list[list[int]]:
        torch.manual_seed(0)
        return sample(model, prompts, stage)

    answers = draw()
    assert draw() == answers
    assert [0 < len(answer) <= 6 for answer in answers] == [True] * 3
    assert all(1 not in answer[:-1] for answer in answers)
    assert _until([5, 1, 1, 1], {1}) == [5, 1]
    assert _until([5, 6], {1}) == [5, 6]


def test_sampling_does_not_depend_on_what_a_prompt_is_batched_with(student: Path) -> None:
    # Almost greedy, so that the draw is the argmax; left padding must then change nothing.
    model = load(student).eval()
    stage = DistillStage(steps=1, on_policy=1.0, response_tokens=4, length=32, sample_temperature=1e-4)
    short, long = [0, 7], [0, 40, 41, 42, 43]
    assert sample(model, [short, long], stage) == sample(model, [short], stage) + sample(model, [long], stage)


def test_responses_count_and_prompts_do_not() -> None:
    row = _pack([([0, 7], [8, 9]), ([0], [4])], 10)
    assert row["input_ids"].tolist() == [0, 7, 8, 9, 0, 4, 0, 0, 0, 0]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3]
    assert (row["weights"] > 0).tolist() == [False, False, True, True, False, True] + [False] * 4
    assert row["weights"].sum().item() == pytest.approx(1)
