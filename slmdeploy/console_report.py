"""What people see of two runs compared: a table of what changed, and how many comparisons stayed as they were.

Knows how things look and nothing of how they come about. rich is imported when something is drawn, because `--help`
must not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmdeploy.console import out_console

if TYPE_CHECKING:
    from slmdeploy.reporting.compare import Comparison

_STYLES = {"regression": "red", "improvement": "green"}


def print_comparison(comparison: Comparison) -> None:
    """The regressions, then the improvements, each the largest first; the rest as counts."""
    from rich.table import Table
    from rich.text import Text

    from slmdeploy.reporting.content import shown_change

    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for name in ("build", "metric", "before", "after", "change", "p", "outcome"):
        table.add_column(name, justify="left" if name in ("build", "metric", "outcome") else "right")
    changed = [*comparison.of("regression"), *comparison.of("improvement")]
    for change in changed:
        shown = shown_change(change)
        cells = [shown[key] for key in ("build", "metric", "before", "after", "change", "p")]
        table.add_row(*map(Text, cells), Text(change.outcome, style=_STYLES[change.outcome]))
    if changed:
        out_console().print(table)
    print(comparison.headline)
    for outcome in ("within noise", "equal", "not testable"):
        print(f"{outcome}: {sum(change.outcome == outcome for change in comparison.changes)}")
    for note in comparison.notes:
        print(note)
