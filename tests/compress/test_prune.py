"""The verb `prune`: an ordinary, smaller checkpoint, equal to the masked model, and what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slmdeploy.artifacts import Artifact
from slmdeploy.compress import pruning, surgery
from slmdeploy.compress.prune import prune
from slmdeploy.errors import GateError, InputError, MissingExtraError, OutputExistsError, UnsupportedModelError
from tests.compress.conftest import max_difference


class Recorder:
    """Remembers what a Progress is told."""

    def __init__(self) -> None:
        self.total, self.done, self.label = 0, 0, ""

    def start(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total = f"{label} {unit}", total or 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n

    def finish(self) -> None:
        pass


def run(checkpoint: Path, data: Path, out: Path, **changes: Any) -> Artifact:
    settings: dict[str, Any] = {"ratio": 0.5, "calibration_tokens": 1024, **changes}
    return prune(checkpoint, out=out, data=data, **settings)


@pytest.mark.parametrize("method", ["osscar", "magnitude", "random"])
def test_the_result_is_an_ordinary_smaller_checkpoint(tmp_path: Path, teacher: Path, data: Path, method: Any) -> None:
    recorder = Recorder()
    artifact = run(teacher, data, tmp_path / "out", method=method, progress=recorder)
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert (model.config.intermediate_size, model.config.head_dim) == (32, 8)
    assert AutoTokenizer.from_pretrained(artifact.path)("the fox").input_ids
    assert artifact.kind == "checkpoint"
    assert artifact.result["parameters"]["after"] == model.num_parameters() < artifact.result["parameters"]["before"]
    assert artifact.result["cut_max_difference"] < 1e-4
    assert [len(layer["neurons"]) for layer in artifact.result["layers"]] == [32, 32]
    assert (recorder.label, recorder.done, recorder.total) == ("prune layers", 2, 2)


def test_osscar_disturbs_the_layers_least(tmp_path: Path, teacher: Path, data: Path) -> None:
    errors = {}
    for method in ("osscar", "magnitude", "random"):
        layers = run(teacher, data, tmp_path / method, method=method).result["layers"]
        errors[method] = [layers[0]["attention_error"], sum(layer["mlp_error"] for layer in layers)]
    assert all(o < min(m, r) for o, m, r in zip(*errors.values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays_and_the_cut_is_the_masked_model(
    tmp_path: Path, checkpoint: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    seen: list[Any] = []
    cut = surgery.cut
    monkeypatch.setattr(surgery, "cut", lambda model, kept: seen.append(model) or cut(model, kept))
    artifact = run(checkpoint(dtype=dtype, attention_bias=True), data, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert loaded.dtype == dtype
    ids = torch.arange(2, 60)[None]
    assert max_difference(seen[0].eval(), loaded.eval(), ids) < 1e-4
    for layer, told in zip(seen[0].model.layers, artifact.result["layers"], strict=True):
        columns = layer.mlp.down_proj.weight.abs().sum(0) > 0
        assert columns.nonzero()[:, 0].tolist() == told["neurons"]


def test_a_cut_that_changes_the_model_is_refused(
    tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "MAX_DIFFERENCE", -1.0)
    with pytest.raises(GateError, match="changed its logits"):
        run(teacher, data, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_attention_can_be_left_alone_and_neurons_snap_to_tiles(tmp_path: Path, teacher: Path, data: Path) -> None:
    kept = run(teacher, data, tmp_path / "out", ratio=0.4, attention_ratio=0.0).result["kept_per_layer"]
    assert kept == {"kv_heads": 4, "neurons": 32}  # 64 * 0.6 = 38.4 is nearest to 2 tiles of 16


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path, teacher: Path, data: Path) -> None:
    made = [run(teacher, data, tmp_path / name) for name in ("a", "b")]
    assert made[0].manifest["files"] == made[1].manifest["files"]
    assert made[0].content_key == made[1].content_key


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 0.0}, "ratio = 0.0 is not a share"),
        ({"ratio": 1.0}, "ratio = 1.0 is not a share"),
        ({"ratio": 0.95}, "ratio = 0.95 leaves no multiple of tile = 16 of its 64 neurons"),
        ({"attention_ratio": 0.95}, "removing 0.95 of its 4 KV heads leaves none"),
        ({"attention_ratio": 0.25}, "keeps 3 of its 4 KV heads, .* so that 1, 2 or 4 stay"),
        ({"attention_ratio": -0.1}, "attention_ratio = -0.1 is not a share"),
        ({"method": "osscat"}, "method 'osscat' is unknown: use one of osscar"),
        ({"calibration_tokens": 0}, "calibration_tokens = 0 is too few"),
    ],
)
def test_unfit_numbers_are_refused(
    tmp_path: Path, teacher: Path, data: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run(teacher, data, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_another_family_is_refused_by_the_field(tmp_path: Path, teacher: Path, data: Path) -> None:
    other = shutil.copytree(teacher, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    with pytest.raises(UnsupportedModelError, match="model_type = 'bloom' cannot be pruned"):
        run(other, data, tmp_path / "out")


@pytest.mark.parametrize(
    ("missing", "said"),
    [("config.json", "config.json"), ("model.safetensors", "model.safetensors"), ("tokenizer.json", "tokenizer.json")],
)
def test_an_incomplete_checkpoint_is_named(tmp_path: Path, teacher: Path, data: Path, missing: str, said: str) -> None:
    broken = shutil.copytree(teacher, tmp_path / "broken")
    (broken / missing).unlink()
    with pytest.raises(InputError, match=said):
        run(broken, data, tmp_path / "out")
    with pytest.raises(InputError, match="nowhere does not exist"):
        run(tmp_path / "nowhere", data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_empty_calibration_and_existing_output_are_refused(tmp_path: Path, teacher: Path, data: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(InputError, match=r"empty\.jsonl is empty"):
        run(teacher, empty, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputExistsError):
        run(teacher, data, tmp_path / "out")


def test_nothing_is_said_on_the_terminal(
    tmp_path: Path, teacher: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(teacher, data, tmp_path / "out")
    assert capfd.readouterr() == ("", "")


def test_the_verbs_import_without_torch() -> None:
    code = "import sys; from slmdeploy.compress import distill, prune; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_extra_is_one_command(
    tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmdeploy.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'slmdeploy\[build\]'"):
        run(teacher, data, tmp_path / "out")
