"""OSSCAR against brute force and against the baselines, on problems small enough to enumerate."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from slmdeploy.compress import importance
from slmdeploy.compress.importance import at_random, by_magnitude, damped, objective, osscar


def problem(seed: int, inputs: int = 8, outputs: int = 5, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A Gram matrix of correlated inputs and a dense weight, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x, torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)


def best_by_enumeration(gram: Tensor, dense: Tensor, size: int, keep: int) -> tuple[tuple[int, ...], float]:
    hessian = damped(gram)
    found = {}
    for kept in combinations(range(len(dense) // size), keep):
        alive = torch.zeros(len(dense) // size, dtype=torch.bool)
        alive[list(kept)] = True
        found[kept] = objective(hessian, dense, importance._resolved(hessian, dense, alive, size))
    best = min(found, key=found.__getitem__)
    return best, found[best]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2])
def test_removing_one_group_is_exactly_the_best(seed: int, size: int) -> None:
    gram, dense = problem(seed)
    keep = len(dense) // size - 1
    kept, value = best_by_enumeration(gram, dense, size, keep)
    choice = osscar(gram, dense, size=size, keep=keep)
    assert choice.kept == kept
    assert objective(damped(gram), dense, choice.weight) == pytest.approx(value)


def test_a_planted_redundancy_is_found_as_brute_force_finds_it() -> None:
    # Inputs 4..7 repeat the first four, faintly, so that half of the inputs can say everything, whatever the weights.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    x = torch.cat([3 * base, 0.05 * base], 1)
    gram, dense = x.T @ x, torch.randn(8, 5, generator=generator, dtype=torch.float64)
    dense /= dense.norm(dim=1, keepdim=True)
    dense[4:] *= 2  # large weights that hardly matter: what misleads magnitude
    kept, value = best_by_enumeration(gram, dense, 1, 4)
    choice = osscar(gram, dense, size=1, keep=4)
    assert choice.kept == kept == (0, 1, 2, 3)
    assert objective(damped(gram), dense, choice.weight) == pytest.approx(value)
    naive = by_magnitude(gram, dense, dense.norm(dim=1), size=1, keep=4)
    assert naive.kept == (4, 5, 6, 7)
    assert choice.relative_error < 0.01 < 0.5 < naive.relative_error


@pytest.mark.parametrize("size", [1, 4])
def test_osscar_beats_both_baselines(size: int) -> None:
    gram, dense = problem(3, inputs=32, outputs=16)
    hessian, keep = damped(gram), 16 // size
    found = {
        "osscar": osscar(gram, dense, size=size, keep=keep),
        "magnitude": by_magnitude(gram, dense, dense.reshape(-1, size * 16).norm(dim=1), size=size, keep=keep),
        "random": at_random(gram, dense, torch.Generator().manual_seed(0), size=size, keep=keep),
    }
    values = {name: objective(hessian, dense, choice.weight) for name, choice in found.items()}
    assert values["osscar"] < min(values["magnitude"], values["random"])
    assert found["osscar"].relative_error < min(found["magnitude"].relative_error, found["random"].relative_error)


def test_removed_rows_are_zero_and_kept_ones_are_counted() -> None:
    gram, dense = problem(1, inputs=300, outputs=4, tokens=400)
    choice = osscar(gram, dense, size=3, keep=30)  # 70 groups go, several at once
    rows = choice.weight.abs().sum(1).reshape(-1, 3).sum(1) > 0
    assert tuple(rows.nonzero()[:, 0].tolist()) == choice.kept
    assert len(choice.kept) == 30


def test_keeping_everything_changes_nothing() -> None:
    gram, dense = problem(2)
    choice = osscar(gram, dense, size=2, keep=4)
    assert choice.kept == (0, 1, 2, 3)
    torch.testing.assert_close(choice.weight, dense)


def test_inputs_that_are_always_zero_do_not_break_the_inverse() -> None:
    gram, dense = problem(4)
    gram[0], gram[:, 0] = 0, 0
    assert 0 not in osscar(gram, dense, size=1, keep=4).kept
    nothing = osscar(torch.zeros_like(gram), dense, size=1, keep=4)
    assert nothing.weight.isfinite().all()
    assert nothing.relative_error == 0
