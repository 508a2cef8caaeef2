"""Distillation losses between a teacher's and a student's next-token distributions, without whole logits.

`divergence` compares rows of logits and also gives the gradient in closed form; `chunked_loss` applies both heads to a
few positions at a time and keeps only gradients of hidden states and of the head, so that a [tokens, vocabulary] tensor
of neither model ever exists. Knows nothing of batches, prompts or trainers: a position counts by its weight.
Definitions: GKD (Agarwal et al. 2024), with p the teacher, q the student and the mixture M = βp + (1-β)q a mean of
probabilities, not of logarithms.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Objective:
    """What is minimised: ``ce_share``·CE + (1 - ``ce_share``)·T²·KD(p_T, q_T)."""

    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    ce_share: float = 0.0

    @property
    def mixture(self) -> float:
        """The teacher's weight in M; the two KLs are the ends that the generalised JSD is defined to have."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.beta}[self.loss]


def divergence(student: Tensor, teacher: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """T²·KD of each row and its gradient with respect to the student's logits.

    ``student`` and ``teacher`` are logits [n, vocabulary]; returns ([n] in nats, [n, vocabulary]).
    """
    temperature, beta = objective.temperature, objective.mixture
    log_q = functional.log_softmax(student / temperature, dim=-1)
    log_p = functional.log_softmax(teacher / temperature, dim=-1)
    q, p = log_q.exp(), log_p.exp()
    if beta == 0.0:
        value = (p * (log_p - log_q)).sum(-1)
        return temperature**2 * value, temperature * (q - p)
    if beta == 1.0:
        slope = log_q - log_p
        value = (q * slope).sum(-1)
        return temperature**2 * value, temperature * q * (slope - value[:, None])
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    from_student = (q * (log_q - log_m)).sum(-1)
    value = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * from_student
    # What reaches q through M sums to -(1-β)·M/M, a constant, and the softmax drops constants.
    slope = (1 - beta) * (log_q - log_m - from_student[:, None])
    return temperature**2 * value, temperature * q * slope


def cross_entropy(student: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row in nats and its gradient; logits [n, vocabulary], labels [n] of token ids."""
    log_q = functional.log_softmax(student, dim=-1)
    gradient = log_q.exp()
    rows = torch.arange(len(labels), device=labels.device)
    gradient[rows, labels] -= 1
    return -log_q[rows, labels], gradient


@dataclass(frozen=True)
class Positions:
    """The counted positions: hidden states of both models [n, hidden], the next token [n] and its weight [n]."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True)
class LossParts:
    """The weighted sums: ``total`` carries the gradient, ``kd`` and ``ce`` are for the log."""

    total: Tensor
    kd: Tensor
    ce: Tensor


def chunked_loss(
    positions: Positions, student_head: Tensor, teacher_head: Tensor, objective: Objective, dtype: torch.dtype
) -> LossParts:
    """Σ weight·loss over the positions, with gradients into ``positions.student`` and ``student_head``.

    Heads are [vocabulary, hidden] of their own model. Logits are multiplied in ``dtype`` and compared in at least
    float32. A vocabulary that differs is the caller's error.
    """
    return LossParts(
        *_ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            positions.student,
            student_head,
            positions.teacher,
            teacher_head,
            positions.labels,
            positions.weights,
            objective,
            dtype,
        )
    )


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients during the forward pass, chunk by chunk, and only scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor,
        weights: Tensor,
        objective: Objective,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            head_low, teacher_low = head.to(dtype), teacher_head.to(dtype)
            hidden_gradient = torch.zeros_like(hidden)
            head_gradient = torch.zeros_like(head)
            sums = torch.zeros(2, dtype=weights.dtype, device=weights.device)
            size = max(1, CHUNK_ELEMENTS // head.shape[0])
            for start in range(0, len(labels), size):
                part = slice(start, start + size)
                low, weight = hidden[part].to(dtype), weights[part]
                logits, expected = low @ head_low.T, teacher_hidden[part].to(dtype) @ teacher_low.T
                kd, ce, slope = _compare(_wide(logits), _wide(expected), labels[part], objective)
                slope = (slope * weight[:, None]).to(dtype)
                hidden_gradient[part] = (slope @ head_low).to(hidden.dtype)
                head_gradient += slope.T @ low
                sums += torch.stack([(kd * weight).sum(), (ce * weight).sum()])
        ctx.save_for_backward(hidden_gradient, head_gradient)
        kd_sum, ce_sum = sums[0], sums[1]
        ctx.mark_non_differentiable(kd_sum, ce_sum)
        return (1 - objective.ce_share) * kd_sum + objective.ce_share * ce_sum, kd_sum, ce_sum

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        return hidden_gradient * grad_total, head_gradient * grad_total, None, None, None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _compare(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """KD [n], CE [n] and the gradient of their mix [n, vocabulary]."""
    kd, slope = divergence(logits, teacher_logits, objective)
    if objective.ce_share == 0.0:
        with_labels = torch.logsumexp(logits, -1) - logits.gather(1, labels[:, None])[:, 0]
        return kd, with_labels, slope
    ce, ce_slope = cross_entropy(logits, labels)
    return kd, ce, (1 - objective.ce_share) * slope + objective.ce_share * ce_slope
