"""The results on disk: JSON lines, one for each cell, added as they come; a line that a kill cut short is left out."""

import json
from pathlib import Path
from typing import Any


def append(results: Path, line: dict[str, Any]) -> None:
    """Add one result to a file of JSON lines, behind whatever a kill has left."""
    cut = results.exists() and not results.read_text(encoding="utf-8").endswith("\n")
    with results.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(line) + "\n")


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The results so far, by key."""
    found = {}
    for text in results.read_text(encoding="utf-8").splitlines() if results.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        found[line["key"]] = line
    return found
