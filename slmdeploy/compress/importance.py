"""Chooses which input groups of a linear layer stay, and what the kept weights become: OSSCAR, magnitude, random.

A group is a run of ``size`` consecutive rows of W₀ [d_in, d_out] (torch's layout transposed): one row of `down_proj`
for an MLP neuron, the block of one KV head's query heads of `o_proj` for a GQA group. Everything is float64. Knows
nothing of models: it sees a Gram matrix and a weight. OSSCAR: Meng et al., ICML 2024, its backward pass.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["osscar", "magnitude", "random"]
DAMPING = 0.01
ROUNDS = 64


@dataclass(frozen=True)
class Choice:
    """The kept groups in rising order, the new weight [d_in, d_out] with zeros elsewhere, and the error it makes."""

    kept: tuple[int, ...]
    weight: Tensor
    relative_error: float


def damped(gram: Tensor) -> Tensor:
    """H = XᵀX + λ·mean(diag)·I with λ = 0.01, so that H can be inverted whatever the calibration data spans."""
    mean = gram.diagonal().mean().item()
    return gram + (DAMPING * mean or 1.0) * torch.eye(len(gram), dtype=gram.dtype)


def objective(hessian: Tensor, dense: Tensor, weight: Tensor) -> float:
    """½tr(WᵀHW) - tr(WᵀG) with G = H·W₀: what OSSCAR minimises."""
    return (0.5 * (weight * (hessian @ weight)).sum() - (weight * (hessian @ dense)).sum()).item()


def relative_error(gram: Tensor, dense: Tensor, weight: Tensor) -> float:
    """‖XW - XW₀‖² / ‖XW₀‖² from the Gram matrix XᵀX; 0 when the layer's output is nothing at all."""
    whole = (dense * (gram @ dense)).sum().item()
    off = weight - dense
    return (off * (gram @ off)).sum().item() / whole if whole > 0 else 0.0


def osscar(gram: Tensor, dense: Tensor, *, size: int, keep: int) -> Choice:
    """Remove the groups whose removal, with all others re-fitted, costs least; a few at a time, then re-solve.

    ``gram`` is XᵀX [d_in, d_in], ``dense`` W₀ [d_in, d_out].
    """
    hessian = damped(gram)
    groups = len(dense) // size
    inverse = torch.linalg.inv(hessian)
    weight = dense.clone()  # H⁻¹G with G = H·W₀
    alive = torch.ones(groups, dtype=torch.bool)
    at_once = max(1, (groups - keep) // ROUNDS)
    while (excess := int(alive.sum()) - keep) > 0:
        costs = _removal_costs(inverse, weight, size)
        costs[~alive] = torch.inf
        gone = costs.argsort(stable=True)[: min(at_once, excess)]
        _eliminate(inverse, weight, _rows(gone, size))
        alive[gone] = False
    return _choice(gram, dense, alive, size, _resolved(hessian, dense, alive, size))


def _removal_costs(inverse: Tensor, weight: Tensor, size: int) -> Tensor:
    """½tr(W_jᵀ([H⁻¹]_jj)⁻¹W_j) of each group j; a removed group's zero block is replaced to stay invertible."""
    groups = len(weight) // size
    blocks = inverse.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    dead = blocks.abs().amax((1, 2)) == 0
    blocks = torch.where(dead[:, None, None], torch.eye(size, dtype=inverse.dtype), blocks)
    parts = weight.reshape(groups, size, -1)
    costs: Tensor = 0.5 * (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return costs


def _eliminate(inverse: Tensor, weight: Tensor, rows: Tensor) -> None:
    """Condition on the rows being zero: update the weight and the inverse in place, and clear the rows exactly."""
    columns = inverse[:, rows]
    solver = torch.linalg.solve(columns[rows], torch.cat([weight[rows], columns.T], 1))
    outputs = weight.shape[1]
    weight -= columns @ solver[:, :outputs]
    inverse -= columns @ solver[:, outputs:]
    weight[rows] = 0
    inverse[rows] = 0
    inverse[:, rows] = 0


def _resolved(hessian: Tensor, dense: Tensor, alive: Tensor, size: int) -> Tensor:
    """The best weight on the kept rows A, H_AA⁻¹G_A, computed anew so that no rounding of the updates stays."""
    rows = _rows(alive.nonzero()[:, 0], size)
    weight = torch.zeros_like(dense)
    weight[rows] = torch.linalg.solve(hessian[rows][:, rows], (hessian @ dense)[rows])
    return weight


def by_magnitude(gram: Tensor, dense: Tensor, sizes: Tensor, *, size: int, keep: int) -> Choice:
    """Baseline: keep the groups with the largest ``sizes`` [groups], weights as they are.

    A baseline shows what its method does when used by itself, and this one knows no data to re-fit with.
    """
    alive = torch.zeros(len(sizes), dtype=torch.bool)
    alive[sizes.argsort(descending=True, stable=True)[:keep]] = True
    return _choice(gram, dense, alive, size, _masked(dense, alive, size))


def at_random(gram: Tensor, dense: Tensor, generator: torch.Generator, *, size: int, keep: int) -> Choice:
    """Baseline: keep groups drawn without replacement, weights as they are."""
    alive = torch.zeros(len(dense) // size, dtype=torch.bool)
    alive[torch.randperm(len(alive), generator=generator)[:keep]] = True
    return _choice(gram, dense, alive, size, _masked(dense, alive, size))


def _masked(dense: Tensor, alive: Tensor, size: int) -> Tensor:
    return dense * alive.repeat_interleave(size)[:, None]


def _rows(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _choice(gram: Tensor, dense: Tensor, alive: Tensor, size: int, weight: Tensor) -> Choice:
    return Choice(tuple(alive.nonzero()[:, 0].tolist()), weight, relative_error(gram, dense, weight))
