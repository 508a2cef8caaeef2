"""Losses of scores against their definitions, written out item by item."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from slmdeploy.compress.losses import Objective
from slmdeploy.compress.scores import listwise_loss, margin_loss, margins

STUDENT = torch.tensor([0.3, -1.2, 2.0, 0.1, -40.0], dtype=torch.float64)
TEACHER = torch.tensor([1.3, -0.2, -2.0, 0.6, 30.0], dtype=torch.float64)
LABELS = torch.tensor([True, False, False, False, True])
LISTS = torch.tensor([7, 3, 7, 3, 9])
OBJECTIVES = [Objective(), Objective(temperature=2.0, ce_share=0.25), Objective(ce_share=1.0)]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def test_margins_are_differences_of_two_logits() -> None:
    hidden, head = torch.randn(3, 4), torch.randn(9, 4)
    whole = hidden @ head.T
    torch.testing.assert_close(margins(hidden, head, (2, 5)), whole[:, 5] - whole[:, 2])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_margin_loss_is_the_kl_of_each_items_two_labels(objective: Objective) -> None:
    temperature, share = objective.temperature, objective.ce_share
    found = margin_loss(STUDENT, TEACHER, LABELS, objective)
    for i in range(4):  # the last item's probabilities leave the range in which the definition can be written out
        p, q = (torch.stack([m[i], -m[i]]).div(temperature).sigmoid() for m in (TEACHER, STUDENT))
        hard = -functional.logsigmoid(STUDENT[i] if LABELS[i] else -STUDENT[i])
        torch.testing.assert_close(found[i], (1 - share) * temperature**2 * kl(p, q) + share * hard)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_listwise_loss_is_the_kl_of_the_softmaxes_over_each_list(objective: Objective) -> None:
    temperature, share = objective.temperature, objective.ce_share
    found, where = listwise_loss(STUDENT, TEACHER, LABELS, LISTS, objective)
    assert where.tolist() == [1, 0, 1, 0, 2]
    for place, items, relevant in ((0, [1, 3], None), (1, [0, 2], 0)):
        p, q = ((m[items] / temperature).softmax(0) for m in (TEACHER, STUDENT))
        hard = 0.0 if relevant is None else -STUDENT[items].log_softmax(0)[relevant]
        torch.testing.assert_close(found[place], (1 - share) * temperature**2 * kl(p, q) + share * hard)
    assert found[2] == 0  # a list of one says nothing


def test_the_same_margins_are_at_no_distance_and_the_gradient_leads_there() -> None:
    student = STUDENT[:4].clone().requires_grad_()
    for loss in (
        lambda s: margin_loss(s, TEACHER[:4], LABELS[:4], Objective()).sum(),
        lambda s: listwise_loss(s, TEACHER[:4], LABELS[:4], LISTS[:4], Objective())[0].sum(),
    ):
        assert abs(loss(TEACHER[:4]).item()) < 1e-12
        before = loss(student)
        (slope,) = torch.autograd.grad(before, student)
        assert loss(student.detach() - 0.1 * slope) < before
        assert math.isfinite(slope.abs().sum())


def test_listwise_ignores_what_all_items_of_a_list_share_and_margin_does_not() -> None:
    shifted = TEACHER[:4] + 1.0
    lists, _ = listwise_loss(shifted, TEACHER[:4], LABELS[:4], LISTS[:4], Objective())
    assert lists.abs().max() < 1e-12
    assert margin_loss(shifted, TEACHER[:4], LABELS[:4], Objective()).min() > 1e-3
