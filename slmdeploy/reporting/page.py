"""The HTML page of a run: one file, no network, from plain data through a template that escapes everything.

Style and script are inlined and named by their hashes in the page's content security policy, so no other script runs
even if text from an artifact should ever get past the escaping. Knows what stands where; what it says is in content.py,
charts.py and commands.py.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmdeploy.reporting import content
from slmdeploy.reporting.charts import sections
from slmdeploy.reporting.commands import commands
from slmdeploy.reporting.compare import LEVEL, Comparison, Outcome
from slmdeploy.reporting.records import Row, Run
from slmdeploy.reporting.svg import legend_mark
from slmdeploy.reporting.wording import share

_HERE = Path(__file__).parent
_PARTS: tuple[tuple[str, Outcome], ...] = (("Regressions", "regression"), ("Improvements", "improvement"))


def render(template: str, heading: str, data: Any, **context: Any) -> str:
    """A page from one of the templates beside this file; ``data`` goes into it as JSON for other programs to read."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from slmdeploy.version import __version__

    css, js = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(
        title=heading,
        version=__version__,
        css=css,
        js=js,
        style_hash=_hash(css),
        script_hash=_hash(js),
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        **context,
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page(run: Run) -> str:
    """The whole page of a run."""
    builds = _builds(run)
    return render(
        "page.html",
        f"{run.name}: slmdeploy report",
        _data(run),
        run=run,
        answer=content.answer(run),
        tiles=content.tiles(run),
        notes=content.notes(run),
        builds=builds,
        judged=[build for build in builds if run.selection and run.selection.candidate(run.rows[build["at"]])],
        verdicts=list(content.verdicts(run)),
        reasons=list(content.reasons(run)),
        sections=sections(run),
        built=content.builds_table(run),
        key_figures=content.key_figures(run),
        all_figures=content.all_figures(run),
        workloads=list(content.workloads(run)),
        stages=list(content.stages(run)),
        environment=content.environment(run),
        commands=commands(run),
    )


def _data(run: Run) -> dict[str, Any]:
    """The exact figures, without the requests that they were made of."""
    kept = {"build", "target", "role", "source", "metrics", "intervals", "noisy"}
    rows = [row.model_dump(include=kept) for row in run.rows]
    return {"name": run.name, "made": run.measurement.made, "rows": rows}


def _builds(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "at": at,
            "series": series,
            "label": label,
            "key": legend_mark(series, row.estimated),
            "picked": bool(run.selection and run.selection.is_chosen(row)),
            "badges": list(_badges(run, row)),
        }
        for at, (series, label, row) in enumerate(zip(run.series, run.labels, run.rows, strict=True))
    ]


def _badges(run: Run, row: Row) -> Iterator[str]:
    if run.selection and run.selection.is_chosen(row):
        yield "selected"
    if row.role == "baseline" and row.build != "baseline":
        yield "baseline"
    if row.estimated:
        yield "estimated"
    if row.noisy:
        yield "noisy"
    if row.unsettled:
        yield "unsettled"


def comparison_page(comparison: Comparison) -> str:
    """The page of two runs compared."""
    parts = [(name, comparison.of(outcome)) for name, outcome in _PARTS]
    rest = [change for change in comparison.changes if change.outcome not in ("regression", "improvement")]
    return render(
        "compare.html",
        "slmdeploy comparison",
        comparison.to_dict(),
        comparison=comparison,
        level=share(LEVEL),
        threshold=share(comparison.threshold),
        parts=[(name, [content.shown_change(change) for change in changes]) for name, changes in parts],
        rest=[content.shown_change(change) for change in rest],
    )
