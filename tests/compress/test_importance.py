"""The methods beside one another: what stays, what the weights become, and what each costs the layer's output."""

import pytest
import torch

from slmdeploy.compress.importance import by_fit, by_score, score_costs
from slmdeploy.compress.osscar import damped, objective
from tests.compress.test_osscar import best_by_enumeration, problem


def test_a_planted_redundancy_is_found_as_brute_force_finds_it() -> None:
    # Inputs 4..7 repeat the first four, faintly, so that half of the inputs can say everything, whatever the weights.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    x = torch.cat([3 * base, 0.05 * base], 1)
    gram, dense = x.T @ x, torch.randn(8, 5, generator=generator, dtype=torch.float64)
    dense /= dense.norm(dim=1, keepdim=True)
    dense[4:] *= 2  # large weights that hardly matter: what misleads magnitude
    kept, value = best_by_enumeration(gram, dense, 1, 4)
    choice, weight = by_fit(gram, dense, size=1, keep=4)
    assert choice.kept == kept == (0, 1, 2, 3)
    assert choice.singular
    assert objective(damped(gram), dense, weight) == pytest.approx(value)
    naive, _ = by_score(gram, dense, dense.norm(dim=1), size=1, keep=4)
    assert naive.kept == (4, 5, 6, 7)
    assert choice.relative_error < 0.01 < 0.5 < naive.relative_error


@pytest.mark.parametrize("size", [1, 4])
def test_osscar_beats_what_only_ranks(size: int) -> None:
    gram, dense = problem(3, inputs=32, outputs=16)
    keep = 16 // size
    sizes = dense.reshape(-1, size * 16).norm(dim=1)
    random = torch.rand(len(sizes), generator=torch.Generator().manual_seed(0))
    fitted, _ = by_fit(gram, dense, size=size, keep=keep)
    ranked = [by_score(gram, dense, scores, size=size, keep=keep)[0] for scores in (sizes, random)]
    assert fitted.relative_error < min(choice.relative_error for choice in ranked)
    assert not fitted.singular


def test_a_ranking_keeps_the_largest_and_their_weights_as_they_are() -> None:
    gram, dense = problem(1)
    choice, weight = by_score(gram, dense, torch.tensor([0.1, 3.0, 0.2, 2.0]), size=2, keep=2)
    assert choice.kept == (1, 3)
    assert torch.equal(weight[2:4], dense[2:4])
    assert not weight[:2].any()
    assert score_costs(torch.tensor([3.0, 4.0, 0.0])) == pytest.approx([0, 9 / 25, 16 / 25])


def test_a_layer_that_is_given_nothing_has_no_error() -> None:
    gram, dense = problem(1)
    choice, weight = by_fit(torch.zeros_like(gram), dense, size=1, keep=4)
    assert choice.relative_error == 0
    assert choice.singular
    assert weight.isfinite().all()
    assert score_costs(torch.zeros(2)) == [0, 0]
