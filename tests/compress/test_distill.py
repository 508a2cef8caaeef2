"""The verb `distill`: the student comes nearer, a killed stage goes on, and what does not fit is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slmdeploy.artifacts import Artifact
from slmdeploy.compress.distill import _last_whole, distill
from slmdeploy.compress.training import Distiller
from slmdeploy.errors import InputError, OutputExistsError, SpecError, UnsupportedModelError
from slmdeploy.specs import DistillStage, distill_stage

SMALL = {"batch_rows": 4, "length": 64, "save_steps": 1000, "dtype": "fp32", "eval_rows": 8}


def stage(**fields: Any) -> DistillStage:
    return distill_stage(**{"steps": 4, **SMALL, **fields})


def run(teacher: Path, student: Path, data: Path, out: Path, **fields: Any) -> Artifact:
    return distill(teacher, student, out=out, data=data, stage=stage(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": "adamw", "learning_rate": 1e-2, "score_share": 0.5},
        {"optimizer": "muon", "learning_rate": 2e-2, "dtype": "bf16"},
        {"learning_rate": 1e-2, "on_policy": 1.0, "response_tokens": 8, "loss": "reverse_kl"},
        {"learning_rate": 1e-2, "gradient_checkpointing": True, "gradient_accumulation": 2, "loss": "jsd", "beta": 0.5},
    ],
    ids=["adamw-score", "muon-bf16", "on-policy", "checkpointing-accumulation-jsd"],
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
    log = [json.loads(line) for line in (artifact.path / "training_log.jsonl").read_text().splitlines()]
    assert all({"loss", "kd", "ce", "step"} <= set(entry) for entry in log[:-1])
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


def test_a_stage_that_stopped_goes_on_as_if_it_had_not(
    tmp_path: Path, teacher: Path, student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"steps": 6, "save_steps": 2, "optimizer": "muon", "learning_rate": 1e-2, "on_policy": 0.5}
    fields |= {"response_tokens": 4, "score_share": 0.25}
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
        torch.testing.assert_close(tensor, second[name], atol=1e-6, rtol=1e-5, msg=name)


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
    assert _last_whole(tmp_path) == tmp_path / "checkpoint-2"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


@pytest.mark.slow
def test_kill_9_loses_only_what_came_after_the_last_checkpoint(
    tmp_path: Path, teacher: Path, student: Path, data: Path
) -> None:
    out, fields = tmp_path / "out", {"steps": 400, "save_steps": 5}
    code = (
        "import json, sys; from pathlib import Path; from slmdeploy.compress.distill import distill;"
        "from slmdeploy.specs import distill_stage; t, s, d, o, f = sys.argv[1:];"
        "distill(Path(t), Path(s), out=Path(o), data=Path(d), stage=distill_stage(**json.loads(f)))"
    )
    command = [sys.executable, "-c", code, *map(str, (teacher, student, data, out)), json.dumps({**SMALL, **fields})]
    process = subprocess.Popen(command)
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
        return type(parts)(parts.total * float("nan"), parts.kd, parts.ce) if self.state.global_step == 2 else parts

    monkeypatch.setattr(Distiller, "measure", spoilt)
    with pytest.raises(InputError, match=r"the loss is nan at step 3; lower learning_rate = 0\.001"):
        run(teacher, student, data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, checkpoint: Callable[..., Path], teacher: Path, student: Path, data: Path
) -> None:
    other = checkpoint(vocab_size=400)
    with pytest.raises(InputError, match=f"(?s){other}.*400"):
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


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"loss": "kl"}, "loss"),
        ({"loss": "jsd"}, "beta goes with loss = 'jsd'"),
        ({"beta": 0.5}, "beta goes with loss = 'jsd'"),
        ({"ce_share": 1.5}, "ce_share"),
        ({"on_policy": 0.5, "score_share": 1.0}, "on_policy needs rows of text"),
        ({"on_policy": 0.5, "response_tokens": 60}, "response_tokens = 60 leaves too little"),
        ({"warmup": 3}, "warmup"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        stage(**fields)
    assert stage().tokens == 4 * 4 * 64
