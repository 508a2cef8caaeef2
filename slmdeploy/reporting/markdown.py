"""A run, and two runs compared, as Markdown for a pull request: the answer, the budget, the figures, the rest folded.

Names from artifacts stand in code spans, in which nothing is a tag, a link or a mention; other text is escaped. Knows
Markdown and nothing of what a figure means.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from slmdeploy.reporting.commands import commands
from slmdeploy.reporting.compare import Change, Comparison
from slmdeploy.reporting.content import answer, environment, key_figures, notes, shown_change, verdicts
from slmdeploy.reporting.content import stages as stages_of
from slmdeploy.reporting.records import Run
from slmdeploy.reporting.wording import share

MARK = "<!-- slmdeploy report -->"
_MOST_CHANGES = 40


def code(text: str) -> str:
    """Text as a code span: whatever it holds is shown and not read."""
    return "`" + re.sub(r"\s+", " ", text).replace("`", "'").replace("|", "\\|") + "`"


def prose(text: str) -> str:
    """Text with everything that Markdown or HTML would read escaped."""
    flat = re.sub(r"\s+", " ", text)
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; cells are Markdown already."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def folded(summary: str, lines: Iterable[str]) -> list[str]:
    """Lines behind a summary that opens them."""
    return ["<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>", ""]


def run_text(run: Run) -> str:
    """The report of a run."""
    said = answer(run)
    badge = f" ({said.badge})" if said.badge else ""
    lines = [MARK, f"## {prose(said.headline)}{badge}", "", prose(said.reason), ""]
    lines += [f"- {prose(note)}" for note in (*said.moves, *notes(run))] + [""]
    lines += _budget(run)
    lines += ["### Figures", "", *_figures(run)]
    if run.stages:
        stages = [
            (prose(one["name"]), prose(one["sources"]), code(one["key"][:12]), one["time"]) for one in stages_of(run)
        ]
        lines += folded("Pipeline", table(("stage", "made of", "content key", "time"), stages))
    lines += folded("Environment", [f"- {prose(name)}: {prose(value)}" for name, value in environment(run)])
    shell = [line.replace("`", "'") for line in commands(run)]
    lines += folded("Commands to reproduce", ["```sh", *shell, "```"])
    return "\n".join(lines)


def _budget(run: Run) -> Iterator[str]:
    if run.selection is None:
        return
    judged = [label for label, row in zip(run.labels, run.rows, strict=True) if run.selection.candidate(row)]
    rows = [(code(line["limit"]), *(" ".join(_verdict(cell)) for cell in line["cells"])) for line in verdicts(run)]
    yield from ["### Budget", "", *table(("limit", *map(code, judged)), rows)]
    for label, row in zip(run.labels, run.rows, strict=True):
        if run.selection.candidate(row):
            yield f"- {code(label)}: {prose(run.selection.reason_of(row))}"
    yield ""


def _verdict(cell: Mapping[str, str]) -> tuple[str, ...]:
    return (cell["sign"], cell["result"], cell["shown"]) if cell["result"] else ("–",)


def _figures(run: Run) -> list[str]:
    states = [" (estimated)" if row.estimated else " (noisy)" if row.noisy else "" for row in run.rows]
    heads = [code(label) + state for label, state in zip(run.labels, states, strict=True)]
    rows = [
        (f"{line['title']} ({line['unit']})" if line["unit"] else line["title"], *map(_figure, line["cells"]))
        for group in key_figures(run)
        for line in group
    ]
    return table(("metric", *heads), rows)


def _figure(cell: Mapping[str, str] | None) -> str:
    if cell is None:
        return "–"
    interval = f"({cell['span']})" if cell["span"] else ""
    return " ".join(part for part in (cell["shown"], cell["ratio"], interval) if part)


def comparison_text(comparison: Comparison) -> str:
    """Two runs compared."""
    lines = [MARK, f"## {comparison.headline.capitalize()}", "",
             f"From {code(comparison.before)} to {code(comparison.after)}; a change counts when it is significant "
             f"and above {share(comparison.threshold)}.", ""]  # fmt: skip
    lines += [f"- {prose(note)}" for note in comparison.notes] + [""]
    found = [*comparison.of("regression"), *comparison.of("improvement")]
    if found:
        lines += table(("build", "metric", "before", "after", "change", "p", ""), map(_cells, found[:_MOST_CHANGES]))
    if len(found) > _MOST_CHANGES:
        lines += [f"{len(found) - _MOST_CHANGES} smaller ones are left out.", ""]
    return "\n".join(lines)


def _cells(change: Change) -> list[str]:
    build = change.build + (f"@{change.target}" if change.target else "")
    shown = shown_change(change)
    figures = [shown[key] for key in ("before", "after", "change", "p")]
    return [code(build), code(change.metric), *figures, f"**{change.outcome}**"]
