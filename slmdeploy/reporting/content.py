"""What a report says, without how it is set: the answer, notes, verdicts, tables of figures, settings, changes.

The page and the Markdown both take it from here, so they cannot disagree. A figure comes with its exact value and with
what is shown of it. Knows nothing of HTML or Markdown; charts are in charts.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmdeploy.metrics import METRICS, RATIO
from slmdeploy.reporting.compare import Change
from slmdeploy.reporting.records import Measured, Row, Run, Table, Verdict
from slmdeploy.reporting.wording import GROUPS, amount, base_of, figure, group, number, seconds, span, title, unit
from slmdeploy.specs import parse_constraint

_SIGNS = {"met": "✓", "missed": "✗", "not proven": "?", "not measured": "?"}
_TILES = (
    "score_ms_p50", "tpot_ms_p50", "encode_ms_p50", "tokens_per_s", "items_per_s", "texts_per_s", "auc",
    "bits_per_byte", "accuracy", "rss_peak_bytes", "size_bytes",
)  # fmt: skip
_MOST_TILES = 6
_KEY_PERCENTILES = (None, 50.0, 99.0)
_BADGES = {"regression": "worse", "improvement": "better"}

Groups = list[list[dict[str, Any]]]
"""Lines of a table, in groups."""


@dataclass(frozen=True)
class Answer:
    """What a run comes to. ``badge`` says whether the figures are measured; ``moves`` what would admit a build."""

    headline: str
    reason: str
    badge: str | None = None
    moves: tuple[str, ...] = ()


def answer(run: Run) -> Answer:
    """The choice, or that nothing was feasible and what would have to give, or what was measured."""
    choice, measurement = run.selection, run.measurement
    if choice is None:
        builds = sum(row.role == "candidate" for row in run.rows)
        headline = _on(f"{builds} {'build' if builds == 1 else 'builds'}", measurement.target)
        return Answer(headline, "Nothing was selected: these are figures.", measurement.source)
    if choice.chosen is None:
        moves = (f"Moving {one.constraint} alone to {one.value:g} would admit {_on(one.build, one.target)}."
                 for one in choice.alone)  # fmt: skip
        return Answer("No build meets the budget", _sentence(choice.reason), moves=tuple(moves))
    return Answer(_on(choice.chosen, choice.chosen_target), _sentence(choice.reason), choice.chosen_source)


def _sentence(reason: str) -> str:
    """A reason that stands by itself."""
    return f"{reason[:1].upper()}{reason[1:]}."


def _on(build: str, target: str | None) -> str:
    return f"{build} on {target}" if target else build


def notes(run: Run) -> list[str]:
    """What a reader has to know before trusting a figure: estimates, noise, wide intervals, ties, what is missing."""
    named = list(zip(run.labels, run.rows, strict=True))
    noisy = [label for label, row in named if row.noisy]
    estimated = [label for label, row in named if row.estimated]
    found = []
    if estimated:
        bases = dict.fromkeys(row.basis for row in run.rows if row.estimated and row.basis)
        found.append(" ".join([f"Estimated, not measured: {', '.join(estimated)}.", *bases]))
    if noisy:
        found.append(
            f"Noisy: while {', '.join(noisy)} ran, the machine was not steady. Measure again before relying on it."
        )
    unsettled = [f"{label} in {', '.join(row.unsettled)}" for label, row in named if row.unsettled]
    if unsettled:
        found.append(f"Not settled: {'; '.join(unsettled)}. Time ran out before the interval was narrow enough.")
    if run.selection and run.selection.ties:
        tied = ", ".join(pair.build for pair in run.selection.ties)
        found.append(f"Tied with the choice within noise: {tied}.")
    return [*found, *run.left_out]


def tiles(run: Run) -> list[dict[str, Any]]:
    """The figures of the chosen build that a reader asks for first."""
    found = []
    for at, row in enumerate(run.rows):
        if run.selection and run.selection.is_chosen(row):
            for metric in [name for name in _TILES if name in row.metrics][:_MOST_TILES]:
                value, ratio = row.metrics[metric], row.metrics.get(metric + RATIO)
                note = compared(metric, ratio) if ratio else ""
                found.append({"at": at, "metric": metric, "title": title(metric), "exact": repr(value),
                              "shown": amount(metric, value), "note": note})  # fmt: skip
    return found


def compared(metric: str, ratio: float) -> str:
    """A ratio to the baseline as people say it: "23× faster than the baseline", "+5.2 % against the baseline"."""
    kinds = {"Latency": ("faster", "slower"), "Throughput": ("faster", "slower")}
    kinds[GROUPS[2]] = ("smaller", "larger")
    words = kinds.get(group(metric))
    if words is None or 0.9 < ratio < 1.1:
        return f"{100 * (ratio - 1):+.1f} % against the baseline"
    low = METRICS[metric].better == "lower"
    times = 1 / ratio if ratio < 1 else ratio
    return f"{times:.3g}× {words[0] if (ratio < 1) == low else words[1]} than the baseline"


def verdicts(run: Run) -> Iterator[dict[str, Any]]:
    """A line for each limit, a cell for each row that was judged: an empty one if the limit is for another target."""
    if run.selection is None:
        return
    judged = [(at, one) for at, row in enumerate(run.rows) if (one := run.selection.candidate(row))]
    for limit in run.selection.budget:
        metric = parse_constraint(limit).metric
        found = [(at, next((v for v in one.verdicts if v.constraint == limit), None)) for at, one in judged]
        yield {"limit": limit, "cells": [{"at": at, **_verdict(metric, verdict)} for at, verdict in found]}


def _verdict(metric: str, verdict: Verdict | None) -> dict[str, str]:
    if verdict is None:
        return {"result": ""}
    shown = amount(metric, verdict.value) if verdict.value is not None else ""
    if verdict.result == "not proven" and verdict.end is not None:
        shown += f", reaches {amount(metric, verdict.end)}"
    return {"result": verdict.result, "sign": _SIGNS[verdict.result], "shown": shown}


def reasons(run: Run) -> Iterator[dict[str, Any]]:
    """Each row that was judged, with why it was chosen or not."""
    for at, (label, row) in enumerate(zip(run.labels, run.rows, strict=True)):
        judged = run.selection.candidate(row) if run.selection else None
        if run.selection and judged:
            yield {"at": at, "label": label, "why": run.selection.reason_of(row), "front": judged.on_front}


def all_figures(run: Run) -> Groups:
    """Every metric that a row has, without those of single workloads."""
    return _figures([row.metrics for row in run.rows], [row.intervals for row in run.rows])


def key_figures(run: Run) -> Groups:
    """The figures that a reader starts from: of latencies the median and the 99th percentile, of the rest all."""
    return [
        kept
        for part in all_figures(run)
        if (kept := [line for line in part if base_of(line["metric"])[1] in _KEY_PERCENTILES])
    ]


def _figures(
    metrics: Sequence[Mapping[str, float]],
    intervals: Sequence[Mapping[str, tuple[float, float]]],
) -> Groups:
    """The lines of a table in its groups: one for each metric that any row has, a cell for each row."""
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in GROUPS}
    for name, metric in METRICS.items():
        if any(name in row for row in metrics):
            cells = [_cell(name, *row) for row in zip(metrics, intervals, strict=True)]
            line = {"metric": name, "title": title(name), "unit": unit(name), "definition": metric.definition}
            parts[group(name)].append({**line, "cells": cells})
    return [lines for lines in parts.values() if lines]


def _cell(name: str, metrics: Mapping[str, float], intervals: Mapping[str, Any]) -> dict[str, str] | None:
    if name not in metrics:
        return None
    ratio = metrics.get(name + RATIO)
    return {
        "exact": repr(metrics[name]),
        "shown": figure(name, metrics[name]),
        "span": span(name, intervals.get(name)),
        "ratio": f"×{number(ratio)}" if ratio is not None and ratio != 1 else "",
    }


def workloads(run: Run) -> Iterator[dict[str, Any]]:
    """The tables of each workload's own figures."""
    names = dict.fromkeys(name for row in run.rows for name in row.workloads)
    for name in names:
        found = [row.workloads.get(name) for row in run.rows]
        metrics = [one.metrics if one else {} for one in found]
        groups = _figures(metrics, [one.intervals if one else {} for one in found])
        if groups:
            yield {"name": name, "about": _about([one for one in found if one]), "groups": groups}


def _about(found: Sequence[Measured]) -> str:
    first, counts = found[0], [one.requests for one in found]
    many = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{first.task}, {first.scenario}{', hot' if first.hot else ''}, {many} requests"


def stages(run: Run) -> Iterator[dict[str, Any]]:
    """The stages of a run as words."""
    for stage in run.stages:
        time = "kept" if stage.reused else seconds(stage.seconds)
        sources = ", ".join(stage.sources)
        yield {"name": stage.name, "sources": sources, "key": stage.key, "time": time, "plan": facts(stage.plan)}


def environment(run: Run) -> list[tuple[str, str]]:
    """The machine that measured, as names and values."""
    found = run.measurement
    if found.machine is None:
        return []
    own = {"threads": found.threads, "target": found.target or "none matches"}
    return facts({**found.machine, **found.surroundings, **own})


def builds_table(run: Run) -> Table:
    """How each row runs: precision, session options, gates, and the key of the build that was measured."""
    rows = [
        (label, row.precision, ", ".join(f"{name} {_word(value)}" for name, value in row.options.items()) or "–",
         _gates(row), (row.content_key or "–")[:12])
        for label, row in zip(run.labels, run.rows, strict=True)
    ]  # fmt: skip
    return Table(("build", "precision", "session", "gates", "content key"), tuple(rows))


def _gates(row: Row) -> str:
    failed = [name for name, gate in row.gates.items() if not gate.passed]
    if failed or not row.passed:
        return f"failed: {', '.join(failed) or 'passed'}"
    return f"all {len(row.gates)} passed" if row.gates else "none"


def facts(nested: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested settings as flat names and values; what is empty is left out."""
    found: list[tuple[str, str]] = []
    for name, value in nested.items():
        if isinstance(value, Mapping):
            found += facts(value, f"{above}{name} ")
        elif value not in (None, [], ""):
            found.append((above + name, _word(value)))
    return found


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_word(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_word(part)}" for name, part in value.items() if part is not None)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shown_change(change: Change) -> dict[str, str]:
    """A change as words: both values, the change in percent, p, and the exact values beside them."""
    workload = change.metric.removesuffix(change.name).rstrip(":")
    return {
        "build": change.build + (f"@{change.target}" if change.target else ""),
        "metric": change.metric,
        "title": title(change.name) + (f", {workload}" if workload else ""),
        "before": amount(change.name, change.before),
        "after": amount(change.name, change.after),
        "exact_before": repr(change.before),
        "exact_after": repr(change.after),
        "change": "from 0" if change.change is None else f"{100 * change.change:+.1f} %",
        "p": "–" if change.p is None else "< 1e-6" if change.p < 1e-6 else f"{change.p:.2g}",
        "outcome": change.outcome,
        "badge": _BADGES.get(change.outcome, "measured"),
    }
