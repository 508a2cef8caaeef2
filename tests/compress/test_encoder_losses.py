"""Losses of whole texts against their definitions."""

import math

import pytest
import torch

from slmdeploy.compress.encoder_losses import distance, label_loss, relations

STUDENT, TEACHER = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.5, 0.5, 0.0]])


def test_kl_is_that_of_the_classes_times_the_square_of_the_temperature() -> None:
    p, q = (torch.softmax(one[0] / 2, -1) for one in (TEACHER, STUDENT))
    assert distance("kl", STUDENT, TEACHER, 2.0).item() == pytest.approx(4 * (p * (p / q).log()).sum().item(), rel=1e-5)
    assert distance("kl", TEACHER, TEACHER).item() == pytest.approx(0.0, abs=1e-7)


def test_kl_of_one_score_is_that_of_its_two_outcomes() -> None:
    p, q = (1 / (1 + math.exp(-one)) for one in (0.3, -1.2))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert distance("kl", torch.tensor([[-1.2]]), torch.tensor([[0.3]])).item() == pytest.approx(expected, rel=1e-5)


def test_vectors_are_compared_by_angle_by_square_and_by_relations() -> None:
    assert distance("cosine", torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])).item() == pytest.approx(
        1 - 0.5**0.5
    )
    assert distance("mse", STUDENT, TEACHER).item() == pytest.approx((0.25 + 0.25 + 1) / 3)
    turned = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]])  # other width, lengths and axes, the same angles
    assert distance("relation", turned, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).item() == 0
    assert relations(turned).tolist() == [[1, 0], [0, 1]]


def test_labels_are_classes_or_scores() -> None:
    assert label_loss(torch.zeros(2, 4), torch.tensor([1, 3])).item() == pytest.approx(math.log(4))
    assert label_loss(torch.zeros(1, 1), torch.tensor([0.7])).item() == pytest.approx(math.log(2))
