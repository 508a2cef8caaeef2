"""OSSCAR against brute force: backward pass, local search and damping, on problems small enough to enumerate."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from slmdeploy.compress import osscar
from slmdeploy.compress.osscar import damped, fit, is_singular, objective, removal_costs, resolved


def problem(seed: int, inputs: int = 8, outputs: int = 5, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A Gram matrix of correlated inputs and a dense weight, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    return x.T @ x, torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)


def chosen(alive: Tensor) -> tuple[int, ...]:
    return tuple(alive.nonzero()[:, 0].tolist())


def best_by_enumeration(gram: Tensor, dense: Tensor, size: int, keep: int) -> tuple[tuple[int, ...], float]:
    hessian = damped(gram)
    found = {}
    for kept in combinations(range(len(dense) // size), keep):
        alive = torch.zeros(len(dense) // size, dtype=torch.bool)
        alive[list(kept)] = True
        weight, value = resolved(hessian, hessian @ dense, alive, size)
        assert value == pytest.approx(objective(hessian, dense, weight))
        found[kept] = value
    best = min(found, key=found.__getitem__)
    return best, found[best]


def without_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(osscar, "SWAP_ROUNDS", 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2])
def test_removing_one_group_is_exactly_the_best(seed: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_search(monkeypatch)
    gram, dense = problem(seed)
    keep = len(dense) // size - 1
    kept, value = best_by_enumeration(gram, dense, size, keep)
    found = fit(gram, dense, size=size, keep=keep)
    assert chosen(found.alive) == kept
    assert objective(damped(gram), dense, found.weight) == pytest.approx(value)


@pytest.mark.parametrize("size", [1, 2])
def test_the_local_search_never_loses_and_often_finds_the_optimum(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = {"backward": 0, "search": 0}
    for seed in range(40):
        gram, dense = problem(seed, inputs=16 // (3 - size), outputs=3)
        keep = len(dense) // size // 2
        _, optimum = best_by_enumeration(gram, dense, size, keep)
        hessian = damped(gram)
        searched = fit(gram, dense, size=size, keep=keep)
        with monkeypatch.context() as patch:
            without_search(patch)
            backward = fit(gram, dense, size=size, keep=keep)
        values = {
            name: objective(hessian, dense, one.weight) for name, one in (("backward", backward), ("search", searched))
        }
        assert optimum - 1e-9 * abs(optimum) <= values["search"] <= values["backward"] + 1e-12 * abs(optimum)
        assert int(searched.alive.sum()) == keep
        assert (searched.swapped > 0) == (chosen(searched.alive) != chosen(backward.alive))
        for name, value in values.items():
            reached[name] += value == pytest.approx(optimum, rel=1e-9)
    assert reached["search"] > reached["backward"]


def test_gains_are_how_far_the_objective_falls_when_a_group_joins() -> None:
    gram, dense = problem(7, inputs=12)
    hessian = damped(gram)
    target = hessian @ dense
    alive = torch.tensor([True, False, True, False, False, True])
    gains = osscar._gains(hessian, target, alive, 2)
    _, before = resolved(hessian, target, alive, 2)
    for group in range(6):
        joined = alive.clone()
        joined[group] = True
        assert gains[group].item() == pytest.approx(before - resolved(hessian, target, joined, 2)[1], abs=1e-9)


def test_the_costs_of_removals_add_up_to_the_objective() -> None:
    gram, dense = problem(5, inputs=24)
    hessian = damped(gram)
    costs = removal_costs(gram, dense, size=1)
    assert len(costs) == 24
    assert sum(costs) == pytest.approx(1)
    whole = -objective(hessian, dense, dense)
    alive, _ = osscar._backward(hessian, dense, 1, 10)
    _, value = resolved(hessian, hessian @ dense, alive, 1)
    assert sum(costs[:14]) * whole == pytest.approx(whole + value)


def test_removed_rows_are_zero_and_kept_ones_are_counted() -> None:
    gram, dense = problem(1, inputs=300, outputs=4, tokens=400)
    found = fit(gram, dense, size=3, keep=30)  # 70 groups go, several at once
    rows = found.weight.abs().sum(1).reshape(-1, 3).sum(1) > 0
    assert torch.equal(rows, found.alive)
    assert int(rows.sum()) == 30


def test_keeping_everything_changes_nothing() -> None:
    gram, dense = problem(2)
    found = fit(gram, dense, size=2, keep=4)
    assert found.alive.all()
    assert found.swapped == 0
    torch.testing.assert_close(found.weight, dense)


def test_data_that_does_not_span_the_inputs_is_damped_and_known() -> None:
    gram, dense = problem(4)
    assert not is_singular(gram)
    few = problem(4, tokens=5)[0]  # fewer tokens than inputs
    gram[0], gram[:, 0] = 0, 0
    for singular in (gram, few, torch.zeros_like(gram)):
        assert is_singular(singular)
        assert fit(singular, dense, size=1, keep=4).weight.isfinite().all()
    assert not fit(gram, dense, size=1, keep=4).alive[0]
