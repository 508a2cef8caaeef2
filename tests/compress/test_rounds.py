"""Pruning in rounds: the shape at the end is that of one round, and on the way shares are even."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.compress.prune import kept_counts, prune
from slmdeploy.compress.rounds import rounds
from slmdeploy.errors import InputError
from slmdeploy.specs import DistillStage, PrunePlan

BETWEEN = DistillStage(steps=1)


def test_the_last_round_ends_where_one_would(tmp_path: Path, checkpoint: Callable[..., Path], data: Path) -> None:
    wide = checkpoint(intermediate_size=256, num_hidden_layers=4)
    shares: dict[str, Any] = {"ratio": 0.6, "attention_ratio": 0.5, "layer_ratio": 0.5}
    plan = PrunePlan(**shares, method="magnitude", calibration_tokens=512, rounds=2, between=BETWEEN)
    here, sizes = wide, []
    for number, one in enumerate(rounds(wide, plan)):
        made = prune(
            here,
            out=tmp_path / str(number),
            data=data,
            **one.settings,
        )
        here = made.path
        sizes.append((4 - len(made.result["removed_layers"]) if number == 0 else None, made.result["kept_per_layer"]))
    once = kept_counts(wide, **shares)
    assert sizes[-1][1] == {"kv_heads": once.kv_heads, "neurons": once.neurons} == {"kv_heads": 2, "neurons": 96}
    # 256 · sqrt(0.4) = 162 is nearest to 10 tiles; 4 · sqrt(0.5) = 2.8 heads, and of 3 the config class knows nothing
    assert sizes[0] == (3, {"kv_heads": 4, "neurons": 160})


def test_a_round_that_removes_nothing_is_refused(teacher: Path) -> None:
    plan = PrunePlan(ratio=0.25, attention_ratio=0.0, rounds=5, between=BETWEEN)
    with pytest.raises(InputError, match="rounds = 5 are too many, since round 1 would remove nothing"):
        rounds(teacher, plan)


def test_shares_that_do_not_fit_are_refused_as_prune_does(teacher: Path) -> None:
    plan = PrunePlan(ratio=0.5, attention_ratio=0.25, rounds=2, between=BETWEEN)
    with pytest.raises(InputError, match="keeps 3 of its 4 KV heads"):
        rounds(teacher, plan)


def test_widths_that_no_heads_fit_give_way_to_larger_ones_on_the_way(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    config |= {"intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = PrunePlan(ratio=0.5, attention_ratio=0.0, hidden_ratio=0.5, rounds=2, between=BETWEEN)
    first, second = rounds(tmp_path, plan)
    # 576 · sqrt(0.5) = 407 is 400 in tiles, and 432 is the next one that 9 heads divide
    assert (first.hidden_ratio, second.hidden_ratio) == (1 - 432 / 576, 1 - 288 / 432)
    assert first.attention_ratio == second.attention_ratio == 0
