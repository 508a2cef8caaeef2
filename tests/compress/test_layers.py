"""Losses inside the blocks: which layers are paired, what is compared, and maps that do not stay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from slmdeploy.compress.layers import ATTACHED, LayerLoss, attention_of, decoder_layers, detach_maps, paired_layers
from slmdeploy.errors import InputError
from slmdeploy.specs import DistillStage

IDS = torch.arange(2, 12).view(2, 5)
COUNTED = torch.tensor([[True, True, False, True], [False, True, True, True]])
WEIGHTS = torch.linspace(0.1, 1, 6)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def measure(loss: LayerLoss, *models: Any) -> torch.Tensor:
    for model in models:
        model(IDS)
    return loss.measure(COUNTED, WEIGHTS)


def test_layers_are_paired_evenly_or_as_chosen() -> None:
    assert paired_layers(3, 12, None) == (3, 7, 11)
    assert paired_layers(2, 3, None) == (0, 2)
    assert paired_layers(2, 12, (0, 10)) == (0, 10)
    for wrong in ((0,), (1, 0), (0, 12), (2, 2)):
        with pytest.raises(InputError, match=r"layer_map = .* must name 2 layers .* below 12"):
            paired_layers(2, 12, wrong)


def test_hidden_loss_is_the_relative_square_distance_of_the_chosen_layers(checkpoint: Callable[..., Path]) -> None:
    student, teacher = load(checkpoint(seed=3, num_hidden_layers=2)), load(checkpoint(num_hidden_layers=4))
    stage = DistillStage(steps=1, hidden_weight=0.5, layer_map=(0, 2))
    found = measure(LayerLoss(student, teacher, stage), student, teacher)
    # The last of a model's hidden states has gone through its norm, so the second layer is looked at behind a hook.
    caught: list[torch.Tensor] = []
    student.model.layers[1].register_forward_hook(lambda m, i, o: caught.append(o))
    mine, its = (m(IDS, output_hidden_states=True).hidden_states for m in (student, teacher))
    expected = 0.0
    for s, t in ((mine[1], its[1]), (caught[0], its[3])):
        s, t = s[:, :-1][COUNTED], t[:, :-1][COUNTED]
        expected += 0.5 / 2 * (WEIGHTS * (s - t).square().sum(-1)).sum() / t.square().sum(-1).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("part", ["hidden_weight", "attention_weight"])
def test_a_student_equal_to_its_teacher_is_at_no_distance(teacher: Path, part: str) -> None:
    same, other = load(teacher), load(teacher)
    loss = LayerLoss(same, other, DistillStage(steps=1, **{part: 1.0}))
    assert not hasattr(same, ATTACHED)
    assert measure(loss, same, other).item() == 0
    same.model.layers[0].self_attn.o_proj.weight.data.mul_(1.5)
    assert measure(loss, same, other).item() > 1e-4


def test_other_widths_get_maps_that_learn_and_leave(checkpoint: Callable[..., Path], teacher: Path) -> None:
    student, frozen = load(checkpoint(hidden_size=16, seed=1)), load(teacher)
    names = set(student.state_dict())
    loss = LayerLoss(student, frozen, DistillStage(steps=1, hidden_weight=1.0, attention_weight=1.0))
    first = measure(loss, student, frozen)
    first.backward()
    maps = [parameter for name, parameter in student.named_parameters() if name.startswith(ATTACHED)]
    assert [tuple(parameter.shape) for parameter in maps] == [(32, 16)] * 4
    assert all(parameter.grad.abs().sum() > 0 for parameter in maps)
    assert student.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in maps:
            parameter -= 0.01 * parameter.grad
    assert measure(loss, student, frozen) < first
    detach_maps(student)
    assert set(student.state_dict()) == names


def test_blocks_and_their_attention_are_found_in_another_family() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2))
    layers = decoder_layers(model)
    assert layers == list(model.transformer.h)
    assert attention_of(layers[1]) is model.transformer.h[1].attn
