"""Tables of texts: every format alike, classes in order, what is held out."""

import json
from pathlib import Path

import pytest

from slmdeploy.compress.labelled import Record, Table, labels_of, read_table
from slmdeploy.errors import InputError
from slmdeploy.specs import TextColumns

COLUMNS = TextColumns(text="t", label="l")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_formats_say_the_same(tmp_path: Path, name: str) -> None:
    rows = [("the cat, sat", 1), ("where", 0)] * 20
    if name.endswith("jsonl"):
        lines = [json.dumps({"t": text, "l": label}) for text, label in rows]
    else:
        mark = "," if name.endswith("csv") else "\t"
        lines = [f"t{mark}l", *(f'"{text}"{mark}{label}' for text, label in rows)]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    table = read_table(tmp_path / name, COLUMNS)
    assert (len(table.train), len(table.valid)) == (38, 2)
    assert table.train[:2] == [Record("the cat, sat", None, 1), Record("where", None, 0)]
    assert table.valid == [Record("where", None, 0)] * 2


def test_a_folder_has_a_part_to_measure_on(tmp_path: Path) -> None:
    for split, count in (("train", 30), ("valid", 3)):
        (tmp_path / f"{split}.csv").write_text("t,l\n" + "the cat,a\n" * count)
    table = read_table(tmp_path, COLUMNS)
    assert (len(table.train), len(table.valid)) == (30, 3)
    (tmp_path / "train.csv").rename(tmp_path / "test.csv")
    with pytest.raises(InputError, match="holds no train"):
        read_table(tmp_path, COLUMNS)


@pytest.mark.parametrize(
    ("found", "names"),
    [(("b", "a"), ("a", "b")), ((10, 2, 1), ("1", "2", "10")), ((1.0, 0.0), ("0", "1")), ((0.5, 1.0), ())],
)
def test_classes_are_named_in_order(found: tuple[str | int | float, ...], names: tuple[str, ...]) -> None:
    records = [Record("x", None, label) for label in found]
    labels = labels_of(Table("t", records, []))
    assert labels.names == names
    expected = [0.5, 1.0] if not names else [names.index(str(label).removesuffix(".0")) for label in found]
    assert [labels.target(record, "t") for record in records] == expected


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing does not exist: give a file of"):
        read_table(tmp_path / "nothing", COLUMNS)
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(InputError, match="is of a kind that is not read"):
        read_table(tmp_path / "a.xlsx", COLUMNS)


def test_texts_of_a_csv_are_taken_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("t,p,l\n12,NA,1\nnull,3.5,0\n")
    table = read_table(tmp_path / "a.csv", TextColumns(text="t", pair="p", label="l"))
    assert table.train == [Record("12", "NA", 1), Record("null", "3.5", 0)]
    assert read_table(tmp_path / "a.csv", TextColumns(text="t")).train[0] == Record("12", None, None)


@pytest.mark.parametrize("missing", ["", "NA", "nan"])
def test_a_missing_label_is_told_of_with_its_record(tmp_path: Path, missing: str) -> None:
    (tmp_path / "a.csv").write_text(f"t,l\nthe cat,1\nwhere,{missing}\n")
    with pytest.raises(InputError, match="record 2 has no label in 'l'"):
        read_table(tmp_path / "a.csv", COLUMNS)
    (tmp_path / "a.jsonl").write_text('{"t": "the cat", "l": ""}\n')
    with pytest.raises(InputError, match="record 1 has no label in 'l'"):
        read_table(tmp_path / "a.jsonl", COLUMNS)


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "reviews [1]*"
    folder.mkdir()
    (folder / "train.csv").write_text("t,l\nthe cat,1\nwhere,0\n")
    assert len(read_table(folder, COLUMNS).train) == 2
