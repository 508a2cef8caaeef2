"""Losses against definitions written out with torch and autograd, in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from slmdeploy.compress import losses
from slmdeploy.compress.losses import Objective, Positions, chunked_loss, cross_entropy, divergence

OBJECTIVES = [
    Objective("forward_kl"),
    Objective("reverse_kl"),
    Objective("forward_kl", temperature=2.0),
    Objective("reverse_kl", temperature=0.7),
    Objective("jsd", beta=0.1),
    Objective("jsd", beta=0.5, temperature=3.0),
    Objective("jsd", beta=0.9),
]


def logits(seed: int, rows: int = 5, vocabulary: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def reference(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """Sums of probabilities as the definitions are written, without logarithms of mixtures or closed forms."""
    q = functional.softmax(student / objective.temperature, -1)
    p = functional.softmax(teacher / objective.temperature, -1)

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first * torch.log(first / second)).sum(-1)

    beta = objective.beta
    m = beta * p + (1 - beta) * q
    value = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}
    return objective.temperature**2 * value[objective.loss]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_divergence_and_its_gradient_equal_the_definition(objective: Objective) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    expected = reference(student, teacher, objective)
    (slope,) = torch.autograd.grad(expected.sum(), student)
    value, gradient = divergence(student.detach(), teacher, objective)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, slope)


def test_the_ends_of_the_generalised_jsd_are_the_two_kls() -> None:
    student, teacher = logits(0), logits(1)
    for beta, end in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        torch.testing.assert_close(
            divergence(student, teacher, Objective("jsd", beta=beta)), divergence(student, teacher, Objective(end))
        )
    forward, reverse = (divergence(student, teacher, Objective(end))[0] for end in ("forward_kl", "reverse_kl"))
    assert not torch.allclose(forward, reverse)


def test_the_mixture_is_a_mean_of_probabilities_not_of_logarithms() -> None:
    # p = (1/2, 1/2), q = (9/10, 1/10), β = 1/2: M = (7/10, 3/10); a mean of logarithms would not even sum to one.
    p, q, m = (torch.tensor(x, dtype=torch.float64) for x in ((0.5, 0.5), (0.9, 0.1), (0.7, 0.3)))
    expected = 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum()
    value, _ = divergence(q.log()[None], p.log()[None], Objective("jsd", beta=0.5))
    torch.testing.assert_close(value[0], expected)


def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient() -> None:
    same = logits(0)
    for objective in OBJECTIVES:
        value, gradient = divergence(same, same.clone(), objective)
        assert value.abs().max() < 1e-12
        assert gradient.abs().max() < 1e-12


def test_cross_entropy_equals_torch() -> None:
    student, labels = logits(0).requires_grad_(), torch.tensor([0, 3, 10, 3, 7])
    expected = functional.cross_entropy(student, labels, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), student)
    value, gradient = cross_entropy(student.detach(), labels)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("ce_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_loss_equals_whole_logits(monkeypatch: pytest.MonkeyPatch, ce_share: float, chunk: int) -> None:
    vocabulary, rows = 11, 7
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk * vocabulary)
    objective = Objective("jsd", beta=0.4, temperature=1.5, ce_share=ce_share)
    hidden, head = logits(0, rows, 4).requires_grad_(), logits(1, vocabulary, 4).requires_grad_()
    teacher_hidden, teacher_head = logits(2, rows, 6), logits(3, vocabulary, 6)
    labels, weights = torch.arange(rows), torch.linspace(0, 1, rows, dtype=torch.float64)
    whole, expected_teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    kd = (weights * reference(whole, expected_teacher, objective)).sum()
    ce = (weights * functional.cross_entropy(whole, labels, reduction="none")).sum()
    total = (1 - ce_share) * kd + ce_share * ce
    expected = torch.autograd.grad(2 * total, (hidden, head))
    positions = Positions(hidden, teacher_hidden, labels, weights)
    parts = chunked_loss(positions, head, teacher_head, objective, torch.float64)
    for found, right in ((parts.total, total), (parts.kd, kd), (parts.ce, ce)):
        torch.testing.assert_close(found.detach(), right.detach())
    for found, right in zip(torch.autograd.grad(2 * parts.total, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(found, right)


def test_logits_of_all_positions_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, rows, seen = 50, 12, []
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 2 * vocabulary)
    compare = losses._compare
    monkeypatch.setattr(losses, "_compare", lambda *a: seen.append(tuple(a[0].shape)) or compare(*a))
    positions = Positions(
        logits(0, rows, 4), logits(1, rows, 4), torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    )
    chunked_loss(positions, logits(2, vocabulary, 4), logits(3, vocabulary, 4), Objective(), torch.float64)
    assert seen == [(2, vocabulary)] * 6
