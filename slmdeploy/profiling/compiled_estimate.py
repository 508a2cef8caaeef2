"""What a graph for a GPU's compiler would take on a target, from the datasheet alone: a plain roofline, never measured.

    run = the larger of (bytes of matrices and cached keys / bandwidth) and (Σ operations / peak of their type)

after Williams, Waterman and Patterson (CACM 52(4), 2009). Nothing of this kind was ever measured here, so no cost is
fitted: a compiled plan is taken to reach half of the datasheet's figures, and anything between a quarter and all of
them is inside the interval. That share is an assumption and every row says so. Starting kernels costs time that this
leaves out, so steps of small models take longer. Knows nothing of files (estimate.py).
"""

from slmdeploy.errors import InputError
from slmdeploy.profiling.facts import BuildFacts
from slmdeploy.profiling.graph_facts import Linear
from slmdeploy.profiling.runs import Request, Run
from slmdeploy.specs import Target

REACHED, LEAST_REACHED = 0.5, 0.25
"""Shares of the datasheet's figures: of the estimate, and of the slow end of its interval. Assumed, not measured."""
_WHOLE = ("fp32", "w8a8")
"""Forms of matrices that are multiplied in the type that they are stored in."""
_TYPES = {1: "fp8", 2: "fp16", 4: "fp32"}
"""What a matrix is multiplied in, by the bytes of an element."""


def request_seconds(request: Request, facts: BuildFacts, target: Target) -> tuple[float, float]:
    """Seconds until the first result of a request, and of all that follows, at half of the target's figures.

    Raises InputError for a target without the bandwidth or the peak of a type that the build computes in.
    """
    first, later = (
        sum(run.times * _seconds(run, facts, target) for run in runs) for runs in (request.first, request.later)
    )
    return first / REACHED, later / REACHED


def interval(seconds: float) -> tuple[float, float]:
    """Between which ends the truth is taken to lie of a time that is estimated as ``seconds``."""
    return seconds * REACHED, seconds * REACHED / LEAST_REACHED


def basis(target: Target) -> str:
    """What such figures rest on, in two sentences."""
    return (
        f"Plain roofline from the figures that {target.name} states, of which a plan is assumed to reach half ("
        "a quarter to all); nothing of it was measured. Starting kernels is left out: small models are slower."
    )


def memory_bytes(facts: BuildFacts) -> int:
    """Bytes of the matrices; a plan holds them once for all its phases."""
    return max(graph.weight_bytes for graph in facts.graphs.values())


def _seconds(run: Run, facts: BuildFacts, target: Target) -> float:
    graph = facts.graphs[run.role]
    moved = graph.weight_bytes + run.keys * facts.kv_bytes_per_token
    computed = 4.0 * run.pairs * sum(facts.widths) / _peak("fp16", target)
    for linear in graph.linears:
        rows = run.kept if linear.kept else run.tokens
        computed += 2.0 * rows * linear.inputs * linear.outputs / _peak(_type(linear), target)
    if target.read_bandwidth_bytes_per_s is None:
        raise _lacks(target, "read_bandwidth_bytes_per_s")
    return max(moved / target.read_bandwidth_bytes_per_s, computed)


def _type(linear: Linear) -> str:
    # Weights in blocks of 4 or 8 bits are multiplied as float16.
    return _TYPES.get(linear.bytes // (linear.inputs * linear.outputs), "fp16") if linear.form in _WHOLE else "fp16"


def _peak(name: str, target: Target) -> float:
    if name not in target.peak_ops:
        raise _lacks(target, f"peak_ops.{name}")
    return target.peak_ops[name]


def _lacks(target: Target, key: str) -> InputError:
    return InputError(
        f"target {target.name!r} states no {key}, so nothing is estimated for it: copy its file, add the figure with "
        "its source, and name the copy with --target"
    )
