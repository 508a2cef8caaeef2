"""Losses against definitions written out with torch and autograd, in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from slmdeploy.compress.losses import Objective, cross_entropy, divergence, top_bins, top_divergence

OBJECTIVES = [
    Objective("forward_kl"),
    Objective("reverse_kl"),
    Objective("forward_kl", temperature=2.0),
    Objective("reverse_kl", temperature=0.7),
    Objective("jsd", beta=0.1),
    Objective("jsd", beta=0.5, temperature=3.0),
    Objective("jsd", beta=0.9),
    Objective("tvd"),
    Objective("tvd", temperature=2.0),
    Objective("skew_kl"),
    Objective("skew_kl", skew=0.6, temperature=2.0),
    Objective("reverse_skew_kl"),
    Objective("reverse_skew_kl", skew=0.6, temperature=2.0),
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

    beta, skew = objective.beta, objective.skew
    m = beta * p + (1 - beta) * q
    value = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tvd": 0.5 * (p - q).abs().sum(-1),
        "skew_kl": kl(p, skew * p + (1 - skew) * q),
        "reverse_skew_kl": kl(q, (1 - skew) * p + skew * q),
    }
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


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_all_tokens_kept_are_the_whole_divergence(objective: Objective) -> None:
    student, teacher = logits(0), logits(1)
    kept = top_bins(teacher, teacher.shape[1], objective.temperature)
    assert kept[1].shape == teacher.shape
    for found, right in zip(
        top_divergence(student, *kept, objective), divergence(student, teacher, objective), strict=True
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_fewer_tokens_kept_bound_the_divergence_from_below_ever_closer(objective: Objective) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    whole, whole_slope = divergence(student.detach(), teacher, objective)
    values = []
    for count in (1, 4, 8, 10):
        ids, log_mass = top_bins(teacher, count, objective.temperature)
        torch.testing.assert_close(log_mass.exp().sum(-1), torch.ones(len(teacher), dtype=torch.float64))
        value, slope = top_divergence(student.detach(), ids, log_mass, objective)
        (expected,) = torch.autograd.grad(_merged(student, ids, log_mass, objective).sum(), student)
        torch.testing.assert_close(slope, expected)
        if objective.loss == "forward_kl":
            torch.testing.assert_close(slope.gather(1, ids), whole_slope.gather(1, ids))
        values.append(value)
    for fewer, more in pairwise([*values, whole]):
        assert (fewer <= more + 1e-12).all()
    assert (values[0] < whole).all()


def _merged(student: Tensor, ids: Tensor, log_mass: Tensor, objective: Objective) -> Tensor:
    """The definition over bins, by autograd."""
    q = functional.softmax(student / objective.temperature, -1)
    top = q.gather(1, ids)
    bins = torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)
    return reference(bins.log() * objective.temperature, log_mass * objective.temperature, objective)
