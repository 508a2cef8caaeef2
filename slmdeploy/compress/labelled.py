"""Tables of texts with labels, read through `datasets`: csv, jsonl, json or parquet, a file or train.* and valid.*.

A record is a text, perhaps what it is paired with, and perhaps a label. Labels are classes, of any words or whole
numbers, or scores between 0 and 1 where some number is not whole. Of a single file every 20th record is held out to
measure on. Knows nothing of models and tokens.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset

from slmdeploy.compress.data import UNREADABLE
from slmdeploy.errors import InputError
from slmdeploy.specs import TextColumns

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HELD_OUT = 20
MISSING = ("", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")
"""What stands in a .csv where there is no label."""


@dataclass(frozen=True)
class Record:
    """A text, the text it is paired with, and its label as the table has it."""

    text: str
    pair: str | None
    label: str | int | float | None


@dataclass(frozen=True)
class Table:
    """What is trained on and what is measured on."""

    name: str
    train: list[Record]
    valid: list[Record]


def read_table(data: Path, columns: TextColumns) -> Table:
    """The table at ``data``. Raises InputError for what is not there, cannot be read, is empty or lacks a column."""
    if data.is_dir():
        train, valid = (_file(data, split) for split in ("train", "valid"))
        if train is None:
            raise InputError(f"{data} holds no train{'|'.join(FORMATS)}: add one, or name a file")
        if valid is not None:
            return Table(str(data), _records(train, columns), _records(valid, columns))
        data = train
    if not data.is_file():
        raise InputError(
            f"{data} does not exist: give a file of {', '.join(FORMATS)}, or a folder with train and valid"
        )
    records = _records(data, columns)
    valid_records = records[HELD_OUT - 1 :: HELD_OUT]
    return Table(str(data), [r for i, r in enumerate(records) if i % HELD_OUT != HELD_OUT - 1], valid_records)


def _file(folder: Path, split: str) -> Path | None:
    return next((file for suffix in FORMATS if (file := folder / f"{split}{suffix}").is_file()), None)


def _records(file: Path, columns: TextColumns) -> list[Record]:
    if file.suffix not in FORMATS:
        raise InputError(f"{file} is of a kind that is not read: use one of {', '.join(FORMATS)}")
    rows = list(_rows(file, columns))  # read to the end, since a reader that is left keeps its file open
    found = [_record(file, number, row, columns) for number, row in enumerate(rows, start=1)]
    if not found:
        raise InputError(f"{file} is empty: it needs at least one record")
    return found


def _rows(file: Path, columns: TextColumns) -> Iterator[dict[str, Any]]:
    """Rows as a stream, which writes no cache."""
    kind, options = FORMATS[file.suffix], _as_text(columns) if FORMATS[file.suffix] == "csv" else {}
    if file.suffix == ".tsv":
        options["sep"] = "\t"
    try:
        # escaped, since a name with [ or * would be taken for a pattern
        yield from load_dataset(kind, data_files=glob.escape(str(file)), split="train", streaming=True, **options)
    except StopIteration:
        return
    except UNREADABLE as error:
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _as_text(columns: TextColumns) -> dict[str, Any]:
    """What makes the reader of csv leave texts as they stand: 12 is no number there, and NA is a word."""
    texts = [name for name in (columns.text, columns.pair) if name is not None]
    missing = {} if columns.label is None else {columns.label: list(MISSING)}
    return {"converters": dict.fromkeys(texts, str), "keep_default_na": False, "na_values": missing}


def _record(file: Path, number: int, row: dict[str, Any], columns: TextColumns) -> Record:
    for name in (columns.text, columns.pair, columns.label):
        if name is not None and name not in row:
            raise InputError(f"{file} has no column {name!r}: it has {', '.join(sorted(row))}")
    texts = [row[name] for name in (columns.text, columns.pair) if name is not None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f"{file}: record {number} has no text in {columns.text!r} or its pair: fill it or remove it")
    label = None if columns.label is None else row[columns.label]
    if columns.label is not None and (not isinstance(label, str | int | float) or label != label or label == ""):
        raise InputError(f"{file}: record {number} has no label in {columns.label!r}: fill it or remove the record")
    return Record(texts[0], texts[1] if len(texts) > 1 else None, label)


@dataclass(frozen=True)
class Labels:
    """What labels mean: ``names`` of the classes in order, or none where a label is a score between 0 and 1."""

    names: tuple[str, ...]

    @property
    def are_scores(self) -> bool:
        """Whether a label is a number to be met, and no class."""
        return not self.names

    def target(self, record: Record, name: str) -> float:
        """The number of the record's class, or its score. Raises InputError for a label that is not known."""
        if self.are_scores:
            if isinstance(record.label, str) or record.label is None or not 0 <= record.label <= 1:
                raise InputError(f"{name}: label {record.label!r} is no score between 0 and 1")
            return float(record.label)
        if (name_of := class_name(record.label)) in self.names:
            return self.names.index(name_of)
        # a model whose classes have names of its own may still be given their numbers
        if isinstance(record.label, int) and 0 <= record.label < len(self.names):
            return record.label
        raise InputError(f"{name}: label {record.label!r} is none of the model's: {', '.join(self.names)}")


def labels_of(table: Table) -> Labels:
    """The classes of a table, in order of their numbers or names; scores where some label is not whole.

    Raises InputError where all records have one label, from which nothing can be learnt.
    """
    found = {record.label for record in table.train}
    if len(found) < 2:
        raise InputError(f"{table.name} has only the label {next(iter(found))!r}: it needs at least two")
    if any(isinstance(label, float) and not label.is_integer() for label in found):
        return Labels(())
    numbers = all(not isinstance(label, str) for label in found)
    ordered = sorted(found, key=lambda label: (float(label) if numbers else 0.0, str(label)))  # type: ignore[arg-type]
    return Labels(tuple(class_name(label) for label in ordered))


def class_name(label: str | int | float | None) -> str:
    """A class as a model names it: whole numbers without a point, as which some tables have them."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
