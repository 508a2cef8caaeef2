"""What people see of an evaluation: a table of the tasks' metrics with their standard errors, and what was cut.

Knows how things look and nothing of how they come about. rich is imported when something is drawn, because `--help`
must not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmdeploy.console import out_console


def print_evaluation(report: Mapping[str, Any]) -> None:
    """One line a metric; a filter that is not the plain one stands behind its name."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for name in ("task", "version", "shots", "metric", "value", "± stderr"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for name, task in report["results"].items():
        for row in task["metrics"]:
            metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
            cells = (name, _shown(task["version"]), _shown(task["fewshot"]), metric)
            table.add_row(*map(Text, cells), _shown(row["value"]), _shown(row["stderr"]))
    out_console().print(table)
    if report["cut_contexts"]:
        limit = report["build"]["max_length"]
        print(f"{report['cut_contexts']} contexts did not fit {limit} tokens and lost their beginning")


def _shown(value: float | str | None) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
