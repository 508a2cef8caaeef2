"""The teacher kept on disk: equal to the live one, written once, gone on with after a kill, refused when damaged."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmdeploy.compress import teachers
from slmdeploy.compress.chunked import Positions, chunked_loss
from slmdeploy.compress.data import make_texts, open_sources
from slmdeploy.compress.distill import distill
from slmdeploy.compress.losses import Objective
from slmdeploy.compress.packing import mixed_rows
from slmdeploy.compress.teachers import CachedTeacher, CachePlan, LiveTeacher, Row, keep
from slmdeploy.errors import CorruptArtifactError
from slmdeploy.progress import SILENT
from slmdeploy.specs import DistillStage

LABELS = (" no", " yes")


def live(path: Path) -> LiveTeacher:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    return LiveTeacher(model, model.lm_head.weight)


def batch(rows: list[Row]) -> tuple[Row, torch.Tensor]:
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return stacked, stacked["weights"][:, 1:] > 0


@pytest.fixture
def drawn(data: Path, teacher: Path) -> tuple[list[Row], tuple[int, int]]:
    texts = make_texts(teacher, (1,), LABELS, True)
    stream = mixed_rows(open_sources(data, "train"), texts, length=64, score_share=0.5, seed=0)
    assert texts.label_ids is not None
    return list(islice(stream, 5)), texts.label_ids


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_kept_gives_the_live_teachers_loss_and_margins(
    tmp_path: Path, teacher: Path, student: Path, drawn: Any, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(teachers, "SHARD_ROWS", 2)
    rows, label_ids = drawn
    model, objective = live(teacher), Objective(temperature=temperature, ce_share=0.2)
    vocabulary = len(model.head)
    found: dict[int, tuple[torch.Tensor, ...]] = {}
    for top in (vocabulary, 64, 8):
        plan = CachePlan(5, top, temperature, label_ids)
        keep(tmp_path / str(top), iter(rows), model, plan, 2, SILENT)
        cached = CachedTeacher(tmp_path / str(top), plan)
        taken, counted = batch(list(islice(cached.rows(seed=1), 4)))
        learner = live(student)
        hidden = learner.look(taken, counted).hidden.clone().requires_grad_()
        weights = taken["weights"][:, 1:][counted]
        at = Positions(hidden, taken["input_ids"][:, 1:][counted], weights)
        for side in (model.look(taken, counted), cached.look(taken, counted)):
            parts = chunked_loss(at, learner.head, side, objective, torch.float32)
            (slope,) = torch.autograd.grad(parts.total, hidden)
            margins = side.margins(torch.ones(len(hidden), dtype=torch.bool), label_ids)
            found[top] = (*found.get(top, ()), parts.kd.detach(), slope, margins)
    for top, (kd, slope, margins, kept_kd, kept_slope, kept_margins) in found.items():
        torch.testing.assert_close(kept_margins, margins)
        if top == vocabulary:
            torch.testing.assert_close(kept_kd, kd, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(kept_slope, slope, atol=1e-6, rtol=1e-5)
        else:
            assert 0 < kept_kd < kd
    assert found[8][3] < found[64][3]


def test_passes_hold_every_row_once_in_orders_that_a_seed_repeats(tmp_path: Path, teacher: Path, drawn: Any) -> None:
    rows, label_ids = drawn
    plan = CachePlan(5, 4, 1.0, label_ids)
    keep(tmp_path, iter(rows), live(teacher), plan, 2, SILENT)
    cached = CachedTeacher(tmp_path, plan)
    numbers = [[int(row["number"]) for row in islice(cached.rows(seed), 15)] for seed in (3, 3, 4)]
    assert numbers[0] == numbers[1] != numbers[2]
    assert [sorted(numbers[0][i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    for row in islice(cached.rows(0), 5):
        assert all(torch.equal(row[name], rows[int(row["number"])][name]) for name in teachers.KEPT)


def test_a_killed_teacher_goes_on_at_the_first_missing_shard(
    tmp_path: Path, teacher: Path, drawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "SHARD_ROWS", 2)
    rows, label_ids = drawn
    plan, looked = CachePlan(5, 4, 1.0, label_ids), 0
    look = LiveTeacher.look

    def dies_at_the_second_shard(self: LiveTeacher, row: Row, counted: torch.Tensor) -> Any:
        nonlocal looked
        looked += 1
        if looked == 2:
            raise KeyboardInterrupt
        return look(self, row, counted)

    monkeypatch.setattr(LiveTeacher, "look", dies_at_the_second_shard)
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path / "cut", iter(rows), live(teacher), plan, 2, SILENT)
    assert len(list((tmp_path / "cut").iterdir())) == 1
    for folder in ("cut", "whole"):
        keep(tmp_path / folder, iter(rows), live(teacher), plan, 2, SILENT)
    assert looked == 2 + 2 + 3
    files = [{file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("cut", "whole")]
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_a_damaged_shard_is_named(tmp_path: Path, teacher: Path, drawn: Any) -> None:
    rows, label_ids = drawn
    plan = CachePlan(5, 4, 1.0, label_ids)
    keep(tmp_path, iter(rows), live(teacher), plan, 2, SILENT)
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CorruptArtifactError, match=r"rows-00000000\.safetensors is no shard .* delete its folder"):
        CachedTeacher(tmp_path, plan)


def test_a_second_stage_finds_the_cache_and_another_temperature_does_not(
    tmp_path: Path, teacher: Path, student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    kept = teachers._kept
    monkeypatch.setattr(teachers, "_kept", lambda *a: calls.append(1) or kept(*a))
    common: dict[str, Any] = {"steps": 1, "batch_rows": 4, "length": 64, "dtype": "fp32", "eval_rows": 0}
    for name, fields, expected in (
        ("a", {"learning_rate": 1e-3}, 2),
        ("b", {"learning_rate": 1e-4}, 2),
        ("c", {"temperature": 2.0}, 4),
    ):
        stage = DistillStage(**common, cached_rows=8, **fields)
        distill(teacher, student, out=tmp_path / name, data=data, stage=stage, cache=tmp_path / "cache")
        assert len(calls) == expected
    assert len(list((tmp_path / "cache").iterdir())) == 2
