"""The verb `distill`: the student comes nearer, a killed stage goes on, and what does not fit is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from slmdeploy.artifacts import Artifact, open_artifact
from slmdeploy.checkpoint import Weights
from slmdeploy.compress.distill import distill
from slmdeploy.compress.resuming import last_whole
from slmdeploy.compress.training import Distiller
from slmdeploy.errors import InputError, OutputExistsError, UnsupportedModelError
from slmdeploy.specs import DistillStage, distill_stage
from tests.exporting.encoders import write_encoder

SMALL = {"batch_rows": 4, "length": 64, "save_steps": 1000, "dtype": "fp32", "eval_rows": 8}


def stage(**fields: Any) -> DistillStage:
    return distill_stage(**{"steps": 4, **SMALL, **fields})


def run(teacher: Path, student: Path, data: Path, out: Path, **fields: Any) -> Artifact:
    return distill(teacher, student, out=out, data=data, stage=stage(**fields))


def _log(artifact: Artifact) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.path / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adamw", "learning_rate": 1e-2, "score_share": 0.5},
        {"optimizer": "muon", "learning_rate": 2e-2, "dtype": "bf16"},
        {"learning_rate": 1e-2, "on_policy": 1.0, "response_tokens": 8, "loss": "reverse_kl"},
        {"learning_rate": 1e-2, "gradient_checkpointing": True, "gradient_accumulation": 2, "loss": "jsd", "beta": 0.5},
        {"learning_rate": 1e-2, "score_share": 0.5, "score_loss": "margin", "ce_share": 0.1, "loss": "tvd"},
        {"learning_rate": 1e-2, "score_share": 1.0, "score_loss": "listwise", "loss": "skew_kl", "dtype": "bf16"},
        {"learning_rate": 1e-2, "hidden_weight": 0.1, "attention_weight": 0.1, "gradient_checkpointing": True},
        {"learning_rate": 1e-2, "seq_kd_texts": 40, "response_tokens": 8, "ce_share": 0.5},
        {"learning_rate": 1e-2, "cached_rows": 8, "score_share": 0.5, "score_loss": "margin", "cached_top": 32},
    ],
    ids=[
        "adamw-score",
        "muon-bf16",
        "on-policy",
        "checkpointing-accumulation-jsd",
        "margin-tvd",
        "listwise-skew-bf16",
        "layers-checkpointing",
        "seq-kd",
        "cached-margin",
    ],
)
def test_a_stage_brings_the_student_nearer(
    tmp_path: Path, teacher: Path, student: Path, data: Path, fields: dict[str, Any]
) -> None:
    artifact = run(teacher, student, data, tmp_path / "out", steps=12, **fields)
    valid = artifact.result["valid"]
    assert valid["after"]["kd"] < valid["before"]["kd"]
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert (model.config.intermediate_size, model.dtype) == (32, torch.float32)
    assert AutoTokenizer.from_pretrained(artifact.path)("the fox").input_ids
    log = _log(artifact)
    assert all({"loss", "kd", "ce", "step"} <= set(entry) for entry in log[:-1])
    assert ("score" in log[0]) == ("score_loss" in fields)
    assert ("layers" in log[0]) == ("hidden_weight" in fields)
    assert artifact.result["sampled_batches"] == (12 if "on_policy" in fields else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_perfect_student_is_at_distance_zero(tmp_path: Path, teacher: Path, data: Path) -> None:
    valid = run(teacher, teacher, data, tmp_path / "out", steps=1, learning_rate=1e-9).result["valid"]
    assert valid["before"]["kd"] == pytest.approx(0, abs=1e-6)
    assert valid["before"]["ce"] > 1


def test_the_same_stage_gives_the_same_bytes(tmp_path: Path, teacher: Path, student: Path, data: Path) -> None:
    made = [run(teacher, student, data, tmp_path / name, on_policy=0.5, response_tokens=4) for name in ("a", "b")]
    weights = [artifact.manifest["files"]["model.safetensors"] for artifact in made]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "muon", "on_policy": 0.5, "response_tokens": 4, "score_share": 0.25},
        {"hidden_weight": 0.1},
        {"cached_rows": 8},
    ],
    ids=["muon-on-policy", "maps", "cached"],
)
def test_a_stage_that_stopped_goes_on_as_if_it_had_not(
    tmp_path: Path,
    checkpoint: Callable[..., Path],
    student: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
) -> None:
    teacher = checkpoint(hidden_size=48)
    fields = {"steps": 6, "save_steps": 2, "learning_rate": 1e-2, "eval_rows": 0, **fields}
    whole = run(teacher, student, data, tmp_path / "whole", **fields)
    compute = Distiller.compute_loss

    def stop_at_step_5(self: Distiller, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Distiller, "compute_loss", stop_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        run(teacher, student, data, tmp_path / "out", **fields)
    assert [path.name for path in tmp_path.glob("[!w]*")] == [".out.work"]
    monkeypatch.setattr(Distiller, "compute_loss", compute)
    resumed = run(teacher, student, data, tmp_path / "out", **fields)
    assert resumed.result["resumed_from_step"] == 4
    assert not (tmp_path / ".out.work").exists()
    first, second = (AutoModelForCausalLM.from_pretrained(a.path).state_dict() for a in (whole, resumed))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_another_plan_does_not_go_on_from_what_a_killed_one_left(
    tmp_path: Path, teacher: Path, student: Path, data: Path
) -> None:
    work = tmp_path / ".out.work"
    (work / "checkpoint-3").mkdir(parents=True)
    (work / "checkpoint-3" / "trainer_state.json").write_text("{}")
    (work / "content_key").write_text("of another plan")
    assert run(teacher, student, data, tmp_path / "out", steps=1).result["resumed_from_step"] == 0


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((2, "{}"), (10, "{"), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_whole(tmp_path) == tmp_path / "checkpoint-2"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.slow
def test_two_processes_learn_as_one_does(tmp_path: Path, teacher: Path, student: Path, data: Path) -> None:
    fields = {"steps": 12, "learning_rate": 1e-2, "score_share": 0.5, "score_loss": "margin", "cached_rows": 24}
    one = run(teacher, student, data, tmp_path / "one", **fields)
    # accelerate starts several processes with this flag alone; where there is no GPU they train on the CPU over gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "-m", "tests.compress.distill_once"]
    arguments = [*map(str, (teacher, student, data, tmp_path / "two")), json.dumps({**SMALL, **fields})]
    subprocess.run([*command, *arguments], check=True, cwd=Path(__file__).parents[2], timeout=300)
    two = open_artifact(tmp_path / "two", "checkpoint")
    assert (one.result["processes"], two.result["processes"]) == (1, 2)
    losses = [[entry["loss"] for entry in _log(made) if "loss" in entry] for made in (one, two)]
    assert len(losses[0]) == 12
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_kill_9_loses_only_what_came_after_the_last_checkpoint(
    tmp_path: Path, teacher: Path, student: Path, data: Path
) -> None:
    out, fields = tmp_path / "out", {"steps": 400, "save_steps": 5}
    arguments = [*map(str, (teacher, student, data, out)), json.dumps({**SMALL, **fields})]
    command = [sys.executable, "-m", "tests.compress.distill_once", *arguments]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    # The second checkpoint has begun, so the first one is whole, wherever the kill falls.
    while not list(tmp_path.glob(".out.work/checkpoint-10")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    artifact = run(teacher, student, data, out, **fields)
    assert artifact.result["resumed_from_step"] >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_loss_that_is_not_finite_stops_with_its_step(
    tmp_path: Path, teacher: Path, student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Distiller.measure

    def spoilt(self: Distiller, *args: Any) -> Any:
        parts = measure(self, *args)
        return replace(parts, total=parts.total * float("nan")) if self.state.global_step == 2 else parts

    monkeypatch.setattr(Distiller, "measure", spoilt)
    with pytest.raises(InputError, match=r"the loss is nan at step 3; lower learning_rate = 0\.001"):
        run(teacher, student, data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(
        InputError, match=r"the loss is nan at step 3; .*; the student as of step 2 is kept in (\S+)"
    ) as at:
        run(teacher, student, data, tmp_path / "out", save_steps=1)
    (kept,) = tmp_path.iterdir()
    assert str(at.value).endswith(str(kept))
    monkeypatch.setattr(Distiller, "measure", measure)
    begun, saved = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (student, kept))
    assert all(not torch.equal(begun[name], saved[name]) for name in begun if "proj" in name)
    assert run(teacher, kept, data, tmp_path / "on", steps=1, learning_rate=1e-4).result["steps"] == 1


def test_no_checkpoint_is_kept_of_weights_that_are_not_finite(
    tmp_path: Path, teacher: Path, student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Distiller.compute_loss

    def spoilt(self: Distiller, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute(self, *args, **kwargs)
        # A loss that is finite and whose gradient is not.
        return loss + (loss * 0).sqrt() if self.state.global_step == 2 else loss

    monkeypatch.setattr(Distiller, "compute_loss", spoilt)
    with pytest.raises(InputError, match=r"weight is not finite at step 3; lower .* as of step 2 is kept"):
        run(teacher, student, data, tmp_path / "out", save_steps=1)
    (kept,) = tmp_path.iterdir()
    state = AutoModelForCausalLM.from_pretrained(kept).state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_weights_that_are_not_finite_are_refused_before_training(
    tmp_path: Path, teacher: Path, student: Path, data: Path
) -> None:
    broken = shutil.copytree(student, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"broken: model\.layers\.0\.mlp\.up_proj\.weight is not finite"):
        run(teacher, broken, data, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_encoder_needs_the_column_of_its_texts(tmp_path: Path, teacher: Path, data: Path) -> None:
    write_encoder(tmp_path / "bert")
    with pytest.raises(InputError, match=r"bert is an encoder: name the column of the texts in a table \(--text\)"):
        run(teacher, tmp_path / "bert", data, tmp_path / "out")


def test_a_teacher_of_another_family_and_width_whose_vocabulary_is_padded(
    tmp_path: Path, checkpoint: Callable[..., Path], data: Path
) -> None:
    wide = checkpoint(vocab_size=400, hidden_size=48)
    narrow = checkpoint(seed=1)
    config = json.loads((narrow / "config.json").read_text())
    other = tmp_path / "qwen"
    shutil.copytree(narrow, other)
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: config[name] for name in (*fields, "num_key_value_heads", "head_dim", "max_position_embeddings")}
    Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True, eos_token_id=1)).save_pretrained(other)
    merges = json.loads((other / "tokenizer.json").read_text())
    merges["model"]["merges"] = [" ".join(pair) for pair in merges["model"]["merges"]]  # as older files write them
    (other / "tokenizer.json").write_text(json.dumps(merges))
    artifact = run(
        wide, other, data, tmp_path / "out", steps=12, learning_rate=1e-2, loss="reverse_kl", hidden_weight=0.1
    )
    assert artifact.result["valid"]["after"]["kd"] < artifact.result["valid"]["before"]["kd"]
    made = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert made.config.model_type == "qwen3"
    assert set(Weights(artifact.path)) == set(Weights(other))  # the maps between the widths did not stay


def test_models_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, checkpoint: Callable[..., Path], teacher: Path, student: Path, data: Path
) -> None:
    other = checkpoint(vocab_size=400)
    with pytest.raises(InputError, match=f"(?s){other} of 400: resize the student's embeddings"):
        run(teacher, other, data, tmp_path / "out")
    with pytest.raises(InputError, match=f"{teacher} has .* and teacher {student} only"):
        run(student, teacher, data, tmp_path / "out")
    renamed = shutil.copytree(student, tmp_path / "renamed")
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="different tokenizers"):
        run(teacher, renamed, data, tmp_path / "out")
    capped = shutil.copytree(teacher, tmp_path / "capped")
    config = json.loads((capped / "config.json").read_text())
    (capped / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping"):
        run(capped, student, data, tmp_path / "out")
    with pytest.raises(InputError, match="length = 128 is more than the 64 positions"):
        run(teacher, student, data, tmp_path / "out", length=128)
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_before_any_work(
    tmp_path: Path, teacher: Path, student: Path, data: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputExistsError):
        run(teacher, student, data, tmp_path / "out")


def test_nothing_is_said_on_the_terminal(
    tmp_path: Path, teacher: Path, student: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(teacher, student, data, tmp_path / "out", steps=2, on_policy=1.0, response_tokens=4)
    assert capfd.readouterr() == ("", "")
