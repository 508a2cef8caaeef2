"""What models write: sampling that repeats, packing, and a file of texts that a killed writer goes on with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmdeploy.compress import responses
from slmdeploy.compress.responses import _until, pack, read_pairs, sample, written_by
from slmdeploy.progress import SILENT
from slmdeploy.specs import DistillStage


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_samples_end_at_the_end_of_text_and_repeat_for_a_seed(student: Path) -> None:
    model = load(student)
    stage = DistillStage(steps=1, on_policy=1.0, response_tokens=6, length=32)
    prompts = [[0, 5, 9], [0, 7], [0, 40, 41, 42, 43]]

    def draw() -> list[list[int]]:
        torch.manual_seed(0)
        return sample(model, prompts, stage)

    answers = draw()
    assert draw() == answers
    assert [0 < len(answer) <= 6 for answer in answers] == [True] * 3
    assert all(1 not in answer[:-1] for answer in answers)
    assert _until([5, 1, 1, 1], {1}) == [5, 1]
    assert _until([5, 6], {1}) == [5, 6]


def test_sampling_does_not_depend_on_what_a_prompt_is_batched_with(student: Path) -> None:
    # Almost greedy, so that the draw is the argmax; left padding must then change nothing.
    model = load(student)
    stage = DistillStage(steps=1, on_policy=1.0, response_tokens=4, length=32, sample_temperature=1e-4)
    short, long = [0, 7], [0, 40, 41, 42, 43]
    assert sample(model, [short, long], stage) == sample(model, [short], stage) + sample(model, [long], stage)


def test_responses_count_and_prompts_do_not() -> None:
    row = pack([([0, 7], [8, 9]), ([0], [4])], 10)
    assert row["input_ids"].tolist() == [0, 7, 8, 9, 0, 4, 0, 0, 0, 0]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3]
    assert (row["weights"] > 0).tolist() == [False, False, True, True, False, True] + [False] * 4
    assert row["weights"].sum().item() == pytest.approx(1)


def test_a_killed_writer_goes_on_and_writes_the_same(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "PROMPTS_AT_ONCE", 2)
    model, stage = load(teacher), DistillStage(steps=1, seq_kd_texts=5, response_tokens=4, length=32)
    asked = [[0, 7 + i] for i in range(5)]
    whole = written_by(model, asked, stage, tmp_path / "whole.jsonl", SILENT)
    assert [prompt for prompt, _ in whole] == asked
    text = (tmp_path / "whole.jsonl").read_text()
    (tmp_path / "cut.jsonl").write_text(text[: len(text) * 3 // 4])  # in the middle of a line and of a batch
    calls: list[int] = []
    monkeypatch.setattr(responses, "sample", lambda m, batch, s: calls.append(len(batch)) or sample(m, batch, s))
    assert written_by(model, asked, stage, tmp_path / "cut.jsonl", SILENT) == whole
    assert 0 < sum(calls) < 5
    assert (tmp_path / "cut.jsonl").read_text() == text
    assert [tuple(pair) for pair in read_pairs(tmp_path / "cut.jsonl")] == whole
    assert written_by(None, asked, stage, tmp_path / "cut.jsonl", SILENT) == whole  # nobody is asked again
