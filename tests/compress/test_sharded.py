"""Sharded parameters: what a configuration must say, and two processes of shards against one of the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmdeploy.artifacts import open_artifact
from slmdeploy.compress import sharded
from slmdeploy.compress.distill import distill
from slmdeploy.compress.encoder_verbs import finetune
from slmdeploy.errors import InputError
from slmdeploy.specs import DistillStage, EncoderStage, TextColumns, distill_stage
from tests.compress.test_distill import SMALL
from tests.exporting.encoders import write_encoder

CONFIGURATION = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def configure(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in {**CONFIGURATION, **changes}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "fields", "sentence"),
    [
        ({"FSDP_VERSION": "1"}, {}, "launch with --fsdp_version 2"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "launch with --fsdp_state_dict_type FULL_STATE_DICT"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "launch with --fsdp_cpu_ram_efficient_loading false"),
        ({}, {"optimizer": "muon"}, "set optimizer to adamw or leave --use_fsdp out"),
        ({}, {"on_policy": 0.5, "response_tokens": 4}, "set on_policy to 0 or leave --use_fsdp out"),
    ],
)
def test_what_shards_cannot_do_is_refused(
    tmp_path: Path,
    teacher: Path,
    student: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    fields: dict[str, Any],
    sentence: str,
) -> None:
    configure(monkeypatch, **changes)
    with pytest.raises(InputError, match=sentence):
        distill(teacher, student, out=tmp_path / "out", data=data, stage=distill_stage(steps=1, **SMALL, **fields))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_asked_of_a_stage_that_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    sharded.check_stage(DistillStage(steps=1, on_policy=0.5))
    sharded.check_running(SimpleNamespace(is_fsdp2=False))
    configure(monkeypatch)
    sharded.check_stage(DistillStage(steps=1))
    sharded.check_running(SimpleNamespace(is_fsdp2=True))


def test_training_data_parallel_in_the_place_of_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch)
    with pytest.raises(InputError, match="shards parameters on GPUs with several processes alone"):
        sharded.check_running(SimpleNamespace(is_fsdp2=False))


def test_encoders_are_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch)
    write_encoder(tmp_path / "bert")
    columns, stage = TextColumns(text="text", label="label"), EncoderStage(steps=1)
    with pytest.raises(InputError, match="encoders are not trained with sharded parameters: leave --use_fsdp out"):
        finetune(tmp_path / "bert", out=tmp_path / "out", data=tmp_path / "t.csv", columns=columns, stage=stage)


def launch(arguments: list[Path | str], **environment: str) -> int:
    """The exit code of two processes of shards."""
    options = {
        "fsdp_version": "2",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": "false",
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "num_processes": "2",
        "num_machines": "1",
        "mixed_precision": "no",
        "dynamo_backend": "no",
        "main_process_port": "0",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp"]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    command += ["-m", "tests.compress.distill_sharded", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], timeout=600, check=False).returncode


@pytest.mark.slow
def test_two_processes_of_shards_learn_as_one_does_and_go_on_when_stopped(
    tmp_path: Path, teacher: Path, student: Path, data: Path
) -> None:
    fields: dict[str, Any] = {**SMALL, "steps": 6, "save_steps": 2, "learning_rate": 1e-2, "score_share": 0.5}
    fields |= {"hidden_weight": 0.1, "gradient_checkpointing": True}
    one = distill(teacher, student, out=tmp_path / "one", data=data, stage=distill_stage(**fields))
    arguments = [teacher, student, data, tmp_path / "two", json.dumps(fields)]
    assert launch(arguments, STOP_BEFORE_STEP="6") != 0
    assert not (tmp_path / "two").exists()
    assert launch(arguments) == 0
    two = open_artifact(tmp_path / "two", "checkpoint")
    assert (two.result["processes"], two.result["resumed_from_step"]) == (2, 4)
    assert two.result["valid"]["after"] == pytest.approx(one.result["valid"]["after"], rel=1e-3)
    whole, gathered = (AutoModelForCausalLM.from_pretrained(made.path) for made in (one, two))
    assert gathered.config.architectures == ["LlamaForCausalLM"]
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(tensor, gathered.state_dict()[name], atol=2e-3), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
