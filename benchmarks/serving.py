"""Servers under growing Poisson load: throughput and 99th percentiles beside llama.cpp, transformers and OpenVINO.

    python benchmarks/serving.py --minutes 25

One server of each product (servers/catalogue.py, BEST) takes about half an hour on two cores by arithmetic on the
figures of docs/performance.md; --servers '*' takes all rows. Every round starts each server in turn, in an order that
rotates, and sends it the workloads at growing rates until it does not keep up. A line is written as soon as a cell is
measured; the same command goes on where the last one stopped, and what failed is tried again. Models, environments and
conversions are those of cpu_peers.py and found again in its work folder. At the end the results go to
benchmarks/results/serving.json, page and plots to docs/serving-performance.md and beside it.
"""

import argparse
import fnmatch
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers.page import about  # the path above is what finds it
from benchmarks.peers.rounds import Journal, stolen_share, stolen_ticks
from benchmarks.peers.setup import ROOT, NotRun, Places, digest, sources, version_key
from benchmarks.peers.shapes import SHAPES, Shape
from benchmarks.servers import load, plot, process, report
from benchmarks.servers.catalogue import BEST, SERVERS, ServerRow, peer_of
from slmdeploy.profiling.live_http import Server, UnansweredError
from slmdeploy.specs import Workload, named_workload

WORKLOADS = {"generate-128-64": (2.0, 4.0, 6.0, 8.0), "score-512-32x16": (1.0, 2.0)}
"""Requests per second of each, from what one request at a time can be answered at to what only batches can."""


@dataclass(frozen=True)
class Plan:
    """What to measure; workloads have their rates in requests per second, ascending, each for `seconds` or for as many
    requests as a p99 takes; until: time.monotonic.
    """

    shapes: Sequence[Shape]
    rows: Sequence[ServerRow]
    workloads: Mapping[str, Sequence[float]]
    rounds: int
    seconds: float
    threads: int
    until: float


def run(plan: Plan, journal: Journal, places: Places) -> None:
    """All rounds, or as many as there is time for."""
    for round_ in range(plan.rounds):
        for shape in plan.shapes:
            start = round_ * 2 % len(plan.rows)
            for row in (*plan.rows[start:], *plan.rows[:start]):
                if time.monotonic() > plan.until:
                    print(f"out of time in round {round_ + 1}: the same command goes on from here", file=sys.stderr)
                    return
                _turn(plan, journal, places, shape, row, round_)


def _turn(plan: Plan, journal: Journal, places: Places, shape: Shape, row: ServerRow, round_: int) -> None:
    """One server in one round: every cell that is not there yet."""
    key = {"engine": row.name, "version": _version(row, shape, plan.threads), "model": shape.name, "round": round_}
    cases = {name: [f"{name}-server-{rate:g}" for rate in rates] for name, rates in plan.workloads.items()}
    wanted = [case for found in cases.values() for case in found if not journal.has(**key, case=case)]
    if not wanted:
        return
    started = time.monotonic()
    said = ""
    try:
        python, folder = process.prepared(row, shape, places)
        key["versions"] = process.versions(python, row.distributions)
        with process.running(row, python, folder, plan.threads) as (server, pid):
            for found in cases.values():
                _ladder(plan, journal, shape, row, server, pid, round_, key, [one for one in found if one in wanted])
    except NotRun as reason:
        said = places.hidden(str(reason))
        for case in wanted:
            journal.write({**key, "case": case, "failed": said[:500]})
    print(f"round {round_ + 1} {shape.name} {row.name}: {time.monotonic() - started:.0f} s {said}", file=sys.stderr)


def _ladder(
    plan: Plan,
    journal: Journal,
    shape: Shape,
    row: ServerRow,
    server: Server,
    pid: int,
    round_: int,
    key: dict[str, Any],
    cases: Sequence[str],
) -> None:
    """One workload at growing rates; behind the first one that a server does not keep up with, nothing is measured."""
    vocab_size = shape.config["vocab_size"]
    behind: str | None = None
    for case in cases:
        workload = named_workload(case)
        line: dict[str, Any] = {**key, "case": case}
        if behind is None:
            before = stolen_ticks()
            try:
                found = _measured(plan, row, server, workload, vocab_size, round_)
            except UnansweredError as error:
                line["failed"] = str(error)
            else:
                behind = None if found.kept_up else case
                steal = stolen_share(before, stolen_ticks())
                line |= {"turn": found.turn.to_dict(), "failures": list(found.failures), "steal": steal}
                line |= {"peak_bytes": process.peak_bytes(pid), "load": os.getloadavg()[0]}
        else:
            line["skipped"] = f"it did not keep up at {named_workload(behind).rate_per_s:g}/s"
        journal.write(line)


def _measured(
    plan: Plan, row: ServerRow, server: Server, workload: Workload, vocab_size: int, round_: int
) -> load.Cell:
    load.warm_up(row, server, workload, vocab_size)
    assert workload.rate_per_s is not None, "cells are of scenario server"
    count = max(load.least_requests(plan.rounds), int(plan.seconds * workload.rate_per_s))
    return load.run_cell(row, server, workload, vocab_size, round_, count)


def _version(row: ServerRow, shape: Shape, threads: int) -> str:
    serving = sources(ROOT / "slmdeploy" / "serving") if row.is_ours else ""
    peer = version_key(peer_of(row), shape, row.threads or threads)
    return digest(peer, serving, json.dumps(dict(row.more)), row.installs)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[s.name for s in SHAPES.values() if s.is_decoder],
                        default=["smollm2-135m"])  # fmt: skip
    parser.add_argument("--servers", nargs="+", default=list(BEST), help="names or patterns of rows")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--rates", nargs="+", type=float, help="of all workloads; needed for others than the usual")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of load, but at least what a p99 of all rounds takes"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no server after so many")
    parser.add_argument("--work", type=Path, default=Path("work/cpu_peers"))
    parser.add_argument("--envs", type=Path)
    parser.add_argument("--journal", type=Path, default=Path("work/serving/cells.jsonl"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/serving.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/serving-performance.md")
    parser.add_argument("--keep-builds", action="store_true", help="run our builds though sources have changed since")
    parser.add_argument("--report-only", action="store_true")
    options = parser.parse_args()
    rows = [row for row in SERVERS if any(fnmatch.fnmatch(row.name, one) for one in options.servers)]
    if not rows:
        parser.error(f"no server is called like {' or '.join(options.servers)}: {', '.join(r.name for r in SERVERS)}")
    workloads = {name: sorted(options.rates or WORKLOADS.get(name, ())) for name in options.workloads}
    if not all(workloads.values()):
        parser.error(f"--rates is needed for {' and '.join(name for name, rates in workloads.items() if not rates)}")
    # So that who ends this ends the servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    journal = Journal(options.journal)
    if not options.report_only:
        places = Places(
            options.work.absolute(), (options.envs or options.work / "envs").absolute(), options.keep_builds
        )
        shapes = [SHAPES[name] for name in options.models]
        until = time.monotonic() + options.minutes * 60
        plan = Plan(
            shapes,
            rows,
            workloads,
            options.rounds,
            options.seconds,
            options.threads,
            until,
        )
        run(plan, journal, places)
    results = report.results_of(journal.lines, SERVERS, about(ROOT, options.threads))
    charts = plot.charts(results, options.page.stem)
    texts = {options.results: json.dumps(results, indent=1, ensure_ascii=False) + "\n"}
    texts |= {options.page: report.render(results, {key: name for key, (name, _) in charts.items()})}
    texts |= {options.page.with_name(name): chart for name, chart in charts.values()}
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
