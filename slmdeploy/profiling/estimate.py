"""The verb `estimate`: what builds would take on a target that is not here, from a roofline and never as measured.

The work that a workload makes of a build is counted (runs.py, roofline.py), and its costs on a calibrated machine are
carried to the target by the ratio of the two machines' figures. Writes rows as `profile` does, so that `select` takes
both, with "source": "estimated", a sentence on what they rest on, medians alone, and intervals as wide as the estimates
of builds left out of the fit were off. Quality is not estimated.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slmdeploy.artifacts import scratch
from slmdeploy.errors import InputError, OutputExistsError
from slmdeploy.profiling import compiled_estimate, load
from slmdeploy.profiling.calibration import Calibration, read_calibration, seconds
from slmdeploy.profiling.candidates import Candidate, find
from slmdeploy.profiling.facts import BuildFacts, read_facts
from slmdeploy.profiling.profile import SCHEMA
from slmdeploy.profiling.roofline import carried, latencies, request_work
from slmdeploy.profiling.runs import Request, request_of
from slmdeploy.specs import Target, Workload
from slmdeploy.version import __version__

_UNIT = {"generate": "tokens", "score": "items", "embed": "texts", "classify": "texts"}
Interval = Callable[[float], tuple[float, float]]
_ROLES = {"generate": {"steps", "prompts"}, "score": {"score", "encode"}, "embed": {"encode"}, "classify": {"encode"}}
"""The graphs that a task has open."""


def estimate(
    builds: Sequence[Path],
    *,
    target: Target,
    workloads: Sequence[Workload],
    out: Path,
    calibration: Path | None = None,
    force: bool = False,
) -> Path:
    """Write the estimates of ``builds`` on ``target`` to the .json file ``out``, in the form of measurement.json.

    ``calibration`` is a file of costs, by default the shipped one. Raises InputError for a target without the figures
    that an estimate needs, a build of the engine openvino, and a workload in which requests wait.
    """
    if out.suffix != ".json":
        raise InputError(f"{out} is no .json file: estimates are written to one file, e.g. {out.name}.json")
    if out.exists() and not force:
        raise OutputExistsError(f"{out} exists already: choose another output or pass --force to replace it")
    fitted = read_calibration(calibration)
    report = {
        "schema": SCHEMA,
        "slmdeploy": __version__,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "target": target.name,
        "source": "estimated",
        "machine": None,
        "threads": fitted.machine.threads,
        "plan": {"workloads": [workload.model_dump(exclude_none=True) for workload in workloads]},
        "rows": [_row(candidate, workloads, target, fitted) for candidate in find(builds, None, running=False)],
    }
    with scratch(out, "estimate") as folder:
        file = folder / out.name
        file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        file.replace(out)
    return out


def costs_on(target: Target, calibration: Calibration) -> dict[str, float]:
    """The costs on ``target``: those of the calibrated machine times the ratio of the figures of the two."""
    machine = calibration.machine
    here = {"fp32": machine.fp32_peak_ops_per_s, "int8": machine.int8_peak_ops_per_s}
    missing = [f"peak_ops.{dtype}" for dtype in here if dtype not in target.peak_ops]
    if target.read_bandwidth_bytes_per_s is None:
        missing.insert(0, "read_bandwidth_bytes_per_s")
    if target.read_bandwidth_bytes_per_s is None or missing:
        raise InputError(
            f"target {target.name!r} states no {', '.join(missing)}, so nothing is estimated for it: copy its file, "
            "add the figures with their sources, and name the copy with --target"
        )
    bandwidth = target.read_bandwidth_bytes_per_s / machine.read_bandwidth_bytes_per_s
    return carried(calibration.costs, bandwidth=bandwidth, peaks={d: target.peak_ops[d] / here[d] for d in here})


def basis(target: Target, calibration: Calibration) -> str:
    """What the figures of a row rest on, in one or two sentences."""
    machine, errors = calibration.machine, calibration.errors
    text = (
        f"Roofline fitted to {calibration.samples} measurements on {machine.cpu or machine.arch} with "
        f"{machine.threads} threads, carried by the bandwidth and peaks that {target.name} states; on builds left out "
        f"of the fit half of the estimates were within {errors.median:.0%} there, elsewhere it is unverified."
    )
    if "onnxruntime" in target.engines:
        return text
    return f"{text} As if ONNX Runtime's operators ran on it at the same efficiency, which they do not."


def _row(
    candidate: Candidate,
    workloads: Sequence[Workload],
    target: Target,
    calibration: Calibration,
) -> dict[str, Any]:
    facts = read_facts(candidate.path, candidate.name)
    for workload in workloads:
        load.check_fits(workload, candidate.name, max_length=candidate.max_length, tasks=candidate.tasks)
        candidate.workloads[workload.name] = entry(workload, *_taken(workload, facts, target, calibration))
    # Where several workloads have a figure, the first single-stream one's stands in the row, so it is written last.
    ordered = sorted(workloads, key=lambda one: one.scenario != "single-stream")[::-1]
    metrics, intervals = (
        {name: value for one in ordered for name, value in candidate.workloads[one.name][key].items()}
        for key in ("metrics", "intervals")
    )
    return candidate.row(None, target.name) | {
        "source": "estimated",
        "basis": compiled_estimate.basis(target) if facts.compiled else basis(target, calibration),
        "options": {"threads": facts.threads or calibration.machine.threads},
        "metrics": candidate.metrics | metrics | memory(facts, workloads, calibration),
        "intervals": intervals,
    }


def _taken(
    workload: Workload, facts: BuildFacts, target: Target, calibration: Calibration
) -> tuple[Request, tuple[float, float], Interval]:
    """A request of the workload, the seconds that its two parts take, and the interval around such a time."""
    machine = calibration.machine
    request = request_of(workload, facts, machine.threads)
    if facts.compiled:
        return request, compiled_estimate.request_seconds(request, facts, target), compiled_estimate.interval
    costs = costs_on(target, calibration)
    work = request_work(request, facts, threads=machine.threads, cache_bytes=machine.cache_bytes)
    return request, (seconds(work[0], costs), seconds(work[1], costs)), calibration.errors.interval


def entry(workload: Workload, request: Request, taken: tuple[float, float], interval: Interval) -> dict[str, Any]:
    """A workload's part of a row: medians of latencies, or rates where all requests are there at once.

    ``taken``: seconds until the first result, and of all that follows.
    """
    first, later = taken
    if workload.scenario == "offline":
        answered = request.requests / (first + later)
        metrics = {f"{_UNIT[workload.task]}_per_s": request.counts * answered, "requests_per_s": answered}
        ends = {name: interval(1 / value) for name, value in metrics.items()}
        intervals = {name: [1 / high, 1 / low] for name, (low, high) in ends.items()}
    else:
        times = latencies(first * 1e3, later * 1e3, workload.task, request.counts)
        metrics = {f"{name}_p50": value for name, value in times.items()}
        intervals = {name: list(interval(value)) for name, value in metrics.items()}
    return {
        "task": workload.task,
        "scenario": workload.scenario,
        "hot": workload.hot,
        "requests": 0,
        "metrics": metrics,
        "intervals": intervals,
        "samples": {},
        "noisy": False,
    }


def memory(facts: BuildFacts, workloads: Sequence[Workload], calibration: Calibration) -> dict[str, float]:
    """Bytes of the cache for the longest request, and of the process as the calibrated machine's processes had them."""
    roles = set().union(*(_ROLES[workload.task] for workload in workloads))
    keys = facts.kv_bytes_per_token * max(load.context_tokens(workload) for workload in workloads)
    if facts.compiled:
        return {"kv_bytes": float(keys), "rss_peak_bytes": float(compiled_estimate.memory_bytes(facts) + keys)}
    fitted = calibration.memory
    peak = fitted.base_bytes + fitted.per_weight_byte * facts.memory_bytes(roles) + keys
    return {"rss_peak_bytes": float(round(peak))} | ({"kv_bytes": float(keys)} if keys else {})
