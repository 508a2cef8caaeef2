"""Divergences between a teacher's and a student's next-token distributions, and their gradients in closed form.

`divergence` compares rows of logits; `top_divergence` does where of the teacher only its k likeliest tokens and the
mass of all others are known; `cross_entropy` compares with the tokens that came. Each gives value and gradient, so
that chunked.py needs no graph of a [tokens, vocabulary] tensor. Knows nothing of heads, batches or trainers.
Definitions, with p the teacher and q the student: GKD (Agarwal et al. 2024, arXiv 2306.13649), its mixture
M = βp + (1-β)q a mean of probabilities, not of logarithms; DistiLLM (Ko et al. 2024, arXiv 2402.03898) for the skew
divergences; total variation ½Σ|p-q| as in f-distill (Wen et al. 2023, arXiv 2307.15190).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "reverse_skew_kl"]


@dataclass(frozen=True)
class Objective:
    """What is minimised: ``ce_share``·CE + (1 - ``ce_share``)·T²·KD(p_T, q_T).

    ``beta`` is the teacher's weight in jsd's mixture; ``skew`` the share s of its own that the second distribution
    gets: skew_kl is KL(p‖s·p+(1-s)·q), reverse_skew_kl is KL(q‖(1-s)·p+s·q).
    """

    loss: LossName = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    temperature: float = 1.0
    ce_share: float = 0.0


def divergence(student: Tensor, teacher: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """T²·KD of each row and its gradient with respect to the student's logits.

    ``student`` and ``teacher`` are logits [n, vocabulary]; returns ([n] in nats, [n, vocabulary]).
    """
    temperature = objective.temperature
    log_q = functional.log_softmax(student / temperature, dim=-1)
    log_p = functional.log_softmax(teacher / temperature, dim=-1)
    value, slope = _compare(log_q, log_p, objective)
    return temperature**2 * value, temperature * slope


def _compare(log_q: Tensor, log_p: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The divergence of each row and its gradient with respect to the logits that ``log_q`` is the log-softmax of."""
    q, p = log_q.exp(), log_p.exp()
    match objective.loss:
        case "forward_kl":
            return _sum(p, log_p - log_q), q - p
        case "reverse_kl":
            return _sum(q, log_q - log_p), _through_softmax(q, log_q - log_p)
        case "jsd":
            return _jensen_shannon(log_q, log_p, objective.beta)
        case "tvd":
            return (p - q).abs().sum(-1) / 2, _through_softmax(q, torch.sign(q - p) / 2)
        case "skew_kl":
            log_m = _mix(log_p, log_q, objective.skew)
            return _sum(p, log_p - log_m), _through_softmax(q, -(1 - objective.skew) * (log_p - log_m).exp())
        case "reverse_skew_kl":
            log_m = _mix(log_q, log_p, objective.skew)
            ratio = log_q - log_m
            return _sum(q, ratio), _through_softmax(q, ratio - objective.skew * ratio.exp())


def _jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """β·KL(p‖M) + (1-β)·KL(q‖M); at its ends, where that is 0, the KLs that GKD defines it to be."""
    if beta in (0.0, 1.0):
        return _compare(log_q, log_p, Objective("forward_kl" if beta == 0.0 else "reverse_kl"))
    log_m, q = _mix(log_p, log_q, beta), log_q.exp()
    value = beta * _sum(log_p.exp(), log_p - log_m) + (1 - beta) * _sum(q, log_q - log_m)
    # What reaches q through M sums to -(1-β)·M/M, a constant, and the softmax drops constants.
    return value, _through_softmax(q, (1 - beta) * (log_q - log_m))


def _mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share·exp(first) + (1-share)·exp(second))."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _sum(weights: Tensor, values: Tensor) -> Tensor:
    return (weights * values).sum(-1)


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """The gradient with respect to logits, from the one with respect to their softmax ``q``."""
    return q * (slope - _sum(q, slope)[:, None])


def top_bins(teacher: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The ``count`` likeliest tokens of each row of logits [n, vocabulary], and log-masses at ``temperature``.

    Returns ids [n, count] and [n, count + 1]: the log-probability of each, then the log of what all others hold
    together. With ``count`` the whole vocabulary there are no others and no last column.
    """
    log_p = functional.log_softmax(teacher / temperature, dim=-1)
    top, ids = log_p.topk(count, dim=-1)
    if count == teacher.shape[-1]:
        return ids, top
    rest = log_p.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return ids, torch.cat([top, rest], -1)


def top_divergence(student: Tensor, ids: Tensor, log_mass: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """`divergence` over ``count`` + 1 bins: the tokens of ``ids`` and all others as one; shapes as of `top_bins`.

    Never more than the whole divergence, whichever it is, since all are f-divergences and merging outcomes lowers those
    (data processing inequality), and equal to it when teacher and student share out the rest alike. The gradient of the
    forward KL at the tokens of ``ids`` is that of the whole.
    """
    temperature = objective.temperature
    bins, shares = student.gather(-1, ids), None
    if log_mass.shape[-1] > ids.shape[-1]:
        others = student.scatter(-1, ids, -math.inf) / temperature
        rest = others.logsumexp(-1, keepdim=True)
        bins, shares = torch.cat([bins, rest * temperature], -1), (others - rest).exp()
    # Log-masses are logits too; times T, because `divergence` divides by it.
    value, slope = divergence(bins, log_mass * temperature, objective)
    whole = torch.zeros_like(student) if shares is None else shares * slope[:, -1:]
    return value, whole.scatter(-1, ids, slope[:, : ids.shape[-1]])


def cross_entropy(student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row in nats and its gradient; logits [n, vocabulary], labels [n] of token ids."""
    log_q = functional.log_softmax(student, dim=-1)
    gradient = log_q.exp()
    rows = torch.arange(len(labels), device=labels.device)
    gradient[rows, labels] -= 1
    return -log_q[rows, labels], gradient
