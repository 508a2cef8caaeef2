"""From the lines of the journal to results, and from results to docs/serving-performance.md.

Turns of all rounds are pooled, so percentiles and their intervals are the profiler's own. Two servers are compared at
equal p99: the highest throughput at which the 99th percentile of a request's time is within a limit that is the same
for all, each of LIMITS times the shortest median that any of them has at the lowest rate. Pure functions of data.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.servers.catalogue import ServerRow
from slmdeploy.profiling.summary import Turn, summarise
from slmdeploy.specs import named_workload

Line = dict[str, Any]
Cells = Sequence[Mapping[str, Any]]
LIMITS = (3.0, 10.0)
"""A limit that only a quick server holds, and one that leaves a queue room."""
WHOLE = {"generate": "e2e_ms", "score": "score_ms"}
RATE = {"generate": "tokens_per_s", "score": "items_per_s"}
_SHOWN = {
    "generate": ("tokens_per_s", "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99", "e2e_ms_p99"),
    "score": ("items_per_s", "score_ms_p50", "score_ms_p99"),
}
TITLES = {
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
    current = [line for found in cells.values() for line in found]
    versions = {line["engine"]: line["versions"] for line in current if "versions" in line}
    names = {name for name, _, _ in cells}
    return {
        "format": 2,
        **about,
        "load": _middle_and_most([line["load"] for line in current if "load" in line]),
        "steal": _middle_and_most([line["steal"] for line in current if "steal" in line]),
        "servers": {
            row.name: {"note": row.note, "ours": row.is_ours, "versions": versions.get(row.name, {})}
            for row in rows
            if row.name in names
        },
        "cells": [_cell(*key, found) for key, found in cells.items()],
    }


def _middle_and_most(values: Sequence[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "highest": max(values)} if values else None


def _cell(engine: str, model: str, case: str, lines: Sequence[Line]) -> dict[str, Any]:
    """One server under one workload: pooled over rounds; or why there is nothing."""
    key = {"engine": engine, "model": model, "case": case}
    measured = [line for line in lines if "turn" in line]
    if not measured:
        newest = lines[-1]
        return key | {"failed": "failed" in newest, "reason": newest.get("failed") or newest.get("skipped", "")}
    outcome = summarise(named_workload(case), [Turn(**line["turn"]) for line in measured], name=engine)
    return key | {
        "rounds": len(measured),
        "requests": outcome.requests,
        "unanswered": outcome.unanswered,
        "failures": sorted({reason for line in measured for reason in line["failures"]}),
        "metrics": {name: round(value, 4) for name, value in outcome.metrics.items()},
        "intervals": {name: [round(end, 4) for end in ends] for name, ends in outcome.intervals.items()},
        "peak_bytes": max(line["peak_bytes"] for line in measured),
    }


def render(results: Mapping[str, Any], charts: Mapping[tuple[str, str], str]) -> str:
    """The page. charts: files beside it, by model and workload without its rate."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in sorted(results["cells"], key=lambda one: named_workload(one["case"]).rate_per_s or 0.0):
        groups.setdefault((cell["model"], family(cell["case"])), []).append(cell)
    ours = {name for name, one in results["servers"].items() if one["ours"]}
    parts = [_opening(results), _goals(groups, ours)]
    for (model, name), cells in sorted(groups.items()):
        parts.append(f"## {model}: {name}")
        parts += _equal(cells)
        parts += [f"![p99 against throughput]({charts[model, name]})"] if (model, name) in charts else []
        parts += _tables(cells)
    return "\n\n".join([*parts, _not_run(results["cells"])]) + "\n"


def family(case: str) -> str:
    """A workload's name without its rate."""
    return case.rpartition("-server-")[0]


def _opening(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    servers = "\n".join(
        f"| {name} | {one['note']} | {', '.join(f'{what} {version}' for what, version in one['versions'].items())} |"
        for name, one in results["servers"].items()
    )
    load, steal = results["load"], results["steal"]
    quiet = (
        f" Load average when a cell ended: median {load['median']:.1f}, highest {load['highest']:.1f}; time stolen "
        f"meanwhile: median {steal['median']:.1%}, highest {steal['highest']:.1%}."
        if load and steal
        else ""
    )
    return (
        "# Servers under load\n"
        "Written by `python benchmarks/serving.py` from `benchmarks/results/serving.json`; not edited by hand. Random "
        "weights of the same sizes for all, so only speed is compared. Requests arrive at Poisson times, the same for "
        f"every server; {machine['cpu']}, {machine['threads']} threads, {results['made']}, commit {results['commit']}. "
        "Servers take turns within one call of the command; what another call added was measured at another time. "
        f"Server and client share the machine.{quiet} Behind a figure stands its 95 % interval; a rate that a server "
        "did not keep up with is its last.\n\n"
        f"| server | what it is | versions |\n|---|---|---|\n{servers}"
    )


def _goals(groups: Mapping[tuple[str, str], Cells], ours: set[str]) -> str:
    """Whether the best of ours is ahead of each peer at equal p99."""
    head = "| model | workload | p99 at most | best of ours | best peer | figure | ahead |\n|" + "---|" * 7
    rows = [
        f"| {model} | {name} | {limit:,.0f} ms | {' | '.join(_verdict(cells, limit, ours))} |"
        for (model, name), cells in sorted(groups.items())
        for limit in limits_ms(cells)
    ]
    return "\n".join(["## Goal: ahead of each at equal p99, among the rates that were tried", "", head, *rows])


def _verdict(cells: Cells, limit: float, ours: set[str]) -> tuple[str, str, str, str]:
    found = best_within(cells, limit)
    own = max((cell for name, cell in found.items() if name in ours), key=_throughput, default=None)
    peer = max((cell for name, cell in found.items() if name not in ours), key=_throughput, default=None)
    missing = [
        name for name in _of_unknown_p99(cells) if (name in ours and own is None) or (name not in ours and peer is None)
    ]
    if missing:
        sides = (one["engine"] if one else "none" for one in (own, peer))
        return *sides, "–", f"not known: too few requests of {', '.join(missing)} for a p99"
    if own is None and peer is None:
        return "none", "none", "–", "no server is within it"
    if own is None:
        return "none", peer["engine"], "–", "no"
    if peer is None:
        return own["engine"], "none", "–", "**yes**, no peer is within it"
    ratio = _throughput(own) / _throughput(peer)
    tie = _interval(own)[0] <= _interval(peer)[1] and _interval(peer)[0] <= _interval(own)[1]
    verdict = "no: a tie, their intervals overlap" if tie else "**yes**" if ratio > 1 else "no"
    return own["engine"], peer["engine"], f"{ratio:.2f}×", verdict


def _of_unknown_p99(cells: Cells) -> list[str]:
    """Servers that answered all of a cell's requests, which were too few for a p99."""
    name = f"{WHOLE[named_workload(cells[0]['case']).task]}_p99"
    open_ = [cell for cell in cells if "metrics" in cell and not cell["unanswered"] and name not in cell["metrics"]]
    return list(dict.fromkeys(cell["engine"] for cell in open_))


def _throughput(cell: Mapping[str, Any]) -> float:
    return float(cell["metrics"][RATE[named_workload(cell["case"]).task]])


def _interval(cell: Mapping[str, Any]) -> tuple[float, float]:
    low, high = cell["intervals"][RATE[named_workload(cell["case"]).task]]
    return float(low), float(high)


def best_within(cells: Cells, limit: float) -> dict[str, Mapping[str, Any]]:
    """Of each server the cell of highest throughput whose p99 is within a limit, of those that have one."""
    best: dict[str, Mapping[str, Any]] = {}
    for cell in cells:
        held = best.get(cell["engine"])
        if _within(cell, limit) and (held is None or _throughput(cell) > _throughput(held)):
            best[cell["engine"]] = cell
    return best


def _equal(cells: Cells) -> list[str]:
    """The table at equal p99, a column for each limit; nothing where nothing was measured."""
    limits, task = limits_ms(cells), named_workload(cells[0]["case"]).task
    if not limits:
        return []
    best = [best_within(cells, limit) for limit in limits]

    def shown(name: str, found: Mapping[str, Mapping[str, Any]]) -> str:
        return f"{_throughput(found[name]):,.1f}" if name in found else _why_never(cells, name, task)

    names = sorted(
        dict.fromkeys(cell["engine"] for cell in cells),
        key=lambda name: [-_throughput(found[name]) if name in found else 0.0 for found in best],
    )
    head = " | ".join(["server", *(f"{TITLES[RATE[task]]} at a p99 of at most {limit:,.0f} ms" for limit in limits)])
    rows = [f"| {' | '.join([name, *(shown(name, found) for found in best)])} |" for name in names]
    return ["\n".join([f"| {head} |", "|---" * (len(limits) + 1) + "|", *rows])]


def _why_never(cells: Cells, engine: str, task: str) -> str:
    """Why a server has no figure within the limit."""
    measured = [cell for cell in cells if cell["engine"] == engine and "metrics" in cell]
    if not measured:
        return "not run"
    known = any(f"{WHOLE[task]}_p99" in cell["metrics"] for cell in measured)
    return "at no rate" if known else "too few requests for a p99"


def limits_ms(cells: Cells) -> list[float]:
    """LIMITS times the shortest median of the lowest rate that was measured; none where nothing was."""
    task = named_workload(cells[0]["case"]).task
    rated = [(named_workload(cell["case"]).rate_per_s or 0.0, cell) for cell in cells if "metrics" in cell]
    lowest = min((rate for rate, _ in rated), default=None)
    medians = [cell["metrics"][f"{WHOLE[task]}_p50"] for rate, cell in rated if rate == lowest]
    return [limit * min(medians) for limit in LIMITS] if medians else []


def _within(cell: Mapping[str, Any], limit: float) -> bool:
    name = f"{WHOLE[named_workload(cell['case']).task]}_p99"
    answered = "metrics" in cell and not cell["unanswered"]
    return bool(answered and cell["metrics"].get(name, float("inf")) <= limit)


def _not_run(cells: Cells) -> str:
    """Every cell that failed, with its reason."""
    failed = [cell for cell in cells if cell.get("failed")]
    rows = [f"| {cell['engine']} | {cell['model']} | {cell['case']} | {cell['reason']} |" for cell in failed]
    table = ["| server | model | case | why |", "|---|---|---|---|", *rows] if rows else ["Everything ran."]
    return "\n".join(["## Not run", "", *table])


def _tables(cells: Sequence[dict[str, Any]]) -> list[str]:
    """A table per rate."""
    tables = []
    for case in dict.fromkeys(cell["case"] for cell in cells):
        workload = named_workload(case)
        shown = _SHOWN[workload.task]
        head = " | ".join(["server", *(TITLES[name] for name in shown), "without answer", "peak memory (MB)"])
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
