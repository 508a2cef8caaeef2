"""What the tests of export share: a place where checks of model families leave their figures for docs/families.md."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

Record = Callable[..., None]


@pytest.fixture(scope="session")
def record_check() -> Record:
    """`record_check(family, check, value, passed, note="")` appends a line of JSON to the file of FAMILIES_JSON.

    Without that variable nothing is written. benchmarks/families_table.py makes the table of the docs from the lines.
    """
    target = os.environ.get("FAMILIES_JSON")

    def record(family: str, check: str, value: float | None, passed: bool, note: str = "") -> None:
        if target:
            entry = {"family": family, "check": check, "value": value, "passed": bool(passed), "note": note}
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    return record
