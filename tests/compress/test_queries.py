"""Single query heads: as many of each KV head's stay, the rest computes on, and what leaves none is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmdeploy.compress import importance, osscar
from slmdeploy.compress.prune import prune
from slmdeploy.errors import InputError
from slmdeploy.specs import PrunePlan

QUERIES: dict[str, Any] = {"ratio": 0.0, "attention_ratio": 0.0, "query_ratio": 0.5, "calibration_tokens": 512}


@pytest.fixture(scope="module")
def grouped(checkpoint: Callable[..., Path]) -> Path:
    """2 KV heads with 4 query heads each."""
    return checkpoint(num_attention_heads=8, num_key_value_heads=2)


@pytest.mark.parametrize("method", ["osscar", "minitron", "magnitude", "random"])
def test_half_of_each_kv_heads_query_heads_stay(tmp_path: Path, grouped: Path, data: Path, method: str) -> None:
    made = prune(grouped, out=tmp_path / "out", data=data, method=method, **QUERIES)
    assert made.result["cut_max_difference"] < 1e-4
    for layer in made.result["queries"]:
        assert [sum(head // 4 == group for head in layer["kept"]) for group in range(2)] == [2, 2]
    model: Any = AutoModelForCausalLM.from_pretrained(made.path)
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    dense: Any = AutoModelForCausalLM.from_pretrained(grouped)
    kept = made.result["queries"][0]["kept"]
    rows = torch.tensor([head * 8 + i for head in kept for i in range(8)])
    first, whole = (one.model.layers[0].self_attn for one in (model, dense))
    assert torch.equal(first.q_proj.weight, whole.q_proj.weight[rows])
    assert torch.equal(first.k_proj.weight, whole.k_proj.weight)


def test_query_heads_go_before_groups_and_neurons(tmp_path: Path, grouped: Path, data: Path) -> None:
    settings = {**QUERIES, "ratio": 0.5, "attention_ratio": 0.5, "layer_ratio": 0.5, "query_ratio": 0.5}
    made = prune(grouped, out=tmp_path / "out", data=data, **settings)
    config = AutoModelForCausalLM.from_pretrained(made.path).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 32)
    assert len(made.result["queries"]) == config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"query_ratio": 0.9}, "removing 0.9 of the 4 query heads of a KV head leaves none: lower query_ratio"),
        ({"query_ratio": 1.0}, "query_ratio = 1.0 is not a share to remove"),
        ({"query_ratio": 0.1}, "nothing goes"),
        ({"query_ratio": 0.25}, "3 query heads for each of 2 KV heads stay, which transformers does not load"),
    ],
)
def test_unfit_shares_of_query_heads_are_refused(
    tmp_path: Path, grouped: Path, data: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        prune(grouped, out=tmp_path / "out", data=data, **QUERIES | changes)
    assert list(tmp_path.iterdir()) == []


def test_heads_without_groups_are_attention_ratios(tmp_path: Path, checkpoint: Callable[..., Path], data: Path) -> None:
    single = checkpoint(num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(InputError, match="has a KV head of its own, which attention_ratio removes"):
        prune(single, out=tmp_path / "out", data=data, **QUERIES)


def test_a_recipe_may_take_query_heads_alone() -> None:
    assert PrunePlan(ratio=0.0, query_ratio=0.5).settings["query_ratio"] == 0.5
    with pytest.raises(ValueError, match="rounds above 1 take whole GQA groups"):
        PrunePlan.model_validate({"ratio": 0.5, "query_ratio": 0.5, "rounds": 2, "between": {"steps": 1}})


def test_osscar_keeps_its_share_of_each_block_and_is_no_worse_than_any_other_choice() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    gram, dense = inputs.T @ inputs, torch.randn(12, 5, dtype=torch.float64)
    choice, weight = importance.by_fit(gram, dense, size=2, keep=1, among=3)
    assert [sum(group // 3 == block for group in choice.kept) for block in range(2)] == [1, 1]
    hessian = osscar.damped(gram)
    found = osscar.objective(hessian, dense, weight)
    others = []
    for first in range(3):
        for second in range(3, 6):
            alive = torch.zeros(6, dtype=torch.bool)
            alive[[first, second]] = True
            others.append(osscar.resolved(hessian, hessian @ dense, alive, 2)[1])
    assert found == pytest.approx(min(others))


def test_scores_keep_the_best_of_each_block() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 9.0, 8.0, 7.0])
    choice, weight = importance.by_score(
        torch.eye(6, dtype=torch.float64), torch.ones(6, 1, dtype=torch.float64), scores, size=1, keep=2, among=3
    )
    assert choice.kept == (0, 2, 3, 4)
    assert weight[:, 0].tolist() == [1, 0, 1, 1, 1, 0]
