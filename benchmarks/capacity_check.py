"""The queueing simulation of `slmdeploy plan` against the load generator: one and two workers on this machine.

    python benchmarks/capacity_check.py BUILD --json benchmarks/results/capacity.json --page docs/selection.md

Before each load service times are measured with all workers busy, since two of them share this machine's memory as two
machines would not. Then requests arrive at Poisson times at several shares of what would saturate the workers, one line
in front of all, and percentiles of the time from arrival to answer are held against two simulations: over the service
times measured before, which is what a plan does, and over those of the very requests that waited, which leaves out how
far the machine's speed drifts and shows the error of the queue alone. Meaningful on a quiet machine with a core per
worker; the table goes between the markers of the page.
"""

import argparse
import json
import platform
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmdeploy.profiling.arrivals import Clients, Request, Scheduled, Source, poisson
from slmdeploy.profiling.driving import Reply, drive
from slmdeploy.profiling.load import requests
from slmdeploy.profiling.process import WorkerProcess, build_command
from slmdeploy.runtime.bundle import read_manifest
from slmdeploy.selection.fleets import Service, limit_under_load
from slmdeploy.selection.rows import Load
from slmdeploy.specs import named_workload, parse_constraint

WORKLOAD = "score-32-10x24"
WORKERS = (1, 2)
SHARES = (0.3, 0.5, 0.7, 0.85)
"""Of the rate that would keep all workers busy all the time."""
PERCENTILES = ("score_ms_p50", "score_ms_p90", "score_ms_p99")
BEGIN, END = "<!-- capacity_check -->\n", "<!-- /capacity_check -->\n"


@dataclass(frozen=True)
class Point:
    """One percentile under one load: measured, planned with its 95 % interval, and simulated over its own services."""

    workers: int
    share: float
    rate_per_s: float
    metric: str
    measured_ms: float
    planned_ms: float
    low_ms: float
    high_ms: float
    own_ms: float

    @property
    def error(self) -> float:
        """Of the plan, as a share."""
        return self.planned_ms / self.measured_ms - 1

    @property
    def own_error(self) -> float:
        """Of the queue alone, as a share."""
        return self.own_ms / self.measured_ms - 1


class Shared:
    """A source that several drivers take from: at most one request at a time to each, so that they form one line."""

    def __init__(self, source: Source) -> None:
        self._source, self._lock = source, threading.Lock()
        self._waiting: list[tuple[float, Request]] = []

    def due(self, now: float) -> list[tuple[float, Request]]:
        """The request that has waited longest, if there is one."""
        with self._lock:
            self._waiting += self._source.due(now)
            taken, self._waiting = self._waiting[:1], self._waiting[1:]
            return taken

    def next_arrival(self) -> float | None:
        """See Source; what waits already has arrived."""
        with self._lock:
            return self._waiting[0][0] if self._waiting else self._source.next_arrival()

    def answered(self, at: float) -> None:
        """See Source."""
        with self._lock:
            self._source.answered(at)


def driven(workers: Sequence[WorkerProcess], source: Source) -> list[Reply]:
    """The records of everything that ``source`` gives, answered by all workers from one line, by arrival."""
    shared, records = Shared(source), []

    def work(worker: WorkerProcess) -> None:
        records.extend(drive(shared, lambda asked: [worker.ask(**request) for request in asked]))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(records, key=lambda record: record["arrival_s"])


def service_of(records: Sequence[Reply]) -> Service:
    """The service times of driven requests, with the percentiles that are looked at."""
    times = tuple((record["end_s"] - record["begin_s"]) * 1e3 for record in records)
    limits = [limit_under_load(parse_constraint(f"{name}<=1e9"), "score") for name in PERCENTILES]
    return Service(Load("score", "single-stream", {"score_ms": times}), limits)


def checked(workers: Sequence[WorkerProcess], asked: list[Request], share: float) -> list[Point]:
    """Every percentile of these workers under one load; the first tenth of the requests warms up and does not count."""
    warm_up = len(asked) // 10
    before = service_of(driven(workers, Clients(asked, len(workers)))[warm_up:])
    rate = share * len(workers) / before.mean_s
    records = driven(workers, Scheduled(poisson(rate, len(asked), seed=[1, int(share * 100)]), asked))[warm_up:]
    latencies = [(record["end_s"] - record["arrival_s"]) * 1e3 for record in records]
    planned, own = before.simulate(rate, len(workers)), service_of(records).simulate(rate, len(workers))
    return [
        Point(
            workers=len(workers),
            share=share,
            rate_per_s=rate,
            metric=limit.constraint.metric,
            measured_ms=float(np.percentile(latencies, limit.percent)),
            planned_ms=plan.value,
            low_ms=plan.low,
            high_ms=plan.high,
            own_ms=replayed.value,
        )
        for limit, plan, replayed in zip(before.limits, planned, own, strict=True)
    ]


def table(points: Sequence[Point]) -> str:
    """The points as a Markdown table, and the median and largest error below it."""
    lines = [
        "| workers | busy | requests/s | percentile | measured (ms) | planned (ms) | error | queue alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.workers} | {one.share:.0%} | {one.rate_per_s:.3g} | {one.metric} | {one.measured_ms:.3g} | "
        f"{one.planned_ms:.3g} ({one.low_ms:.3g} to {one.high_ms:.3g}) | {one.error:+.0%} | {one.own_error:+.0%} |"
        for one in points
    ]
    for name, errors in (("the plan", [p.error for p in points]), ("the queue alone", [p.own_error for p in points])):
        sizes = np.abs(errors)
        lines += ["", f"Error of {name}: {np.median(sizes):.0%} in the median, {sizes.max():.0%} at most."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description="the simulation of `slmdeploy plan` against the load generator")
    parser.add_argument("build", type=Path, help="a build with the task score")
    parser.add_argument("--requests", type=int, default=2000, help="per load")
    parser.add_argument("--json", type=Path, help="write the points here")
    parser.add_argument("--page", type=Path, help="write the table between the markers of this page")
    options = parser.parse_args()
    vocab_size = json.loads((options.build / "runtime.json").read_text(encoding="utf-8"))["vocab_size"]
    asked = requests(named_workload(WORKLOAD), options.requests, vocab_size=vocab_size, seed=0)
    points: list[Point] = []
    for count in WORKERS:
        with ExitStack() as stack:
            command = build_command(options.build, ["--threads", "1"])
            workers = [stack.enter_context(WorkerProcess(f"worker {i}", command, threads=1)) for i in range(count)]
            for share in SHARES:
                points += checked(workers, asked, share)
    print(table(points))
    if options.json:
        about: dict[str, Any] = {
            "build": options.build.name,
            "content_key": read_manifest(options.build).content_key,
            "workload": WORKLOAD,
            "requests": options.requests,
            "machine": platform.processor() or platform.machine(),
        }
        options.json.write_text(json.dumps(about | {"points": [asdict(one) for one in points]}, indent=1) + "\n")
    if options.page:
        page = options.page.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        options.page.write_text(f"{before}{BEGIN}{table(points)}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
