"""Pruning to a latency, with a clock that counts parameters: slices, the choice kept, and what is refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from slmdeploy.checkpoint import read_config
from slmdeploy.compress import shaping
from slmdeploy.compress.journal import Journal
from slmdeploy.compress.prune import prune
from slmdeploy.compress.shapes import Goal
from slmdeploy.errors import InfeasibleError, InputError
from slmdeploy.specs import parse_latency


@dataclass
class Counter:
    """A clock on which a model takes a millisecond per thousand parameters in its layers."""

    seen: list[dict[str, Any]] = field(default_factory=list)

    def identity(self) -> dict[str, Any]:
        return {"profile": "parameters"}

    def check(self, checkpoint: Path) -> None:
        pass

    def milliseconds(self, key: Mapping[str, Any], make: Callable[[Path], None]) -> float:
        folder = self.folder / str(len(self.seen))
        folder.mkdir()
        make(folder)
        self.seen.append({**key, "config_json": read_config(folder)})
        with safe_open(folder / "model.safetensors", "pt") as stored:
            names = [name for name in stored.keys() if ".layers." in name]  # noqa: SIM118
            return 0.001 + sum(stored.get_tensor(name).numel() for name in names) / 1000

    folder: Path = Path()


def run(checkpoint: Path, data: Path, tmp_path: Path, limit: str, **changes: Any) -> Any:
    clock = Counter(folder=tmp_path / "slices")
    clock.folder.mkdir()
    goal = Goal(parse_latency(limit), clock)
    made = prune(checkpoint, out=tmp_path / "out", data=data, goal=goal, calibration_tokens=512, **changes)
    return made, clock


@pytest.mark.parametrize("method", ["osscar", "magnitude"])
def test_a_model_is_shaped_to_a_limit(tmp_path: Path, checkpoint: Callable[..., Path], data: Path, method: Any) -> None:
    dense = checkpoint(num_hidden_layers=5)
    # a layer: 32 · 64 query and output, 32 · 32 key and value, twice each, 3 · 32 · 64 neurons, two norms
    made, clock = run(dense, data, tmp_path, "ttft_16_ms<=30", method=method)
    assert made.result["shape"]["dense_ms"] == pytest.approx(5 * 12.352, abs=0.01)
    assert [one["layers"] for one in clock.seen[:2]] == [1, 4]
    assert {one["config_json"]["num_hidden_layers"] for one in clock.seen[:-1]} == {1, 4}
    model = AutoModelForCausalLM.from_pretrained(made.path)
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    chosen = made.result["shape"]["chosen"]
    assert chosen["ms"] == pytest.approx(layers / 1000, abs=0.01)
    assert chosen["ms"] <= 30
    sizes = (model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.intermediate_size)
    assert sizes == (chosen["layers"], chosen["kv_heads"], chosen["neurons"])
    assert made.result["shape"]["measured_ms"] == pytest.approx(chosen["ms"])
    assert made.result["shape"]["within_limit"] is True
    assert made.manifest["plan"]["goal"] == {"profile": "parameters"}


def test_a_pruning_that_goes_on_keeps_its_shape(
    tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Journal.write

    def killed(self: Journal, name: str, *rest: Any) -> None:
        written(self, name, *rest)
        if name == "shape":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(teacher, data, tmp_path, "ttft_16_ms<=15")
    (tmp_path / "slices").rename(tmp_path / "earlier")
    made, clock = run(teacher, data, tmp_path, "ttft_16_ms<=15")
    assert len(clock.seen) == 1, "the pruned model alone is timed"
    assert made.result["shape"]["chosen"]["ms"] <= 15


def test_what_changes_no_time_changes_no_key(teacher: Path, checkpoint: Callable[..., Path]) -> None:
    from slmdeploy.compress import loading

    configs = [loading.load_config(one) for one in (teacher, checkpoint(seed=7), checkpoint(hidden_size=64))]
    keys = [shaping.key_of(config, shaping.Form(1, 2, 3)) for config in configs]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("limit", "changes", "error", "said"),
    [
        ("ttft_16_ms<=0.1", {}, InfeasibleError, "no shape meets the limit of 0.1 ms: the fastest, 1 layers"),
        ("ttft_16_ms<=1000", {}, InputError, "as it is, which ttft_16_ms<=1000 allows: nothing needs to go"),
        ("ttft_16_ms<=15", {"ratio": 0.5}, InputError, "leave the ratios out"),
        ("ttft_16_ms<=15", {"allocation": "global"}, InputError, "use allocation uniform"),
        ("ttft_16_ms<=15", {"method": "random"}, InputError, "method random has no scores"),
    ],
)
def test_what_cannot_be_shaped_is_refused(
    tmp_path: Path, teacher: Path, data: Path, limit: str, changes: dict[str, Any], error: Any, said: str
) -> None:
    with pytest.raises(error, match=said):
        run(teacher, data, tmp_path, limit, **changes)
    assert not (tmp_path / "out").exists()


def test_without_any_share_or_goal_nothing_is_pruned(tmp_path: Path, teacher: Path, data: Path) -> None:
    with pytest.raises(InputError, match="neither a ratio nor a limit on latency"):
        prune(teacher, out=tmp_path / "out", data=data)
