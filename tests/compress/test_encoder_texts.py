"""The held-out texts of a table as a data folder: none that is trained on, and both kinds as gates read them."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.building.texts import read_pairs
from slmdeploy.compress.encoder_texts import held_out_texts
from slmdeploy.compress.labelled import read_table
from slmdeploy.errors import InputError
from slmdeploy.specs import TextColumns


def table(folder: Path, count: int) -> Path:
    file = folder / "table.jsonl"
    records = [{"text": f"text {i}", "other": f"other {i}", "label": i % 2} for i in range(count)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_single_texts_stand_two_in_a_record(tmp_path: Path) -> None:
    file, columns = table(tmp_path, 100), TextColumns(text="text", label="label")
    made = held_out_texts(file, columns, tmp_path / "out")
    records = read(made.path / "generate.valid.jsonl")
    texts = [text for record in records for text in (record["prompt"], record["completion"])]
    # of five the last has no other behind it, and takes the first
    assert texts == ["text 19", "text 39", "text 59", "text 79", "text 99", "text 19"]
    assert not set(texts) & {record.text for record in read_table(file, columns).train}
    assert made.result == {"records": 3}
    assert len(list(read_pairs(made.path))) == 3


def test_pairs_become_scoring_records(tmp_path: Path) -> None:
    made = held_out_texts(table(tmp_path, 40), TextColumns(text="text", pair="other"), tmp_path / "out")
    assert read(made.path / "score.valid.jsonl")[0] == {"prefix": "text 19", "items": ["other 19"], "labels": [0]}
    assert sorted(read_pairs(made.path)) == [("text 19", "other 19"), ("text 39", "other 39")]


def test_a_table_too_small_to_hold_any_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few records to hold any out: give at least 20"):
        held_out_texts(table(tmp_path, 19), TextColumns(text="text"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
