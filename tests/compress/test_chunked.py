"""The chunked loss against whole logits with autograd, and that it never makes those."""

from typing import get_args

import pytest
import torch
from torch.nn import functional

from slmdeploy.compress import chunked
from slmdeploy.compress.chunked import Positions, TeacherStates, TeacherTop, chunked_loss
from slmdeploy.compress.losses import LossName, Objective, divergence, top_bins
from tests.compress.test_losses import logits, reference

OBJECTIVES = [
    Objective("jsd", beta=0.4, temperature=1.5, ce_share=0.3),
    *(Objective(name) for name in get_args(LossName)),
    Objective(ce_share=1.0),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_loss_equals_whole_logits(monkeypatch: pytest.MonkeyPatch, objective: Objective, chunk: int) -> None:
    vocabulary, rows, ce_share = 11, 7, objective.ce_share
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk * vocabulary)
    hidden, head = logits(0, rows, 4).requires_grad_(), logits(1, vocabulary, 4).requires_grad_()
    teacher = TeacherStates(logits(2, rows, 6), logits(3, vocabulary, 6))
    labels, weights = torch.arange(rows), torch.linspace(0, 1, rows, dtype=torch.float64)
    whole, whole_teacher = hidden @ head.T, teacher.hidden @ teacher.head.T
    kd = (weights * reference(whole, whole_teacher, objective)).sum()
    ce = (weights * functional.cross_entropy(whole, labels, reduction="none")).sum()
    total = (1 - ce_share) * kd + ce_share * ce
    expected = torch.autograd.grad(2 * total, (hidden, head))
    kept = TeacherTop(*top_bins(whole_teacher, vocabulary, objective.temperature), torch.zeros(rows))
    for side in (teacher, kept):
        parts = chunked_loss(Positions(hidden, labels, weights), head, side, objective, torch.float64)
        for found, right in ((parts.total, total), (parts.kd, kd), (parts.ce, ce)):
            torch.testing.assert_close(found.detach(), right.detach(), atol=1e-6, rtol=0)
        for found, right in zip(torch.autograd.grad(2 * parts.total, (hidden, head)), expected, strict=True):
            torch.testing.assert_close(found, right, atol=1e-6, rtol=0)


def test_bf16_products_give_gradients_near_the_exact_ones() -> None:
    hidden, head = (logits(i, n, 16).float().requires_grad_() for i, n in ((0, 7), (1, 11)))
    teacher = TeacherStates(logits(2, 7, 6).float(), logits(3, 11, 6).float())
    at = Positions(hidden, torch.arange(7), torch.ones(7))
    low, high = (
        torch.autograd.grad(chunked_loss(at, head, teacher, Objective(), dtype).total, (hidden, head))
        for dtype in (torch.bfloat16, torch.float32)
    )
    for found, right in zip(low, high, strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - right).norm() / right.norm() < 0.1


def test_logits_of_all_positions_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, rows, seen = 50, 12, []
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 2 * vocabulary)
    monkeypatch.setattr(chunked, "divergence", lambda *a: seen.append((a[0].shape, a[1].shape)) or divergence(*a))
    at = Positions(logits(0, rows, 4), torch.zeros(rows, dtype=torch.int64), torch.ones(rows))
    teacher = TeacherStates(logits(1, rows, 4), logits(3, vocabulary, 4))
    chunked_loss(at, logits(2, vocabulary, 4), teacher, Objective(), torch.float64)
    assert seen == [((2, vocabulary), (2, vocabulary))] * 6


def test_margins_come_from_the_head_or_from_what_was_kept() -> None:
    teacher, chosen = TeacherStates(logits(0, 3, 4), logits(1, 5, 4)), torch.tensor([True, False, True])
    whole = teacher.hidden @ teacher.head.T
    expected = (whole[:, 4] - whole[:, 2])[chosen].float()
    torch.testing.assert_close(teacher.margins(chosen, (2, 4)), expected)
    kept = TeacherTop(torch.zeros(3, 1), torch.zeros(3, 2), whole[:, 4] - whole[:, 2])
    torch.testing.assert_close(kept.margins(chosen, (2, 4)).float(), expected)
