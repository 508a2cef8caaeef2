"""What people see of the command line: progress bars, the table of a measurement, the end of a run, errors.

Bars and colours only on a terminal; into a file or pipe only results and errors are written. Knows how things look and
nothing of how they come about. rich is imported when something is drawn, because `--help` must not wait for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from slmdeploy.console_selection import print_selection
from slmdeploy.metrics import RATIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from slmdeploy.pipeline import Outcome
    from slmdeploy.runtime.encoder_model import Label, TokenLabel
    from slmdeploy.specs import Profile, Target

_FILE_WIDTH = 130
_SHOWN = {
    "bits_per_byte": "bits per byte",
    "auc": "AUC",
    "mrr_at_10": "MRR@10",
    "kl_to_baseline": "KL to baseline (nats)",
    "ttft_ms_p50": "TTFT p50 (ms)",
    "ttft_ms_p99": "TTFT p99 (ms)",
    "tpot_ms_p50": "TPOT p50 (ms)",
    "tpot_ms_p99": "TPOT p99 (ms)",
    "tokens_per_s": "tokens/s",
    "score_ms_p50": "score p50 (ms)",
    "encode_ms_p50": "encode p50 (ms)",
    "score_ms_p99": "score p99 (ms)",
    "items_per_s": "items/s",
    "texts_per_s": "texts/s",
    "load_s": "load (s)",
    "rss_peak_bytes": "peak memory (MB)",
    "size_bytes": "size (MB)",
}


class BarProgress:
    """The Progress protocol as one rich bar on stderr: share, rate, time left; silent when not a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  {task.fields[rate]}  {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = RichProgress(*columns, console=console, disable=not console.is_terminal)
        self._task: Any = None

    def start(self, label: str, total: int | None, unit: str) -> None:
        """Begin a bar; the one before it ends."""
        self.finish()
        self._bar.start()
        self._task = self._bar.add_task(label, total=total, unit=unit, rate="", note="")

    def advance(self, n: int = 1, note: str = "") -> None:
        """Move the bar by ``n`` and show ``note`` until the next one."""
        if self._task is None:
            return
        self._bar.advance(self._task, n)
        speed = self._bar.tasks[self._bar.task_ids.index(self._task)].speed
        unit = str(self._bar.tasks[self._bar.task_ids.index(self._task)].fields["unit"])
        self._bar.update(self._task, rate=f"{speed:,.0f} {unit}/s" if speed else "")
        if note:
            self._bar.update(self._task, note=note)

    def finish(self) -> None:
        """End the bar and leave its last state on the screen."""
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None


def out_console() -> Console:
    """The console for results on stdout."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else _FILE_WIDTH, highlight=False)


def say(text: str) -> None:
    """A line of status for people, on stderr so that stdout holds results alone."""
    print(text, file=sys.stderr)


def print_json(value: Any) -> None:
    """The one JSON object of a ``--json`` command, alone on the last line of stdout."""
    print(json.dumps(value, ensure_ascii=False, default=str))


def print_labels(texts: Sequence[str], labels: Sequence[Label], as_json: bool) -> None:
    """The label of each text with its score, in the order of the texts."""
    if as_json:
        print_json({"labels": [asdict(label) for label in labels]})
        return
    for text, label in zip(texts, labels, strict=True):
        print(f"{label.score:8.3f}  {label.label}  {text}")


def print_token_labels(texts: Sequence[str], labels: Sequence[Sequence[TokenLabel]], as_json: bool) -> None:
    """The label of each token with its score, an empty line behind each text."""
    if as_json:
        print_json({"labels": [[asdict(label) for label in tokens] for tokens in labels]})
        return
    for text, tokens in zip(texts, labels, strict=True):
        for token in tokens:
            print(f"{token.score:8.3f}  {token.label}  {text[token.start : token.end]}")
        print()


def error(message: str) -> None:
    """One sentence on stderr."""
    say(f"error: {message}")


def measurement_table(rows: Sequence[Mapping[str, Any]], chosen: str | None = None) -> Table:
    """Metrics down, builds across; each cell the value and, beside it, its ratio to the baseline's."""
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("metric")
    for row in rows:
        name = str(row["build"]) + (" ◀ selected" if row["build"] == chosen else "")
        table.add_column(name, justify="right", style="bold" if row["build"] == chosen else "")
    for metric, title in _SHOWN.items():
        if any(metric in row["metrics"] for row in rows):
            table.add_row(title, *(_cell(metric, row["metrics"]) for row in rows))
    table.add_row("gates", *(_gates(row) for row in rows))
    return table


def _cell(metric: str, metrics: Mapping[str, float]) -> str:
    value = metrics.get(metric)
    if value is None:
        return "–"
    shown = value / 1e6 if metric.endswith("_bytes") else value
    text = f"{shown:,.0f}" if abs(shown) >= 1000 else f"{shown:.3g}" if abs(shown) < 100 else f"{shown:.0f}"
    ratio = metrics.get(metric + RATIO)
    return text if ratio is None else f"{text}  {_ratio(ratio)}"


def _ratio(ratio: float) -> str:
    return f"×{ratio:.2f}" if 0.1 <= ratio < 10 else f"×{ratio:.0f}" if ratio >= 10 else f"×{ratio:.3f}"


def _gates(row: Mapping[str, Any]) -> str:
    if row["role"] == "baseline":
        return "–"
    failed = [name for name, gate in row["gates"].items() if not gate["passed"]]
    return "pass" if not failed else "fail: " + ", ".join(failed)


def print_outcome(outcome: Outcome) -> None:
    """The end of a run: the table, the choice with its reasons, and the package with what its trial printed."""
    chosen = outcome.selection.chosen if outcome.selection else None
    out_console().print(measurement_table(outcome.rows, chosen))
    baseline = any(row["role"] == "baseline" for row in outcome.rows)
    told = "baseline: the teacher in torch, fp32, eager; ×: ratio to it. " if baseline else ""
    print(f"{told}Gates compare a build with its own fp32 graph.\n")
    if outcome.selection:
        print_selection(outcome.selection)
    if outcome.package and outcome.trial:
        print(f"\npackage: {outcome.package}\n  {outcome.trial['summary']}")
        for label in ("generated", "best item", "embedded", "classified", "label"):
            if label in outcome.trial:
                print(f"  {label}: {outcome.trial[label]!r}")
    if all(step.reused for step in outcome.steps):
        print("\neverything was up to date: nothing was done")


def print_facts(facts: Mapping[str, Any], indent: int = 0) -> None:
    """Nested facts as indented lines: one fact a line, lists of words in one, longer things below their name."""
    width = max((len(str(name)) for name in facts), default=0)
    for name, value in facts.items():
        lead = " " * indent + str(name)
        if isinstance(value, Mapping) and value:
            print(lead)
            print_facts(value, indent + 2)
        elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Mapping) for v in value):
            print(lead)
            for entry in value:
                print(" " * indent + "  - " + ", ".join(f"{k}: {_word(v)}" for k, v in entry.items()))
        else:
            print(f"{lead:<{width + indent}}  {_word(value)}")


def _word(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(part) for part in value)
    return str(value)


def print_specs(specs: Sequence[Target] | Sequence[Profile], as_json: bool) -> None:
    """Name and summary of each, or everything as JSON."""
    if as_json:
        print_json({spec.name: spec.model_dump(mode="json") for spec in specs})
        return
    width = max(len(spec.name) for spec in specs)
    for spec in specs:
        print(f"{spec.name:<{width}}  {spec.summary}")
