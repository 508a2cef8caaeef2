"""Chooses which input groups of a linear layer stay, and what the kept weights become, by any of the methods.

A group is a run of ``size`` consecutive rows of W₀ [d_in, d_out] (torch's layout transposed): one row for an MLP
neuron, the block of one KV head's query heads for a GQA group. OSSCAR (osscar.py) re-fits the kept weights; the other
methods keep them as they are and differ in the scores they are given. Float64; knows nothing of models: it sees a Gram
matrix and a weight.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from slmdeploy.compress import osscar

Method = Literal["osscar", "minitron", "magnitude", "random"]


@dataclass(frozen=True)
class Choice:
    """The kept groups in rising order, the error that the new weight makes, and what is worth knowing of the way.

    `swapped` counts groups that OSSCAR's local search exchanged; `singular` says that the calibration data does not
    span the inputs, so that the re-fit rests on the damping.
    """

    kept: tuple[int, ...]
    relative_error: float
    swapped: int = 0
    singular: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"kept": list(self.kept)}


def relative_error(gram: Tensor, dense: Tensor, weight: Tensor) -> float:
    """‖XW - XW₀‖² / ‖XW₀‖² from the Gram matrix XᵀX; 0 when the layer's output is nothing at all."""
    whole = (dense * (gram @ dense)).sum().item()
    off = weight - dense
    return (off * (gram @ off)).sum().item() / whole if whole > 0 else 0.0


def by_fit(gram: Tensor, dense: Tensor, *, size: int, keep: int, among: int | None = None) -> tuple[Choice, Tensor]:
    """OSSCAR's choice and its weight [d_in, d_out]; ``gram`` is XᵀX [d_in, d_in], ``dense`` W₀.

    ``keep`` groups stay, or with ``among`` so many of each ``among`` consecutive ones.
    """
    found = osscar.fit(gram, dense, size=size, keep=keep, among=among)
    error = relative_error(gram, dense, found.weight)
    return Choice(_indices(found.alive), error, found.swapped, osscar.is_singular(gram)), found.weight


def by_score(
    gram: Tensor, dense: Tensor, scores: Tensor, *, size: int, keep: int, among: int | None = None
) -> tuple[Choice, Tensor]:
    """The groups with the largest ``scores`` [groups] stay, of all or of each ``among``, their weights as they are.

    The methods that rank by a score are defined without a re-fit, so that a comparison shows what each does by itself.
    """
    shares = scores.reshape(-1, among or len(scores))
    best = shares.argsort(dim=1, descending=True, stable=True)[:, :keep]
    alive = (
        torch.zeros(shares.shape, dtype=torch.bool).scatter(1, best, torch.ones_like(best, dtype=torch.bool)).flatten()
    )
    weight = dense * alive.repeat_interleave(size)[:, None]
    return Choice(_indices(alive), relative_error(gram, dense, weight)), weight


def score_costs(scores: Tensor) -> list[float]:
    """What each removal in the order of ``scores`` takes of the layer: its share of the sum of their squares."""
    squares = scores.double().square().sort().values
    shares: list[float] = (squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    return shares


def _indices(alive: Tensor) -> tuple[int, ...]:
    return tuple(alive.nonzero()[:, 0].tolist())
