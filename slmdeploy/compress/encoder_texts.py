"""What a build's gates and a package's trial read of an encoder's table: its held-out texts as a data folder.

Pairs become scoring records, whose item is what the text is paired with; of single texts two stand in one record, since
a record of the data folder has two sides (docs/data.md). Knows nothing of models.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.compress.labelled import Record, read_table
from slmdeploy.errors import InputError
from slmdeploy.specs import TextColumns

MOST = 256
"""Records: more than any gate reads."""


def held_out_texts(data: Path, columns: TextColumns, out: Path, *, force: bool = False) -> Artifact:
    """Write texts of ``data`` that nobody trained on at ``out``, as a data artifact with a split valid."""
    plan = {"verb": "held-out texts", "columns": columns.model_dump()}
    with writing(out, kind="data", plan=plan, inputs={"data": data}, force=force) as draft:
        records = read_table(data, columns).valid[: 2 * MOST]
        lines = list(_pairs(records) if columns.pair else _texts(records))
        if not lines:
            raise InputError(f"{data} has too few records to hold any out: give at least 20, or a file valid.* too")
        task = "score" if columns.pair else "generate"
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (draft.path / f"{task}.valid.jsonl").write_text(content, encoding="utf-8")
        draft.result = {"records": len(lines)}
    return open_artifact(out, "data")


def _pairs(records: list[Record]) -> Iterator[dict[str, Any]]:
    for record in records:
        # the label says nothing of relevance, which nobody asks of these records
        yield {"prefix": record.text, "items": [record.pair], "labels": [0]}


def _texts(records: list[Record]) -> Iterator[dict[str, Any]]:
    for first, second in zip(records[::2], [*records[1::2], records[0]] if records else [], strict=False):
        yield {"prompt": first.text, "completion": second.text}
