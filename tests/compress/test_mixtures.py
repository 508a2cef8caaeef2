"""Mixtures of data: rows by weight, what an artifact depends on, one student for several tasks, and what is refused."""

from itertools import islice
from pathlib import Path

import pytest

from slmdeploy.compress.data import make_texts
from slmdeploy.compress.distill import distill
from slmdeploy.compress.mixtures import open_data, prompts_of
from slmdeploy.compress.packing import mixed_rows
from slmdeploy.errors import InputError, SpecError
from slmdeploy.specs import DistillStage, data_inputs, load_mixture
from tests.compress.conftest import write_lines

MIXTURE = """
[[part]]
data = "fox"
weight = 3
[[part]]
data = "dog.jsonl"
[[part]]
data = "rank"
"""


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    for name in ("fox", "rank"):
        (tmp_path / name).mkdir()
    fox = [{"prompt": "the fox", "completion": " jumps over the lazy dog"}] * 8
    write_lines(tmp_path / "fox" / "generate.train.jsonl", fox)
    write_lines(tmp_path / "fox" / "generate.valid.jsonl", fox)
    write_lines(tmp_path / "dog.jsonl", [{"text": "the lazy dog says yes or no, " * 3}] * 8)
    items = {"prefix": "fox\n", "items": ["the dog", "lazy fox"], "labels": [0, 1]}
    write_lines(tmp_path / "rank" / "score.train.jsonl", [items] * 8)
    (tmp_path / "mix.toml").write_text(MIXTURE)
    return tmp_path / "mix.toml"


def test_rows_are_shared_out_by_weight_within_a_kind(mixture: Path, teacher: Path) -> None:
    sources = open_data(mixture, "train")
    texts = make_texts(teacher, (1,), (" no", " yes"), True)
    found = list(islice(mixed_rows(sources, texts, length=32, score_share=0.5, seed=0), 16))
    assert sum(bool(row["is_text"]) for row in found) == 8
    counts = {Path(name).parent.name: count for name, count in texts.tally.rows_of_parts.items()}
    assert counts == {"fox": 6, mixture.parent.name: 2, "rank": 8}
    prompts = prompts_of(sources["generate"], texts, length=16, count=8, seed=0)
    assert len(prompts) == 6 + 2
    assert set(open_data(mixture, "valid")) == {"generate"}


def test_one_student_learns_all_parts_and_depends_on_them(
    tmp_path: Path, mixture: Path, teacher: Path, student: Path
) -> None:
    stage = DistillStage(steps=4, batch_rows=4, length=32, score_share=0.5, eval_rows=0, dtype="fp32")
    made = distill(teacher, student, out=tmp_path / "out", data=mixture, stage=stage)
    assert sum(made.result["data"]["rows_of_parts"].values()) >= 16  # the loader reads ahead
    assert set(made.manifest["inputs"]) == {"teacher", "student", "data 1", "data 2", "data 3"}
    assert made.plan["weights"] == [3.0, 1.0, 1.0]


def test_what_is_learnt_from_is_told_by_content(mixture: Path, tmp_path: Path) -> None:
    inputs, named = data_inputs(mixture)
    assert inputs == {"data 1": tmp_path / "fox", "data 2": tmp_path / "dog.jsonl", "data 3": tmp_path / "rank"}
    assert named == {"weights": [3.0, 1.0, 1.0]}
    assert data_inputs(tmp_path / "fox") == ({"data": tmp_path / "fox"}, {})
    assert data_inputs("owner/name") == ({}, {"data": "owner/name"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the key 'part' is missing"),
        ("part = []", "part"),
        ('[[part]]\ndata = "x"\nweight = 0', "weight"),
        ('[[part]]\ndata = "x"\nwieght = 1', "did you mean 'weight'"),
        ('[[part]]\ndata = "other.toml"', "is a mixture itself"),
    ],
)
def test_what_is_no_mixture_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mix.toml").write_text(text)
    with pytest.raises(SpecError, match=said):
        load_mixture(tmp_path / "mix.toml")


def test_scoring_records_of_one_label_are_refused(tmp_path: Path, teacher: Path, student: Path) -> None:
    (tmp_path / "d").mkdir()
    records = [{"prefix": "fox\n", "items": ["the dog", "lazy fox"], "labels": [1, 1]}] * 8
    write_lines(tmp_path / "d" / "score.train.jsonl", records)
    stage = DistillStage(steps=1, batch_rows=2, length=32, score_share=1.0)
    with pytest.raises(InputError, match="has scoring records of the label 1 alone: it needs items of both"):
        distill(teacher, student, out=tmp_path / "out", data=tmp_path / "d", stage=stage)
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_not_there_is_named(tmp_path: Path, teacher: Path, student: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml does not exist"):
        distill(teacher, student, out=tmp_path / "out", data=tmp_path / "none.toml", stage=DistillStage(steps=1))
    (tmp_path / "mix.toml").write_text('[[part]]\ndata = "nowhere.jsonl"\n')
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist"):
        open_data(tmp_path / "mix.toml", "train")
