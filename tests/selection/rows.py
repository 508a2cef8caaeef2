"""Rows and measurement files for the tests of this room: small, made up, and complete where a file must be."""

import json
from pathlib import Path
from typing import Any

from slmdeploy.selection.rows import Row

FP32 = Row("fp32", {"tpot_ms_p50": 10.0, "size_bytes": 400.0, "auc": 0.90}, precision="fp32", graph="g")
INT8 = Row("int8", {"tpot_ms_p50": 4.0, "size_bytes": 100.0, "auc": 0.89}, precision="int8", graph="g")
INT4 = Row("int4", {"tpot_ms_p50": 2.0, "size_bytes": 60.0, "auc": 0.80}, precision="int4", graph="g")
ROWS = [FP32, INT8, INT4]


def reasons(selection: Any) -> dict[str, str]:
    """The reason of each rejection by build."""
    return {rejection.build: rejection.reason for rejection in selection.rejections}


def entry(build: str, tpot: float = 2.0, **changes: Any) -> dict[str, Any]:
    """A row of a measurement file, with ``changes``."""
    row = {
        "build": build,
        "path": f"builds/{build}",
        "role": "candidate",
        "content_key": None,
        "graph": None,
        "profile": None,
        "precision": "int8",
        "options": {"threads": 2, "spinning": True, "batch": 1},
        "target": None,
        "source": "measured",
        "gates": {"kl": {"value": 0.0, "limit": 0.02, "passed": True}},
        "passed": True,
        "metrics": {"tpot_ms_p50": tpot, "size_bytes": 1},
        "intervals": {},
        "workloads": {},
    }
    return row | changes


def measurement(file: Path, *rows: dict[str, Any], **changes: Any) -> Path:
    """A measurement file of those rows, with ``changes`` at its top."""
    content = {"schema": 2, "slmdeploy": "0.1.0", "target": None, "source": "measured", "rows": list(rows)}
    file.write_text(json.dumps(content | changes), encoding="utf-8")
    return file
