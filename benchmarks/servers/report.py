"""From the lines of the journal to results, and from results to docs/serving-performance.md.

Turns of all rounds are pooled, so percentiles and their intervals are the profiler's own. Two servers are compared at
equal p99: the highest throughput at which the 99th percentile of a request's time is within a limit that is the same
for all, namely LIMIT times the shortest median that any of them has at the lowest rate. Pure functions of data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.servers.catalogue import ServerRow
from slmdeploy.profiling.summary import Turn, summarise
from slmdeploy.specs import named_workload

Line = dict[str, Any]
LIMIT = 3.0
WHOLE = {"generate": "e2e_ms", "score": "score_ms"}
RATE = {"generate": "tokens_per_s", "score": "items_per_s"}
_SHOWN = {
    "generate": ("tokens_per_s", "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99", "e2e_ms_p99"),
    "score": ("items_per_s", "score_ms_p50", "score_ms_p99"),
}
_TITLES = {
    "tokens_per_s": "tokens/s", "items_per_s": "items/s",
    "ttft_ms_p50": "TTFT p50 (ms)", "ttft_ms_p99": "TTFT p99 (ms)",
    "tpot_ms_p50": "TPOT p50 (ms)", "tpot_ms_p99": "TPOT p99 (ms)", "e2e_ms_p99": "E2E p99 (ms)",
    "score_ms_p50": "p50 (ms)", "score_ms_p99": "p99 (ms)",
}  # fmt: skip


def results_of(lines: Sequence[Line], rows: Sequence[ServerRow], about: Mapping[str, Any]) -> dict[str, Any]:
    """The committed results: about (machine, commit, date), servers, and a cell per server, model and workload."""
    newest = {(line["engine"], line["model"]): line["version"] for line in lines}
    cells: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        if newest[line["engine"], line["model"]] == line["version"]:
            cells.setdefault((line["engine"], line["model"], line["case"]), []).append(line)
    names = {name for name, _, _ in cells}
    return {
        "format": 1,
        **about,
        "servers": {row.name: {"note": row.note, "ours": row.is_ours} for row in rows if row.name in names},
        "cells": [_cell(*key, found) for key, found in cells.items()],
    }


def _cell(engine: str, model: str, case: str, lines: Sequence[Line]) -> dict[str, Any]:
    """One server under one workload: pooled over rounds; or why there is nothing."""
    key = {"engine": engine, "model": model, "case": case}
    measured = [line for line in lines if "turn" in line]
    if not measured:
        return key | {"reason": next((line[why] for line in lines for why in ("failed", "skipped") if why in line), "")}
    outcome = summarise(named_workload(case), [Turn(**line["turn"]) for line in measured], name=engine)
    return key | {
        "rounds": len(measured),
        "requests": outcome.requests,
        "unanswered": outcome.unanswered,
        "failures": sorted({reason for line in measured for reason in line["failures"]}),
        "metrics": {name: round(value, 4) for name, value in outcome.metrics.items()},
        "intervals": {name: [round(end, 4) for end in ends] for name, ends in outcome.intervals.items()},
        "peak_bytes": max(line["peak_bytes"] for line in measured),
        "load": [min(line["load"] for line in measured), max(line["load"] for line in measured)],
    }


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    models = dict.fromkeys(cell["model"] for cell in results["cells"])
    parts = [_opening(results)]
    for model in models:
        cells = [cell for cell in results["cells"] if cell["model"] == model]
        families: dict[str, list[dict[str, Any]]] = {}
        for cell in sorted(cells, key=lambda one: named_workload(one["case"]).rate_per_s or 0.0):
            families.setdefault(family(cell["case"]), []).append(cell)
        for name, found in families.items():
            parts += [f"## {model}: {name}", *_equal(found), *_tables(found)]
    return "\n\n".join(parts) + "\n"


def family(case: str) -> str:
    """A workload's name without its rate."""
    return case.rpartition("-server-")[0]


def _opening(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    servers = "\n".join(f"| {name} | {one['note']} |" for name, one in results["servers"].items())
    return (
        "# Servers under load\n"
        "Written by `python benchmarks/serving.py`; not edited by hand. Random weights of the same sizes for all, so "
        f"only speed is compared. Requests arrive at Poisson times, the same for every server; {machine['cpu']}, "
        f"{machine['threads']} threads, {results['made']}, commit {results['commit']}. Server and client share the "
        "machine. Behind a figure stands its 95 % interval; a rate that a server did not keep up with is its last.\n\n"
        f"| server | what it is |\n|---|---|\n{servers}"
    )


def _equal(cells: Sequence[dict[str, Any]]) -> list[str]:
    """The table at equal p99, where there is something to compare."""
    task = named_workload(cells[0]["case"]).task
    limit = limit_ms(cells, task)
    if limit is None:
        return []
    best = {}
    for cell in cells:
        if _within(cell, task, limit):
            best[cell["engine"]] = max(best.get(cell["engine"], 0.0), cell["metrics"][RATE[task]])
    lines = [
        f"### {_TITLES[RATE[task]]} at a p99 of at most {limit:,.0f} ms",
        "",
        f"| server | {_TITLES[RATE[task]]} |",
    ]
    rows = [f"| {name} | {value:,.1f} |" for name, value in sorted(best.items(), key=lambda one: -one[1])]
    never = [f"| {name} | {_why_never(cells, name, task)} |" for name in _engines(cells) if name not in best]
    return ["\n".join([*lines, "|---|---|", *rows, *never])]


def _engines(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(cell["engine"] for cell in cells))


def _why_never(cells: Sequence[Mapping[str, Any]], engine: str, task: str) -> str:
    """Why a server has no figure within the limit."""
    measured = [cell for cell in cells if cell["engine"] == engine and "metrics" in cell]
    if not measured:
        return "not run"
    known = any(f"{WHOLE[task]}_p99" in cell["metrics"] for cell in measured)
    return "at no rate" if known else "too few requests for a p99"


def limit_ms(cells: Sequence[Mapping[str, Any]], task: str) -> float | None:
    """LIMIT times the shortest median of the lowest rate that was measured; None where nothing was."""
    rated = [(named_workload(cell["case"]).rate_per_s or 0.0, cell) for cell in cells if "metrics" in cell]
    lowest = min((rate for rate, _ in rated), default=None)
    medians = [cell["metrics"][f"{WHOLE[task]}_p50"] for rate, cell in rated if rate == lowest]
    return LIMIT * min(medians) if medians else None


def _within(cell: Mapping[str, Any], task: str, limit: float) -> bool:
    name = f"{WHOLE[task]}_p99"
    answered = "metrics" in cell and not cell["unanswered"]
    return answered and cell["metrics"].get(name, float("inf")) <= limit


def _tables(cells: Sequence[dict[str, Any]]) -> list[str]:
    """A table per rate."""
    tables = []
    for case in dict.fromkeys(cell["case"] for cell in cells):
        workload = named_workload(case)
        shown = _SHOWN[workload.task]
        head = " | ".join(["server", *(_TITLES[name] for name in shown), "without answer", "peak memory (MB)"])
        lines = [f"### {workload.rate_per_s:g} requests per second", "", f"| {head} |", "|---" * (len(shown) + 3) + "|"]
        lines += [_line(cell, shown) for cell in cells if cell["case"] == case]
        tables.append("\n".join(lines))
    return tables


def _line(cell: Mapping[str, Any], shown: Sequence[str]) -> str:
    if "metrics" not in cell:
        return f"| {cell['engine']} | {cell['reason']} |" + " |" * (len(shown) + 1)
    figures = [_figure(cell, name) for name in shown]
    unanswered = f"{cell['unanswered']} of {cell['requests']}"
    return f"| {' | '.join([cell['engine'], *figures, unanswered, format(cell['peak_bytes'] / 1e6, ',.0f')])} |"


def _figure(cell: Mapping[str, Any], name: str) -> str:
    if name not in cell["metrics"]:
        return "–"
    low, high = cell["intervals"][name]
    return f"{_rounded(cell['metrics'][name])} ({_rounded(low)}–{_rounded(high)})"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
