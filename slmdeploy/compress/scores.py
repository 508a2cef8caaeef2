"""Losses of scores: what a student says of an item against what its teacher says, at the label words alone.

The margin of an item is the logit of label word 1 less that of 0, which is what scoring ranks by. `margin_loss` makes
each item's soft label the teacher's; `listwise_loss` makes the softmax over the candidates of one query the teacher's,
which is ListNet (Cao et al. 2007) with soft targets. Both go through plain autograd: they touch two rows of the head.
Knows nothing of rows, packing or models.
"""

import torch
from torch import Tensor
from torch.nn import functional

from slmdeploy.compress.losses import Objective


def margins(hidden: Tensor, head: Tensor, label_ids: tuple[int, int]) -> Tensor:
    """Margins [n] in float32 of hidden states [n, hidden] under a head [vocabulary, hidden]."""
    no, yes = label_ids
    # Not a matrix product, which autocast would round to bf16.
    return (hidden.float() * (head[yes].float() - head[no].float())).sum(-1)


def margin_loss(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """Of each item, in nats: (1-r)·T²·KL of the two models' sigmoids, + r·CE with its label; r is ce_share.

    Margins [n], labels [n] of 0 and 1; returns [n].
    """
    temperature = objective.temperature
    soft = torch.sigmoid(teacher / temperature)
    # What KL is more than cross-entropy: the teacher's own entropy, without which a perfect student would not be at 0.
    entropy = functional.binary_cross_entropy_with_logits(teacher / temperature, soft, reduction="none")
    cross = functional.binary_cross_entropy_with_logits(student / temperature, soft, reduction="none")
    hard = functional.binary_cross_entropy_with_logits(student, labels.to(student.dtype), reduction="none")
    return (1 - objective.ce_share) * temperature**2 * (cross - entropy) + objective.ce_share * hard


def listwise_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, lists: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Of each list, in nats: (1-r)·T²·KL of the softmaxes over its items, + r·CE with its relevant items.

    Margins [n], labels [n] and the number of the list that each item is in [n]; returns the losses [lists] and the list
    of each item [n] as an index into them. A list without a relevant item has no CE, one of a single item no KL.
    """
    names, where = torch.unique(lists, return_inverse=True)
    count, temperature = len(names), objective.temperature
    log_q = _log_softmax(student / temperature, where, count)
    log_p = _log_softmax(teacher / temperature, where, count)
    soft = _sums(log_p.exp() * (log_p - log_q), where, count)
    relevant = labels.to(student.dtype)
    share = relevant / _sums(relevant, where, count).clamp(min=1)[where]
    hard = _sums(-share * _log_softmax(student, where, count), where, count)
    return (1 - objective.ce_share) * temperature**2 * soft + objective.ce_share * hard, where


def _log_softmax(values: Tensor, where: Tensor, count: int) -> Tensor:
    """Log-softmax [n] of the values of each list among themselves."""
    least = torch.full((count,), -torch.inf, dtype=values.dtype, device=values.device)
    peaks = least.scatter_reduce(0, where, values.detach(), "amax")
    shifted = values - peaks[where]
    return shifted - _sums(shifted.exp(), where, count).log()[where]


def _sums(values: Tensor, where: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, where, values)
