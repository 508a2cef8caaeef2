"""Heads and neurons layer by layer: shares over layers, going on after a kill, single heads, and what is told of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slmdeploy.compress import importance
from slmdeploy.compress.prune import prune
from slmdeploy.errors import InputError


class Killed(BaseException):
    """Not an error of ours: what a signal would be."""


class Killer:
    """A progress that ends the process after some layers of the piece of work named."""

    def __init__(self, label: str, layers: int) -> None:
        self.label, self.left = label, layers
        self.now = ""

    def start(self, label: str, total: int | None, unit: str) -> None:
        self.now = label

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n if self.now == self.label else 0
        if self.left == 0:
            raise Killed

    def finish(self) -> None:
        pass


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    calls: list[str] = []
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or original(*a, **k))
    return calls


@pytest.fixture(scope="module")
def deep(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(num_hidden_layers=4, dtype=torch.bfloat16)


SETTINGS: dict[str, Any] = {"ratio": 0.5, "layer_ratio": 0.25, "calibration_tokens": 1024}


def test_a_killed_pruning_goes_on_and_ends_bit_equal(
    tmp_path: Path, deep: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune(deep, out=tmp_path / "whole", data=data, **SETTINGS)
    with pytest.raises(Killed):
        prune(deep, out=tmp_path / "out", data=data, progress=Killer("prune", 2), **SETTINGS)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".out.pruning", "whole"]
    fits = count_calls(monkeypatch, importance, "by_fit")
    resumed = prune(deep, out=tmp_path / "out", data=data, **SETTINGS)
    assert len(fits) == 2  # heads and neurons of the third layer alone
    assert resumed.manifest["files"] == whole.manifest["files"]
    assert resumed.result == whole.result
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize(("label", "layers"), [("shorten", 1), ("weigh", 2)])
def test_removed_layers_and_weighed_costs_are_kept_too(
    tmp_path: Path, deep: Path, data: Path, label: str, layers: int
) -> None:
    settings = SETTINGS | {"layer_ratio": 0.5 if label == "shorten" else 0.0, "allocation": "global"}
    whole = prune(deep, out=tmp_path / "whole", data=data, **settings)
    with pytest.raises(Killed):
        prune(deep, out=tmp_path / "out", data=data, progress=Killer(label, layers), **settings)
    assert any((tmp_path / ".out.pruning").glob("layers*" if label == "shorten" else "costs-1-*"))
    resumed = prune(deep, out=tmp_path / "out", data=data, **settings)
    assert resumed.manifest["files"] == whole.manifest["files"]
    assert resumed.result == whole.result


def test_what_another_plan_left_is_not_used(tmp_path: Path, deep: Path, data: Path) -> None:
    with pytest.raises(Killed):
        prune(deep, out=tmp_path / "out", data=data, progress=Killer("prune", 2), **SETTINGS)
    other = SETTINGS | {"ratio": 0.75}
    made = prune(deep, out=tmp_path / "out", data=data, **other)
    assert made.manifest["files"] == prune(deep, out=tmp_path / "fresh", data=data, **other).manifest["files"]


@pytest.mark.parametrize("method", ["osscar", "minitron", "magnitude"])
def test_shares_over_layers_keep_as_much_in_sum(tmp_path: Path, deep: Path, data: Path, method: Any) -> None:
    settings = SETTINGS | {"layer_ratio": 0.0, "tile": 4}
    made = prune(deep, out=tmp_path / "out", data=data, method=method, allocation="global", **settings)
    told, shares = made.result["layers"], made.result["allocation"]
    assert sum(len(layer["neurons"]) for layer in told) == 4 * 32
    assert sum(len(layer["kv_heads"]) for layer in told) == 4 * 2
    assert all(len(layer["neurons"]) % 4 == 0 and layer["kv_heads"] for layer in told)
    assert [share["kept"] for share in shares["mlp"]] == [len(layer["neurons"]) for layer in told]
    assert shares["kind"] == "global"
    assert "relative error" in shares["reason"]
    # What is left costs more than what went, up to the steps in which a layer removes.
    assert all(share["next_cost"] is None or share["next_cost"] > 0 for share in shares["mlp"])
    even = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    assert json.loads((made.path / "config.json").read_text()).get("layer_shapes") != [even] * 4


def test_without_gqa_a_group_is_a_single_head(tmp_path: Path, checkpoint: Callable[..., Path], data: Path) -> None:
    folder = checkpoint(num_key_value_heads=8)
    made = prune(folder, out=tmp_path / "out", data=data, ratio=0.5, calibration_tokens=512)
    assert all(len(layer["kv_heads"]) == 4 for layer in made.result["layers"])
    assert json.loads((made.path / "config.json").read_text())["num_attention_heads"] == 4


def test_calibration_that_spans_too_little_is_said(tmp_path: Path, deep: Path, checkpoint: Any, data: Path) -> None:
    enough = prune(deep, out=tmp_path / "enough", data=data, ratio=0.5, calibration_tokens=2048)
    assert enough.result["singular"] == []
    wide = checkpoint(intermediate_size=640)
    few = prune(wide, out=tmp_path / "few", data=data, ratio=0.5, calibration_tokens=512)
    assert few.result["singular"] == ["layer 0 mlp", "layer 1 mlp"]
    assert few.result["calibration_tokens"] < 640


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "random", "allocation": "global"}, "method random has no scores to compare by"),
        ({"allocation": "local"}, "allocation 'local' is unknown: use one of uniform, global"),
        ({"hidden_ratio": 1.0}, "hidden_ratio = 1.0 is not a share to remove"),
        ({"hidden_ratio": 0.8}, "hidden_ratio = 0.8 leaves no multiple of tile = 16 of its 32 hidden channels"),
        ({"ratio": 0.01, "attention_ratio": 0.0}, "nothing goes, since what stays is rounded to tiles of 16"),
    ],
)
def test_unfit_settings_are_refused(tmp_path: Path, deep: Path, data: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        prune(deep, out=tmp_path / "out", data=data, **{"ratio": 0.5, **changes})
    assert not any(tmp_path.iterdir())
