"""What export takes as a checkpoint: every form of weights equals torch, and what is broken is one sentence."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from slmdeploy.building.build import build
from slmdeploy.checkpoint import INDEX, SINGLE
from slmdeploy.cli import main
from slmdeploy.errors import InputError, UnsupportedModelError
from slmdeploy.exporting.export import export
from slmdeploy.packaging.package import package
from slmdeploy.runtime.model import load
from slmdeploy.specs import load_profile
from tests.exporting.checkpoints import write_checkpoint

IDS = [3, 1, 4, 1, 5, 9]
NORM = "model.layers.1.post_attention_layernorm.weight"


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_every_form_of_weights_equals_torch(tmp_path: Path, dtype: torch.dtype, shards: bool) -> None:
    checkpoint = tmp_path / "checkpoint"
    saved = write_checkpoint(checkpoint, dtype=dtype)
    if shards:
        (checkpoint / SINGLE).unlink()
        saved.save_pretrained(checkpoint, max_shard_size="70KB")
        assert len(list(checkpoint.glob("model-*.safetensors"))) > 2
        assert (checkpoint / INDEX).is_file()
    artifact = export(checkpoint, out=tmp_path / "graph")
    assert all(rung["passed"] for rung in artifact.result["parity"])
    reference = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(load(tmp_path / "graph").logits(IDS) - expected).max() < 1e-4


def test_a_checkpoint_of_mixed_types_equals_torch(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint)

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
        tensors[NORM] = tensors[NORM].half()

    change_tensors(checkpoint, narrow)
    artifact = export(checkpoint, out=tmp_path / "graph")
    assert all(rung["passed"] for rung in artifact.result["parity"])


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (without(NORM), UnsupportedModelError, f"has no tensor {NORM}"),
        (with_tensor(NORM, torch.ones(63)), UnsupportedModelError, rf"{NORM} has shape \[63\], but .* \[64\]"),
        (with_tensor(NORM, torch.full((64,), float("nan"))), InputError, f"{NORM} has 64 of 64 values that are NaN"),
        (with_tensor("model.layers.1.mlp.mystery", torch.ones(2)), UnsupportedModelError, "does not account for"),
        (with_tensor(NORM, torch.ones(64, dtype=torch.int64)), InputError, f"{NORM} has dtype I64; save it as F32"),
        (with_tensor(NORM, torch.ones(64, dtype=torch.float8_e4m3fn)), InputError, f"{NORM} has dtype F8_E4M3"),
    ],
    ids=["missing", "shape", "nan", "left over", "integers", "float8"],
)
def test_a_broken_tensor_is_named_and_nothing_is_written(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], kind: type[Exception], said: str
) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    change_tensors(tmp_path / "checkpoint", change)
    with pytest.raises(kind, match=said):
        export(tmp_path / "checkpoint", out=tmp_path / "graph")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_chat_templates_go_along_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "rag.jinja").write_text("rag")
    graph = export(checkpoint, out=tmp_path / "graph")
    profile = load_profile("cpu-fp32")
    built = build(tmp_path / "graph", profile=profile, target=None, out=tmp_path / "build")
    packed = package(tmp_path / "build", out=tmp_path / "package")
    for artifact in (graph, built, packed):
        assert {"chat_template.jinja", "additional_chat_templates/rag.jinja"} <= artifact.manifest["files"].keys()
    model = load(tmp_path / "package")
    assert model.chat_prompt([{"role": "user", "content": "Hello"}]) == "Hello"
    arguments = ["generate", str(tmp_path / "package"), "--chat", "Hello", "--max-new-tokens", "5", "--json"]
    monkeypatch.setattr(sys, "argv", ["slmdeploy", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    expected = model.chat([{"role": "user", "content": "Hello"}], max_new_tokens=5).text
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["text"] == expected


def test_a_cached_hub_id_is_exported_offline(tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--some--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    write_checkpoint(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    artifact = export("some/model", revision="v1", cache_dir=tmp_path / "cache", out=tmp_path / "graph")
    assert artifact.kind == "graph"


def quantise(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100])


def bring_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})


def forget_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


@pytest.mark.parametrize(
    ("spoil", "options", "code", "said"),
    [
        (quantise, (), 2, "quantised already (gptq), and only float32, float16 and bfloat16 weights are supported"),
        (pickle, (), 2, "save them as safetensors with python -c"),
        (truncate, (), 5, "is truncated, download it again"),
        (bring_code, (), 2, "code that comes with a checkpoint is never run, and there is no --trust-remote-code"),
        (forget_tokenizer, (), 2, "AutoTokenizer"),
        (None, ("--revision", "main"), 2, "is a folder, which has no revision 'main'"),
        (None, ("--base", "CHECKPOINT"), 2, "is no adapter (it has no adapter_config.json)"),
    ],
    ids=["quantised", "pickled", "truncated", "custom code", "sentencepiece", "revision", "base"],
)
def test_the_command_line_says_it_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None] | None,
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "graph"
    write_checkpoint(checkpoint)
    if spoil:
        spoil(checkpoint)
    given = [str(checkpoint) if option == "CHECKPOINT" else option for option in options]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["slmdeploy", "export", str(checkpoint), "-o", str(out), *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not out.exists()
