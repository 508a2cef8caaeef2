"""How long runs of a graph take: the work in them, counted in bytes, operations and operators, times what each costs.

    run = Σ over matrices (bytes · read + 2 · rows · inputs · outputs · ops) + values between operators
        + attention + keys that steps read + operators

A roofline after Williams, Waterman and Patterson (CACM 52(4), 2009), in its form without overlap, in which reading and
computing add up: most runs of small models lie near the ridge, where neither hides the other. Costs are seconds per
unit, one for each form of matrix, because kernels differ in how much of the machine they reach. They are fitted to
measurements (calibration.py) and carried to other machines by the ratio of their figures. Knows no file, no target.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from slmdeploy.profiling.facts import BuildFacts
from slmdeploy.profiling.graph_facts import FORMS, GraphFacts
from slmdeploy.profiling.runs import Request, Run

Floats = NDArray[np.float64]

READ = tuple(f"read_{form}" for form in FORMS)
"""Bytes of matrices by form that come from memory."""
OPS = tuple(f"ops_{form}" for form in FORMS)
"""Multiplications and additions in matrices by form."""
UNITS = (*READ, "read_cached", *OPS, "values", "values_w8a8", "attention", "keys", "operators", "requests")
"""read_cached: bytes of matrices that the last cache holds. values, values_w8a8: bytes that matrices take and give, the
latter quantised on the way. attention: operations. keys: bytes of cached keys and values. operators: started ones, on
their own threads' account. requests: what Python does around one."""

PEAK_OF = {"ops_fp32": "fp32", "ops_w8a8": "int8", "ops_int8": "int8", "ops_int4": "int8", "attention": "fp32"}
"""Which of a machine's peaks a unit is computed at: weights in blocks are multiplied as 8-bit integers."""
_COMPUTED = (*OPS, "values", "values_w8a8", "attention")
"""Units whose cost falls with the number of threads; the memory is the same for one as for all."""


def request_work(request: Request, facts: BuildFacts, *, threads: int, cache_bytes: int) -> tuple[Floats, Floats]:
    """The work of a request until its first result and of all that follows, each by UNITS.

    ``threads``: how many the machine has. ``cache_bytes``: its last cache, 0 to take none into account.
    """
    first, later = (
        sum((run.times * run_work(run, facts, threads, cache_bytes) for run in runs), np.zeros(len(UNITS)))
        for runs in (request.first, request.later)
    )
    first[UNITS.index("requests")] += 1
    return first, later


def run_work(run: Run, facts: BuildFacts, threads: int, cache_bytes: int) -> Floats:
    """The work of one run (not of ``times`` of it) by UNITS."""
    graph = facts.graphs[run.role]
    work = dict.fromkeys(UNITS, 0.0) | _matrices(graph, run.tokens, run.kept)
    held = _held_share(graph, cache_bytes)
    work["read_cached"] = held * sum(work[name] for name in READ)
    work |= {name: (1 - held) * work[name] for name in READ}
    work["attention"] = 4.0 * run.pairs * sum(facts.widths)
    work["keys"] = float(run.keys * facts.kv_bytes_per_token)
    work["operators"] = float(graph.nodes)
    # Lanes go on side by side, so that all of their work is on the same threads; so is that of a build with fewer.
    slower = run.lanes * (max(1.0, threads / facts.threads) if facts.threads else 1.0)
    work |= {name: slower * work[name] for name in _COMPUTED}
    return np.array([work[name] for name in UNITS])


@lru_cache(maxsize=4096)
def _matrices(graph: GraphFacts, tokens: int, kept: int) -> dict[str, float]:
    work: dict[str, float] = {}
    for linear in graph.linears:
        rows = kept if linear.kept else tokens
        values = "values_w8a8" if linear.form == "w8a8" else "values"
        for name, amount in (
            (f"read_{linear.form}", linear.bytes if rows else 0),
            (f"ops_{linear.form}", 2 * rows * linear.inputs * linear.outputs),
            (values, 4 * rows * (linear.inputs + linear.outputs)),
        ):
            work[name] = work.get(name, 0.0) + amount
    return work


def _held_share(graph: GraphFacts, cache_bytes: int) -> float:
    """Share of the matrices that is still in the cache when they are read again.

    All of them where they fit; weights twice as large as the cache push each other out before they come round.
    """
    return min(1.0, max(0.0, 2.0 - graph.weight_bytes / cache_bytes)) if cache_bytes else 0.0


def latencies(first_ms: float, later_ms: float, task: str, counts: int) -> dict[str, float]:
    """Milliseconds of a request by the names of metrics.py without their percentile."""
    if task == "score":
        return {"score_ms": first_ms}
    if task != "generate":
        return {"encode_ms": first_ms}
    steps = {"tpot_ms": later_ms / (counts - 1), "itl_ms": later_ms / (counts - 1)} if counts > 1 else {}
    return {"ttft_ms": first_ms, "e2e_ms": first_ms + later_ms} | steps


def carried(costs: Mapping[str, float], *, bandwidth: float, peaks: Mapping[str, float]) -> dict[str, float]:
    """The costs on a machine with ``bandwidth`` times the calibrated one's and ``peaks`` (by dtype) times its peaks.

    What has no figure of its own is carried by the nearest: values between operators by the bandwidth, attention by
    float32. Costs of an operator and of a request stay.
    """
    faster = dict.fromkeys((*READ, "read_cached", "values", "values_w8a8", "keys"), bandwidth)
    faster |= {name: peaks[dtype] for name, dtype in PEAK_OF.items()}
    return {name: cost / faster.get(name, 1.0) for name, cost in costs.items()}
