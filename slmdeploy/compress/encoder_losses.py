"""Losses between a teacher's and a student's outputs for whole texts: logits of classes, one score, or vectors.

    kl        T²·KL(p‖q) of the classes at temperature T (Hinton et al. 2015); of one score, of its two outcomes
    mse       mean square distance of logits, or of vectors
    cosine    1 - cos of the two vectors of a text
    relation  mean square distance of the two matrices of cosines between the texts of a batch (Tung and Mori,
              arXiv 1907.09682, with cosines); vectors may be of different widths

Each is a mean over the texts of a batch. Knows nothing of models, tokens and labels' names.
"""

import torch
from torch import Tensor
from torch.nn import functional

FOR_CLASSIFIERS = ("kl", "mse")
FOR_EMBEDDERS = ("cosine", "mse", "relation")
FOR_ANY_WIDTH = ("relation",)


def distance(loss: str, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """One of the losses above, of float32 [texts, labels or width]; ``temperature`` is that of kl."""
    student, teacher = student.float(), teacher.float()
    if loss == "kl":
        return temperature**2 * _kl(student / temperature, teacher / temperature)
    if loss == "mse":
        return functional.mse_loss(student, teacher)
    if loss == "cosine":
        return (1 - functional.cosine_similarity(student, teacher)).mean()
    return functional.mse_loss(relations(student), relations(teacher))


def relations(vectors: Tensor) -> Tensor:
    """The cosine of every two texts of a batch, [texts, texts]."""
    unit = functional.normalize(vectors, dim=-1)
    return unit @ unit.T


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    first, second = (_log_probabilities(one) for one in (teacher, student))
    return (first.exp() * (first - second)).sum(-1).mean()


def _log_probabilities(logits: Tensor) -> Tensor:
    """Of classes, or of the two outcomes of a single logit."""
    if logits.shape[-1] == 1:
        return torch.cat([functional.logsigmoid(logits), functional.logsigmoid(-logits)], -1)
    return functional.log_softmax(logits, -1)


def label_loss(student: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with classes [texts], or of a single logit with scores between 0 and 1."""
    if student.shape[-1] == 1:
        return functional.binary_cross_entropy_with_logits(student[:, 0].float(), targets.float())
    return functional.cross_entropy(student.float(), targets.long())
