"""Latency against load, and latency against the number of items: a workload measured again at other sizes.

The points of a load curve are shares of what each candidate could do at most, 1 / its median service time, so that
every curve shows its own knee. Each point is a small measurement of its own (measure.py).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from slmdeploy.profiling.measure import Effort, Runner, measure
from slmdeploy.profiling.summary import SERVICE_TIME, Outcome
from slmdeploy.specs import Workload

LOADS = (0.3, 0.6, 0.8, 0.9)
"""Shares of the capacity at which latency is measured."""
_EFFORT = Effort(rounds=2, seconds=1.0, limit_s=2.0, precision=0.1)


def points(workload: Workload) -> int:
    """How many points a sweep of this workload has for each candidate; 0 without one."""
    if not workload.sweep:
        return 0
    return len(LOADS) if workload.scenario == "server" else len(item_counts(workload))


def item_counts(workload: Workload) -> list[int]:
    """1, 4, 16, … items, and as many as the workload has."""
    most = workload.items or 1
    return sorted({*(4**power for power in range(8) if 4**power < most), most})


def sweep(
    runner: Runner,
    workload: Workload,
    outcome: Outcome,
    *,
    vocab_size: int,
    seed: int,
    done: Callable[[str], None] = lambda name: None,
) -> None:
    """Add to ``outcome`` the curve that ``workload`` asks for."""

    def point(variant: Workload, key: str, value: float) -> dict[str, Any]:
        fresh = replace(runner, turns=[], steal=[], repeated=0)
        found = measure([fresh], variant, vocab_size=vocab_size, effort=_EFFORT, seed=seed)[runner.name]
        done(runner.name)
        intervals = {name: list(ends) for name, ends in found.intervals.items()}
        counts = {"requests": found.requests, "unanswered": found.unanswered}
        return {key: value, **counts, "metrics": found.metrics, "intervals": intervals}

    if workload.scenario == "server":
        capacity = 1e3 / float(np.median(outcome.samples[SERVICE_TIME]))
        for share in LOADS:
            rate = float(f"{share * capacity:.4g}")
            variant = workload.model_copy(update={"rate_per_s": rate, "name": f"{workload.name} at {rate:g}/s"})
            outcome.curve.append(point(variant, "rate_per_s", rate))
    else:
        for count in item_counts(workload):
            variant = workload.model_copy(update={"items": count, "name": f"{workload.name} of {count}"})
            outcome.items_curve.append(point(variant, "items", count))
