"""The table of families and checks in docs/families.md, from the results of the tests: `make families`.

    FAMILIES_JSON=work/families.jsonl python -m pytest tests/exporting -m "slow or not slow"
    python benchmarks/families_table.py work/families.jsonl docs/families.md

Each line of the file is a check that a test has recorded: family, check, value, passed, note. A row of the table is a
family, with its worst figure over all variants; a check that did not run has no figure, one that failed says so.
"""

import argparse
import json
import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

COLUMNS = ("prefill", "128 decode steps", "padded batch", "chunked prefill", "scores packed", "portable 21", "23", "24")
"""The decoders' columns; `_column` says which check belongs to which."""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="docs/families.md from recorded checks")
    parser.add_argument("records", type=Path, nargs="+", help="files of JSON lines, one for each transformers version")
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    records = [json.loads(line) for file in options.records for line in file.read_text(encoding="utf-8").splitlines()]
    options.page.write_text(page(records), encoding="utf-8")


def page(records: list[dict[str, Any]]) -> str:
    """The whole page as text."""
    decoders = [record for record in records if "|" in record["family"]]
    others = [record for record in records if "|" not in record["family"]]
    return "\n".join([*_head(), *_decoder_table(decoders), *_other_tables(others), ""])


def _head() -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "onnxruntime", "onnx"))
    return [
        "# Model families and how each was checked",
        "",
        "Written by `make families` from what tests have recorded. A figure is the largest difference",
        "of logits (or vectors) from transformers in float32, relative to the largest where that is above 1; the worst",
        "over all variants of the family (tests/exporting/families.py: GQA, MQA and MHA, biases, tied heads, windows,",
        "scaled rotary embedding, …). The limit is 1e-4. Empty: the check does not apply or was not run.",
        f"Written on {platform.machine()}, Python {platform.python_version()}: {packages}.",
        "",
    ]


def _column(check: str) -> str | None:
    if check.startswith("portable "):
        return f"portable {check[9:11]}" if check[9:11] == "21" else check[9:11]
    words = {
        "decode steps": "128 decode steps",
        "padded batch": "padded batch",
        "chunked": "chunked prefill",
        "packed": "scores packed",
    }
    return next((column for word, column in words.items() if word in check), "prefill")


def _decoder_table(records: list[dict[str, Any]]) -> list[str]:
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    failed: set[tuple[str, str]] = set()
    variants: dict[str, set[str]] = defaultdict(set)
    for record in records:
        family, variant = record["family"].split("|")
        column = _column(record["check"])
        variants[family].add(variant)
        if column is None or record["value"] is None:
            continue
        worst[family][column] = max(worst[family].get(column, 0.0), record["value"])
        if not record["passed"]:
            failed.add((family, column))
    lines = [
        "## Decoders, built from their weights",
        f"| family | variants | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for family, found in worst.items():
        cells = [_cell(found.get(column), (family, column) in failed) for column in COLUMNS]
        lines.append(f"| {family} | {len(variants[family])} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(value: float | None, failed: bool) -> str:
    if value is None:
        return ""
    return f"**{value:.0e} failed**" if failed else f"{value:.0e}"


def _other_tables(records: list[dict[str, Any]]) -> list[str]:
    """Real shapes and the fallback, a line for each check; encoders, a column for each task. The last run counts."""
    latest = list({(record["family"], record["check"]): record for record in records}.values())
    lines = []
    for title, kind in (("Real shapes, random weights", "shape"), ("Other decoders, by the fallback", "fallback")):
        chosen = [record for record in latest if _kind(record) == kind]
        if chosen:
            lines += [f"## {title}", "| model | check | difference | outcome | note |", "|---|---|---|---|---|"]
            lines += [_line(record) for record in chosen] + [""]
    return lines + _encoder_table([record for record in latest if _kind(record) == "encoder"])


def _encoder_table(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return []
    checks = list(dict.fromkeys(record["check"] for record in records))
    found = {(record["family"], record["check"]): record for record in records}
    lines = [
        "## Encoders and classifiers, traced",
        "Two figures: dialect ort, with fused operators where a star stands, and portable.",
        "",
    ]
    tasks = list(dict.fromkeys(check.rpartition(", ")[0] or check for check in checks))
    lines += [f"| model | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for family in dict.fromkeys(record["family"] for record in records):
        cells = [_pair(found, family, task) for task in tasks]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return [*lines, ""]


def _pair(found: dict[tuple[str, str], dict[str, Any]], family: str, task: str) -> str:
    checks = [found.get((family, name)) for name in (f"{task}, ort", f"{task}, portable", task)]
    cells = []
    for record in checks:
        if record is not None:
            star = "" if record["note"].startswith("none") else "\\*"
            cells.append(_cell(record["value"], not record["passed"]) + star)
    return ", ".join(cells)


def _kind(record: dict[str, Any]) -> str:
    if record["family"].startswith("shape: "):
        return "shape"
    return "fallback" if record["check"] == "fallback" else "encoder"


def _line(record: dict[str, Any]) -> str:
    value = "" if record["value"] is None else f"{record['value']:.1e}"
    refused = not record["passed"] and record["note"].startswith("refused: ")
    outcome = "passed" if record["passed"] else "refused" if refused else "**failed**"
    note = record["note"].removeprefix("refused: ").replace("|", "/")
    return f"| {record['family'].removeprefix('shape: ')} | {record['check']} | {value} | {outcome} | {note} |"


if __name__ == "__main__":
    main()
