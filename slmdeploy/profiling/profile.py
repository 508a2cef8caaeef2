"""The verb `profile`: speed and quality of several builds and the baseline on this machine, as one measurement.

One process per candidate, all with the same number of threads, all alive at once so that their requests interleave.
Speed first, then peak memory, then quality, so that quality's long sequences do not count as memory. Writes
measurement.json (one row per candidate, docs/measurement.md) and adds ratios to the baseline's row. Knows nothing of
what is good enough: selection.py judges.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from slmdeploy.artifacts import Artifact, digest, open_artifact, writing
from slmdeploy.checkpoint import CONTEXT_FIELDS, read_config
from slmdeploy.errors import InputError
from slmdeploy.metrics import with_ratios
from slmdeploy.profiling import load, measure, quality
from slmdeploy.profiling.hardware import detect
from slmdeploy.profiling.process import Client, WorkerProcess, worker_command
from slmdeploy.progress import SILENT, Progress
from slmdeploy.runtime.bundle import FOR_OTHERS, RuntimeConfig, read_runtime
from slmdeploy.runtime.encoder_config import is_encoder, read_encoder
from slmdeploy.runtime.openvino_session import WEIGHTS
from slmdeploy.specs import Workload

MEASUREMENT = "measurement.json"
_RUNNABLE = ("graph", "build", "package")
_LOADED = {".onnx", ".data", ".xml", ".safetensors", ".json", ".jinja", ".txt", ".model"}
"""Suffixes of the files that running a folder reads, beside OpenVINO's weights; a checkpoint also holds logs, cards and
other things that end in .bin."""


@dataclass
class Candidate:
    """One folder to measure, and what is found out about it."""

    name: str
    path: Path
    role: str
    tasks: tuple[str, ...]
    max_length: int
    tokenizer: Path
    facts: dict[str, Any]
    labels: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, measure.Interval] = field(default_factory=dict)
    workloads: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    hello: dict[str, Any] = field(default_factory=dict)

    def row(self, baseline: Mapping[str, float]) -> dict[str, Any]:
        """The candidate's row of measurement.json."""
        return {
            "build": self.name,
            "path": str(self.path),
            "role": self.role,
            **self.facts,
            "tasks": list(self.tasks),
            "worker": self.hello,
            "metrics": with_ratios(self.metrics, baseline),
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "workloads": self.workloads,
            "quality": self.counts,
            "noisy": any(workload["noisy"] for workload in self.workloads.values()),
        }


def profile(
    builds: Sequence[Path],
    *,
    workloads: Sequence[Workload],
    out: Path,
    data: Path | None = None,
    baseline: Path | None = None,
    rounds: int = 5,
    seconds: float = 1.0,
    quality_tokens: int = 30_000,
    threads: int | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Measure ``builds``, and ``baseline`` (a checkpoint run by torch in eager mode) beside them.

    Each candidate runs each workload for about ``seconds``, in ``rounds`` interleaved turns. With ``data`` quality is
    measured on its test split, on ``quality_tokens`` tokens per task. ``threads`` None leaves their number to
    each build and gives the baseline every physical core that this process may use. A latency or throughput metric
    stands in a row's flat ``metrics`` for the first workload of its task and scenario, and in ``workloads`` for each.
    Raises InputError when a build cannot run a workload.
    """
    candidates = _candidates(builds, baseline)
    if (baseline or data) and any(is_encoder(path) for path in builds):
        raise InputError(
            "encoders are measured without a baseline and without data, for their quality is judged when they are "
            "built, against their own graph: leave --baseline and --data out"
        )
    for candidate in candidates:
        for workload in workloads:
            load.check_fits(workload, candidate.name, max_length=candidate.max_length, tasks=candidate.tasks)
    machine = detect()
    used = threads or machine.threads
    plan, inputs = determinants(
        builds,
        workloads=workloads,
        data=data,
        baseline=baseline,
        rounds=rounds,
        seconds=seconds,
        quality_tokens=quality_tokens,
        threads=threads,
        seed=seed,
    )
    with writing(out, kind="measurement", plan=plan, inputs=inputs, force=force) as draft:
        _run(candidates, workloads, data, used, plan, progress or SILENT)
        reference = next((c.metrics for c in candidates if c.role == "baseline"), {})
        rows = [candidate.row(reference) for candidate in candidates]
        report = {"machine": machine.to_dict(), "threads": used, "plan": plan, "rows": rows}
        (draft.path / MEASUREMENT).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draft.result = {"rows": len(rows), "noisy": [row["build"] for row in rows if row["noisy"]]}
    return open_artifact(out, "measurement")


def determinants(
    builds: Sequence[Path],
    *,
    workloads: Sequence[Workload],
    data: Path | None = None,
    baseline: Path | None = None,
    rounds: int = 5,
    seconds: float = 1.0,
    quality_tokens: int = 30_000,
    threads: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """The plan and the inputs that a measurement's content key is made of; the arguments are those of `profile`."""
    names = unique_names(builds)
    plan = {
        "workloads": [workload.model_dump(exclude_none=True) for workload in workloads],
        "baseline": baseline is not None,
        "rounds": rounds,
        "seconds": seconds,
        "quality_tokens": quality_tokens if data else 0,
        "threads": threads,
        "seed": seed,
    }
    inputs = {f"build {name}": path for name, path in zip(names, builds, strict=True)}
    others = {"baseline": baseline, "data": data}
    return plan, inputs | {name: path for name, path in others.items() if path is not None}


def unique_names(builds: Sequence[Path]) -> list[str]:
    """A short name for each build: its folder's name, with the parent's where two would be the same."""
    if not builds:
        raise InputError("no build was given: name at least one folder made by `slmdeploy build`")
    paths = [path.resolve() for path in builds]
    if len(set(paths)) < len(paths):
        raise InputError(f"{next(p for p in paths if paths.count(p) > 1)} was given twice: name each build once")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("distinct paths have distinct names")


def _candidates(builds: Sequence[Path], baseline: Path | None) -> list[Candidate]:
    found = [] if baseline is None else [_baseline(baseline)]
    for name, path in zip(unique_names(builds), builds, strict=True):
        found.append(_build(name, path))
    first: dict[str, Path] = {}
    for candidate in found:
        # Candidates with the same tokenizer share one path, which is how quality knows that their ids agree.
        content = hashlib.sha256(candidate.tokenizer.read_bytes()).hexdigest()
        candidate.tokenizer = first.setdefault(content, candidate.tokenizer)
        candidate.metrics["size_bytes"] = size_bytes(candidate.path)
    return found


def _build(name: str, path: Path) -> Candidate:
    artifact = open_artifact(path)
    if artifact.kind not in _RUNNABLE:
        raise InputError(f"{path} is a {artifact.kind}: profile measures what `slmdeploy build` or `export` made")
    runtime = read_encoder(path) if is_encoder(path) else read_runtime(path)
    chosen = artifact.plan.get("profile")
    facts = {
        "content_key": artifact.content_key,
        "profile": chosen["name"] if isinstance(chosen, dict) else chosen,
        "precision": runtime.precision,
        "graph": digest(path) if artifact.kind == "graph" else artifact.inputs.get("graph", {}).get("digest"),
        "gates": artifact.result.get("gates", {}),
        "passed": artifact.result.get("passed", True),
        "speed": artifact.result.get("speed"),
    }
    labels = runtime.score.labels if isinstance(runtime, RuntimeConfig) and runtime.score else ()
    return Candidate(name, path, "candidate", runtime.tasks, runtime.max_length, path / "tokenizer.json", facts, labels)


def _baseline(path: Path) -> Candidate:
    config = path / "config.json"
    for needed in (config, path / "tokenizer.json"):
        if not needed.is_file():
            raise InputError(f"{needed} does not exist: the baseline must be a checkpoint folder with its tokenizer")
    fields = read_config(path)
    max_length = next((fields[name] for name in CONTEXT_FIELDS if isinstance(fields.get(name), int)), None)
    if max_length is None:
        raise InputError(f"{config}: one of {', '.join(CONTEXT_FIELDS)} must be the context length in tokens")
    facts: dict[str, Any] = {
        "content_key": None,
        "profile": None,
        "precision": "torch-eager-fp32",
        "graph": None,
        "gates": {},
        "passed": True,
    }
    return Candidate("baseline", path, "baseline", ("generate", "score"), max_length, path / "tokenizer.json", facts)


def size_bytes(folder: Path) -> int:
    """Bytes of the files at the top of ``folder`` that running it reads."""
    return sum(
        file.stat().st_size
        for file in folder.iterdir()
        if file.is_file() and (file.suffix in _LOADED or file.name == WEIGHTS) and file.name not in FOR_OTHERS
    )


def _run(
    candidates: Sequence[Candidate],
    workloads: Sequence[Workload],
    data: Path | None,
    threads: int,
    plan: Mapping[str, Any],
    progress: Progress,
) -> None:
    labels = next((candidate.labels for candidate in candidates if candidate.labels), ())
    with ExitStack() as stack:
        workers = {}
        progress.start("load", len(candidates), "builds")
        for candidate in candidates:
            is_baseline = candidate.role == "baseline"
            asked = threads if is_baseline else plan["threads"]
            command = worker_command(candidate.path, threads=asked, baseline=is_baseline, labels=labels)
            worker = stack.enter_context(WorkerProcess(candidate.name, command, threads=threads))
            candidate.hello = {key: value for key, value in worker.hello.items() if key != "ready"}
            candidate.metrics["load_s"] = candidate.hello["load_s"] + first_answers_s(worker, workloads)
            workers[candidate.name] = worker
            progress.advance(note=candidate.name)
        _speed(candidates, workers, workloads, plan, progress)
        for candidate in candidates:
            peak = workers[candidate.name].ask("rss")["peak_bytes"]
            candidate.metrics |= {} if peak is None else {"rss_peak_bytes": peak}
        if data is not None:
            _quality(candidates, workers, data, plan, progress)
        progress.finish()


def first_answers_s(client: Client, workloads: Sequence[Workload]) -> float:
    """Seconds of a smallest first request of each task; sessions open on first use, so loading is not over before."""
    smallest = {
        "generate": {"op": "generate", "prompt_ids": [0], "new_tokens": 1},
        "score": {"op": "score", "prefix_ids": [0], "item_ids": [[0]]},
        "embed": {"op": "encode", "rows": [[0]]},
        "classify": {"op": "encode", "rows": [[0]]},
    }
    tasks = sorted({workload.task for workload in workloads})
    return float(client.ask("offline", requests=[smallest[task] for task in tasks])["ms"]) / 1e3


def _speed(
    candidates: Sequence[Candidate],
    workers: Mapping[str, WorkerProcess],
    workloads: Sequence[Workload],
    plan: Mapping[str, Any],
    progress: Progress,
) -> None:
    vocab_size = min(Tokenizer.from_file(str(c.tokenizer)).get_vocab_size() for c in candidates)
    progress.start("measure", len(workloads) * len(candidates) * plan["rounds"], "turns")
    for workload in workloads:
        outcomes = measure.measure(
            workers,
            workload,
            vocab_size=vocab_size,
            rounds=plan["rounds"],
            seconds=plan["seconds"],
            seed=plan["seed"],
            done=lambda name, label=workload.name: progress.advance(note=f"{label} {name}"),  # type: ignore[misc]
        )
        for candidate in candidates:
            _record(candidate, workload, outcomes[candidate.name])


def _record(candidate: Candidate, workload: Workload, outcome: measure.Outcome) -> None:
    candidate.workloads[workload.name] = {
        "task": workload.task,
        "scenario": workload.scenario,
        "requests": outcome.requests,
        "metrics": outcome.metrics,
        "spread": outcome.spread,
        "steal": outcome.steal,
        "noisy": outcome.noisy,
    }
    candidate.metrics = outcome.metrics | candidate.metrics
    candidate.intervals = outcome.intervals | candidate.intervals


def _quality(
    candidates: Sequence[Candidate],
    workers: Mapping[str, WorkerProcess],
    data: Path,
    plan: Mapping[str, Any],
    progress: Progress,
) -> None:
    progress.start("quality", None, "records")
    found = quality.evaluate(
        {c.name: quality.Candidate(workers[c.name], c.tokenizer, c.max_length, c.tasks) for c in candidates},
        data,
        baseline=next((c.name for c in candidates if c.role == "baseline"), None),
        tokens=plan["quality_tokens"],
        seed=plan["seed"],
        done=lambda name: progress.advance(note=name),
    )
    for candidate in candidates:
        candidate.metrics |= found[candidate.name].metrics
        candidate.intervals |= found[candidate.name].intervals
        candidate.counts = found[candidate.name].counts


def measured_rows(measurement: Path) -> list[dict[str, Any]]:
    """The rows of a measurement artifact as they were written, for printing."""
    report = json.loads((measurement / MEASUREMENT).read_text(encoding="utf-8"))
    return list(report["rows"])
