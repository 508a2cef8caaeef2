"""The loss of a batch of positions without whole logits: heads applied to a few positions at a time.

Keeps only the gradients of hidden states and of the head, computed chunk by chunk during the forward pass, so that a
[tokens, vocabulary] tensor of neither model ever exists. The teacher's side is its hidden states and head, or what was
kept of its distributions. Knows the losses (losses.py) as functions of rows; knows nothing of batches, prompts or
trainers: a position counts by its weight.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from slmdeploy.compress.losses import Objective, cross_entropy, divergence, top_divergence
from slmdeploy.compress.scores import margins

# Of one float32 chunk of logits 4 MB: small beside any head, large enough for matrix products to run at speed.
CHUNK_ELEMENTS = 1 << 20


class TeacherSide(Protocol):
    """What is known of the teacher at each of n positions."""

    def compare(self, part: slice, logits: Tensor, objective: Objective, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """T²·KD [m] and its gradient [m, vocabulary] of the student's ``logits`` at the positions of ``part``."""

    def margins(self, chosen: Tensor, label_ids: tuple[int, int]) -> Tensor:
        """The teacher's margins [m] (scores.py) at the positions that ``chosen``, bool [n], marks."""


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's last hidden states [n, hidden] and its head [vocabulary, hidden]."""

    hidden: Tensor
    head: Tensor

    def compare(self, part: slice, logits: Tensor, objective: Objective, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Against the teacher's whole distributions."""
        return divergence(logits, _wide(self.hidden[part].to(dtype) @ self.head.to(dtype).T), objective)

    def margins(self, chosen: Tensor, label_ids: tuple[int, int]) -> Tensor:
        """From the two rows of the head."""
        return margins(self.hidden[chosen], self.head, label_ids)


@dataclass(frozen=True)
class TeacherTop:
    """What `losses.top_bins` kept of the teacher's distributions: ids [n, k] and log-masses [n, k + 1 or k].

    ``kept_margins`` [n] are of one pair of label words, which `margins` takes to be the one that is asked for.
    """

    ids: Tensor
    log_mass: Tensor
    kept_margins: Tensor

    def compare(self, part: slice, logits: Tensor, objective: Objective, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Against the kept tokens, all others as one."""
        return top_divergence(logits, self.ids[part], self.log_mass[part].to(logits.dtype), objective)

    def margins(self, chosen: Tensor, label_ids: tuple[int, int]) -> Tensor:
        """As they were kept."""
        return self.kept_margins[chosen]


@dataclass(frozen=True)
class Positions:
    """The counted positions: the student's hidden states [n, hidden], the next token [n] and its weight [n]."""

    student: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True)
class LossParts:
    """The weighted sums: ``total`` carries the gradient, ``kd`` and ``ce`` are for the log."""

    total: Tensor
    kd: Tensor
    ce: Tensor


def chunked_loss(
    positions: Positions, head: Tensor, teacher: TeacherSide, objective: Objective, dtype: torch.dtype
) -> LossParts:
    """Σ weight·loss over the positions, with gradients into ``positions.student`` and ``head``.

    ``head`` [vocabulary, hidden] is the student's. Logits are multiplied in ``dtype`` and compared in at least float32.
    A vocabulary that differs is the caller's error.
    """
    tensors = (positions.student, head, positions.labels, positions.weights)
    return LossParts(*_ChunkedLoss.apply(*tensors, teacher, objective, dtype))  # type: ignore[no-untyped-call]


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients during the forward pass, chunk by chunk, and only scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        weights: Tensor,
        teacher: TeacherSide,
        objective: Objective,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            head_low = head.to(dtype)
            hidden_gradient = torch.zeros_like(hidden)
            head_gradient = torch.zeros_like(head)
            sums = torch.zeros(2, dtype=weights.dtype, device=weights.device)
            size = max(1, CHUNK_ELEMENTS // head.shape[0])
            for start in range(0, len(labels), size):
                part = slice(start, start + size)
                low, weight = hidden[part].to(dtype), weights[part]
                logits = _wide(low @ head_low.T)
                kd, slope = teacher.compare(part, logits, objective, dtype)
                ce, slope = _with_cross_entropy(slope, logits, labels[part], objective.ce_share)
                slope = (slope * weight[:, None]).to(dtype)
                hidden_gradient[part] = (slope @ head_low).to(hidden.dtype)
                _add_product(head_gradient, slope, low)
                sums += torch.stack([(kd * weight).sum(), (ce * weight).sum()])
        ctx.save_for_backward(hidden_gradient, head_gradient)
        kd_sum, ce_sum = sums[0], sums[1]
        ctx.mark_non_differentiable(kd_sum, ce_sum)
        return (1 - objective.ce_share) * kd_sum + objective.ce_share * ce_sum, kd_sum, ce_sum

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        return hidden_gradient * grad_total, head_gradient * grad_total, None, None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _with_cross_entropy(slope: Tensor, logits: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """CE [n], and the gradient of the mix of KD, whose gradient is ``slope``, and ``share`` of CE [n, vocabulary]."""
    if share == 0.0:
        return torch.logsumexp(logits, -1) - logits.gather(1, labels[:, None])[:, 0], slope
    ce, ce_slope = cross_entropy(logits, labels)
    return ce, (1 - share) * slope + share * ce_slope


def _add_product(gradient: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """gradient += slopeᵀ·hidden, in place where the dtypes allow: a head-sized product per chunk costs its memory."""
    if gradient.dtype == slope.dtype:
        gradient.addmm_(slope.T, hidden)
    else:
        gradient += slope.T @ hidden
