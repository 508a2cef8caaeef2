"""OSSCAR: which input groups of a linear layer stay, and the weight re-fitted on them, by a backward pass and swaps.

Minimises ½tr(WᵀHW) - tr(WᵀG) with G = H·W₀ over weights with at most K non-zero groups of consecutive rows. The
backward pass removes the groups that cost least, a few at a time, each time with all others re-fitted. The local
search then exchanges kept groups for removed ones as long as that lowers the objective. Float64 throughout; knows
nothing of models. Source: Meng et al., OSSCAR, ICML 2024.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
ROUNDS = 64
"""Removals that the backward pass makes for the whole way; more take longer and choose better."""
SWAP_ROUNDS = 32
"""Exchanges that the local search tries at most; every one that is kept lowers the objective."""
SWAP_SHARE = 0.1
"""Share of the smaller side, kept or removed, that the first exchange moves."""
LEAST_GAIN = 1e-9
"""Relative fall of the objective below which an exchange is rounding."""
SINGULAR = 1e-10
"""H counts as singular where its least eigenvalue is at most this share of its mean."""


@dataclass(frozen=True)
class Fit:
    """Which groups stay, bool [groups], the weight [d_in, d_out] with zeros elsewhere, and how many were exchanged."""

    alive: Tensor
    weight: Tensor
    swapped: int


def damped(gram: Tensor) -> Tensor:
    """H = XᵀX + λ·mean(diag)·I with λ = 0.01, so that H can be inverted whatever the calibration data spans."""
    mean = gram.diagonal().mean().item()
    return gram + (DAMPING * mean or 1.0) * torch.eye(len(gram), dtype=gram.dtype)


def is_singular(gram: Tensor) -> bool:
    """Whether XᵀX alone, without the damping, cannot be inverted in float64: the data does not span the inputs."""
    mean = gram.diagonal().mean().item()
    shifted = gram - SINGULAR * mean * torch.eye(len(gram), dtype=gram.dtype)
    return mean == 0 or int(torch.linalg.cholesky_ex(shifted).info) > 0


def objective(hessian: Tensor, dense: Tensor, weight: Tensor) -> float:
    """½tr(WᵀHW) - tr(WᵀG) with G = H·W₀: what OSSCAR minimises."""
    return (0.5 * (weight * (hessian @ weight)).sum() - (weight * (hessian @ dense)).sum()).item()


def fit(gram: Tensor, dense: Tensor, *, size: int, keep: int, among: int | None = None) -> Fit:
    """The ``keep`` groups of ``size`` rows that stay; ``gram`` is XᵀX [d_in, d_in], ``dense`` W₀ [d_in, d_out].

    With ``among``, so many of each ``among`` consecutive groups stay, and exchanges stay among these.
    """
    hessian = damped(gram)
    target = hessian @ dense
    alive, _ = _backward(hessian, dense, size, keep, among)
    if among is None:
        alive, weight, swapped = _local_search(hessian, target, alive, size)
    else:
        alive, weight, swapped = _search_within(hessian, target, alive, size, among)
    return Fit(alive, weight, swapped)


def removal_costs(gram: Tensor, dense: Tensor, *, size: int) -> list[float]:
    """What each removal of the backward pass adds to the relative error, in order of removal; the last one the rest."""
    hessian = damped(gram)
    _, costs = _backward(hessian, dense, size, 1)
    whole = 0.5 * (dense * (hessian @ dense)).sum().item()
    costs.append(whole - sum(costs))
    return [cost / whole if whole > 0 else 0.0 for cost in costs]


def _backward(
    hessian: Tensor, dense: Tensor, size: int, keep: int, among: int | None = None
) -> tuple[Tensor, list[float]]:
    """The groups left of the greedy removal, and the cost of each removed one; a batch shares its cost evenly.

    Of each ``among`` consecutive groups, one at a time, or of all of them ``keep`` are left.
    """
    groups = len(dense) // size
    inverse = torch.linalg.inv(hessian)
    weight = dense.clone()  # H⁻¹G with G = H·W₀
    alive = torch.ones(groups, dtype=torch.bool)
    at_once = max(1, (groups - keep) // ROUNDS) if among is None else 1
    spent: list[float] = []
    while (excess := alive.reshape(-1, among or groups).sum(1) - keep).any():
        costs = _costs(inverse, weight, size)
        costs[~alive | (excess == 0).repeat_interleave(among or groups)] = torch.inf
        gone = costs.argsort(stable=True)[: min(at_once, int(excess.sum()))]
        cost = _eliminate(inverse, weight, rows_of(gone, size))
        alive[gone] = False
        spent += [cost / len(gone)] * len(gone)
    return alive, spent


def _costs(inverse: Tensor, weight: Tensor, size: int) -> Tensor:
    """½tr(W_jᵀ([H⁻¹]_jj)⁻¹W_j) of each group j; a removed group's zero block is replaced to stay invertible."""
    blocks = _diagonal_blocks(inverse, size)
    dead = blocks.abs().amax((1, 2)) == 0
    blocks = torch.where(dead[:, None, None], torch.eye(size, dtype=inverse.dtype), blocks)
    return _half_traces(blocks, weight.reshape(len(blocks), size, -1))


def _half_traces(blocks: Tensor, parts: Tensor) -> Tensor:
    """½tr(XᵀB⁻¹X) of each block B [groups, size, size] and part X [groups, size, d_out]; [groups].

    As ½Σ B⁻¹∘XXᵀ, so that the small blocks are inverted and the wide parts only multiplied.
    """
    halves: Tensor = 0.5 * (torch.linalg.inv(blocks) * (parts @ parts.mT)).sum((1, 2))
    return halves


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks [groups, size, size] on the diagonal of a square matrix."""
    groups = len(matrix) // size
    return matrix.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _eliminate(inverse: Tensor, weight: Tensor, rows: Tensor) -> float:
    """Condition on the rows being zero: update weight and inverse in place, clear the rows, return what it cost."""
    columns = inverse[:, rows]
    solver = torch.linalg.solve(columns[rows], torch.cat([weight[rows], columns.T], 1))
    outputs = weight.shape[1]
    cost: float = 0.5 * (weight[rows] * solver[:, :outputs]).sum().item()
    weight -= columns @ solver[:, :outputs]
    inverse -= columns @ solver[:, outputs:]
    weight[rows] = 0
    inverse[rows] = 0
    inverse[:, rows] = 0
    return cost


def _local_search(hessian: Tensor, target: Tensor, alive: Tensor, size: int) -> tuple[Tensor, Tensor, int]:
    """Exchange groups while that lowers the objective; where it does not, try half as many, down to one."""
    best, value = resolved(hessian, target, alive, size)
    swaps = max(1, int(SWAP_SHARE * min(int(alive.sum()), int((~alive).sum()))))
    total = 0
    for _ in range(SWAP_ROUNDS if not alive.all() else 0):
        trial = _exchanged(hessian, target, alive, best, size, swaps)
        weight, lower = resolved(hessian, target, trial, size)
        if lower < value - LEAST_GAIN * abs(value):
            total += int((trial & ~alive).sum())
            alive, best, value = trial, weight, lower
        elif swaps > 1:
            swaps //= 2
        else:
            break
    return alive, best, total


def _search_within(hessian: Tensor, target: Tensor, alive: Tensor, size: int, among: int) -> tuple[Tensor, Tensor, int]:
    """Exchange one kept group for a removed one of the same ``among``, in all in turn, while that lowers it."""
    best, value = resolved(hessian, target, alive, size)
    total = 0
    for _ in range(SWAP_ROUNDS if not alive.all() else 0):
        before = total
        for first in range(0, len(alive), among):
            inside = torch.zeros_like(alive)
            inside[first : first + among] = True
            trial = _exchanged(hessian, target, alive, best, size, 1, inside)
            weight, lower = resolved(hessian, target, trial, size)
            if lower < value - LEAST_GAIN * abs(value):
                alive, best, value, total = trial, weight, lower, total + 1
        if total == before:
            break
    return alive, best, total


def _exchanged(
    hessian: Tensor, target: Tensor, alive: Tensor, weight: Tensor, size: int, swaps: int, inside: Tensor | None = None
) -> Tensor:
    """``alive`` without the ``swaps`` groups that cost least, and with those of the rest that gain most.

    Only groups of ``inside``, bool [groups], are exchanged; None for all.
    """
    kept = alive.nonzero()[:, 0]
    rows = rows_of(kept, size)
    inverse = torch.linalg.inv(hessian[rows][:, rows])
    costs = _costs(inverse, weight[rows], size)
    if inside is not None:
        costs[~inside[kept]] = torch.inf
    cheapest = kept[costs.argsort(stable=True)[:swaps]]
    trial = alive.clone()
    trial[cheapest] = False
    gains = _gains(hessian, target, trial, size)
    gains[trial if inside is None else trial | ~inside] = -torch.inf
    trial[gains.argsort(descending=True, stable=True)[:swaps]] = True
    return trial


def _gains(hessian: Tensor, target: Tensor, alive: Tensor, size: int) -> Tensor:
    """½tr(rᵀC⁻¹r) of every group outside A: how much the objective falls when it joins, alone and with a re-fit.

    r = G_j - H_jA·H_AA⁻¹G_A and C = H_jj - H_jA·H_AA⁻¹H_Aj. Groups of A itself get 0.
    """
    inside, outside = (rows_of(mask.nonzero()[:, 0], size) for mask in (alive, ~alive))
    across = hessian[inside][:, outside]
    solver = torch.linalg.solve(hessian[inside][:, inside], torch.cat([target[inside], across], 1))
    outputs, shape = target.shape[1], (len(inside), len(outside) // size, size)
    left = (target[outside] - across.T @ solver[:, :outputs]).reshape(-1, size, outputs)
    explained = torch.einsum("igs,igt->gst", across.reshape(shape), solver[:, outputs:].reshape(shape))
    schur = _diagonal_blocks(hessian, size)[~alive] - explained
    gains = torch.zeros(len(alive), dtype=hessian.dtype)
    gains[~alive] = _half_traces(schur, left)
    return gains


def resolved(hessian: Tensor, target: Tensor, alive: Tensor, size: int) -> tuple[Tensor, float]:
    """The best weight on the kept rows A, H_AA⁻¹G_A, computed anew, and the objective there, -½tr(G_AᵀW_A)."""
    rows = rows_of(alive.nonzero()[:, 0], size)
    weight = torch.zeros_like(target)
    weight[rows] = torch.linalg.solve(hessian[rows][:, rows], target[rows])
    return weight, -0.5 * (target * weight).sum().item()


def rows_of(groups: Tensor, size: int) -> Tensor:
    """The rows of the groups, in their order."""
    return (groups[:, None] * size + torch.arange(size)).flatten()
