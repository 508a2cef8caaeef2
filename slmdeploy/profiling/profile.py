"""The verb `profile`: speed and quality of several builds and the baseline on this machine, as one measurement.

One process per candidate, all alive at once so that their requests interleave. Speed first, then peak memory, then
quality, so that quality's long sequences do not count as memory. Writes measurement.json (docs/measurement.md), one row
per candidate. What was measured is kept turn by turn beside the output, so an interrupted run goes on. Knows nothing of
what is good enough: selection judges.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from slmdeploy.artifacts import Artifact, content_key, digest, open_artifact, scratch, writing
from slmdeploy.errors import InputError, OutputExistsError
from slmdeploy.metrics import LATENCIES, PERCENTILES
from slmdeploy.profiling import load, quality, sweeps
from slmdeploy.profiling.candidates import Candidate, baseline_of, find, fp32_of, unique_names
from slmdeploy.profiling.drafts import Drafts, check_drafts, text_of, with_drafts
from slmdeploy.profiling.environment import surroundings
from slmdeploy.profiling.hardware import Machine, detect, match_target
from slmdeploy.profiling.journal import Journal
from slmdeploy.profiling.measure import Effort, Runner, measure
from slmdeploy.profiling.process import Client, WorkerProcess, baseline_command, build_command
from slmdeploy.profiling.quality_cache import Cache, cache_folder
from slmdeploy.profiling.search import Options, search
from slmdeploy.progress import SILENT, Progress
from slmdeploy.runtime.encoder_config import is_encoder
from slmdeploy.specs import Workload, list_targets
from slmdeploy.version import __version__

MEASUREMENT = "measurement.json"
SCHEMA = 2
EFFORT = Effort(rounds=5, seconds=1.0, limit_s=6.0, precision=0.05)
"""What a figure is worth by default: an interval of 5 %, or what 6 seconds of a workload give."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured, which is what a measurement's content key is made of.

    ``effort`` says how long; ``watch`` names metrics, those of a budget, whose intervals must become narrow. ``data``
    is a folder on whose test split quality is measured, on ``quality_tokens`` tokens per task. ``baseline`` is a
    checkpoint that torch runs in eager mode. ``threads`` None leaves their number to each build and gives the baseline
    every physical core that this process may use. ``search`` finds each build's best session options first. ``drafts``
    measures each build with a draft too, on text of ``data``.
    """

    builds: Sequence[Path]
    workloads: Sequence[Workload]
    data: Path | None = None
    baseline: Path | None = None
    effort: Effort = EFFORT
    watch: Sequence[str] = ()
    quality_tokens: int = 30_000
    threads: int | None = None
    search: bool = False
    drafts: Drafts = field(default_factory=Drafts)
    seed: int = 0

    @property
    def plan(self) -> dict[str, Any]:
        """The settings, JSON-ready."""
        settings = {
            "workloads": [workload.model_dump(exclude_none=True) for workload in self.workloads],
            "baseline": self.baseline is not None,
            "effort": asdict(self.effort),
            "watch": list(self.watch),
            "quality_tokens": self.quality_tokens if self.data else 0,
            "threads": self.threads,
            "search": self.search,
            "seed": self.seed,
        }
        return settings | ({"drafts": {"prompt_lookup": self.drafts.prompt_lookup}} if self.drafts else {})

    @property
    def inputs(self) -> dict[str, Path]:
        """The files and folders, by what they are."""
        names = unique_names(self.builds)
        found = {f"build {name}": path for name, path in zip(names, self.builds, strict=True)}
        found |= {f"trace {one.name}": Path(one.trace) for one in self.workloads if one.trace is not None}
        others = {"baseline": self.baseline, "data": self.data, "draft": self.drafts.draft}
        return found | {name: path for name, path in others.items() if path is not None}


def profile(
    builds: Sequence[Path],
    *,
    workloads: Sequence[Workload],
    out: Path,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Artifact:
    """Measure ``builds`` under ``workloads`` and write an artifact folder; ``options`` are the other fields of `Asked`.

    Raises InputError when a build cannot run a workload.
    """
    asked = Asked(builds, workloads, **options)
    candidates = with_drafts(find(builds, asked.baseline), asked.drafts)
    _refuse(candidates, asked)
    with writing(out, kind="measurement", plan=asked.plan, inputs=asked.inputs, force=force) as draft:
        report = _measured(candidates, asked, out, progress or SILENT)
        _write(report, draft.path / MEASUREMENT)
        rows = report["rows"]
        draft.result = {"rows": len(rows), "noisy": [row["build"] for row in rows if row["noisy"]]}
    _journal_file(out).unlink(missing_ok=True)
    return open_artifact(out, "measurement")


def profile_to_file(
    builds: Sequence[Path],
    *,
    workloads: Sequence[Workload],
    out: Path,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """`profile` into the one portable file ``out`` instead of a folder."""
    if out.exists() and not force:
        raise OutputExistsError(f"{out} exists already: choose another output or pass --force to replace it")
    asked = Asked(builds, workloads, **options)
    candidates = with_drafts(find(builds, asked.baseline), asked.drafts)
    _refuse(candidates, asked)
    with scratch(out, "measurement") as folder:
        _write(_measured(candidates, asked, out, progress or SILENT), folder / MEASUREMENT)
        (folder / MEASUREMENT).replace(out)
    _journal_file(out).unlink(missing_ok=True)
    return out


def _journal_file(out: Path) -> Path:
    return out.with_name(f".{out.name}.journal")


def _write(report: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _measured(candidates: Sequence[Candidate], asked: Asked, out: Path, progress: Progress) -> dict[str, Any]:
    """The content of measurement.json."""
    machine = detect()
    threads = asked.threads or machine.threads
    with Journal(_journal_file(out), content_key("measurement", asked.plan, asked.inputs)) as journal:
        _run(candidates, asked, threads, journal, progress)
    return _report(candidates, machine, threads, asked.plan)


def _refuse(candidates: Sequence[Candidate], asked: Asked) -> None:
    """Raise for what cannot be measured, before anything is."""
    if (asked.baseline or asked.data) and any(is_encoder(path) for path in asked.builds):
        raise InputError(
            "encoders are measured without a baseline and without data, for their quality is judged when they are "
            "built, against their own graph: leave --baseline and --data out"
        )
    check_drafts(asked.drafts, asked.data, asked.workloads)
    if asked.drafts and len({candidate.tokenizer for candidate in candidates}) > 1:
        raise InputError("with a draft, prompts are one text for all rows: give builds of one tokenizer")
    names = [workload.name for workload in asked.workloads]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"two workloads are called {twice!r}: a figure is found by its workload's name")
    for candidate in candidates:
        for workload in asked.workloads:
            load.check_fits(workload, candidate.name, max_length=candidate.max_length, tasks=candidate.tasks)


def _report(candidates: Sequence[Candidate], machine: Machine, threads: int, plan: dict[str, Any]) -> dict[str, Any]:
    target, _ = match_target(machine, list_targets())
    name = target.name if target else None
    reference = baseline_of(candidates)
    return {
        "schema": SCHEMA,
        "slmdeploy": __version__,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "target": name,
        "source": "measured",
        "machine": machine.to_dict(),
        "surroundings": surroundings(),
        "threads": threads,
        "plan": plan,
        "rows": [candidate.row(reference, name) for candidate in candidates],
    }


def _run(candidates: Sequence[Candidate], asked: Asked, threads: int, journal: Journal, progress: Progress) -> None:
    if asked.search:
        _search(candidates, asked, threads, journal, progress)
    with _workers(candidates, asked, threads, progress) as workers:
        _speed(candidates, workers, asked, journal, progress)
        for candidate in candidates:
            peak = workers[candidate.name].ask("rss")["peak_bytes"]
            candidate.metrics |= {} if peak is None else {"rss_peak_bytes": peak}
            if candidate.kv_token_bytes is not None:
                longest = max(load.context_tokens(workload) for workload in asked.workloads)
                candidate.metrics["kv_bytes"] = longest * candidate.kv_token_bytes
        if asked.data is not None:
            _quality(candidates, workers, asked, asked.data, progress)
    progress.finish()


def _open(candidate: Candidate, asked: Asked, threads: int, labels: Sequence[str]) -> WorkerProcess:
    """The candidate's process, with the options that were found for it."""
    if candidate.role == "baseline":
        command = baseline_command(candidate.path, threads=threads, labels=labels)
    else:
        chosen = Options(**candidate.search["options"]) if candidate.search else Options(threads=asked.threads)
        command = build_command(candidate.path, [*chosen.arguments(), *candidate.drafting])
    return WorkerProcess(candidate.name, command, threads=threads)


def _search(candidates: Sequence[Candidate], asked: Asked, threads: int, journal: Journal, progress: Progress) -> None:
    """Find each build's session options, unless an interrupted run has found them already."""
    progress.start("search", None, "sessions")
    for candidate in (one for one in candidates if one.role != "baseline"):
        about = f"search {candidate.name}"
        candidate.search = journal.note(about)
        if candidate.search is not None:
            continue
        found = search(
            lambda options, path=candidate.path, name=candidate.name, drafting=candidate.drafting: WorkerProcess(  # type: ignore[misc]
                name, build_command(path, [*options.arguments(), *drafting]), threads=threads
            ),
            asked.workloads,
            cores=threads,
            cuts_prompts=candidate.cuts_prompts,
            takes_batches=candidate.takes_batches,
            vocab_size=Tokenizer.from_file(str(candidate.tokenizer)).get_vocab_size(),
            seed=asked.seed,
            done=lambda name=candidate.name: progress.advance(note=name),  # type: ignore[misc]
        )
        candidate.search = found.to_dict()
        journal.put_note(about, candidate.search)


@contextmanager
def _workers(
    candidates: Sequence[Candidate], asked: Asked, threads: int, progress: Progress
) -> Iterator[dict[str, WorkerProcess]]:
    """A process for each candidate, which has answered a first request of each task."""
    labels = next((candidate.labels for candidate in candidates if candidate.labels), ())
    workers = {}
    with ExitStack() as stack:
        progress.start("load", len(candidates), "builds")
        for candidate in candidates:
            worker = stack.enter_context(_open(candidate, asked, threads, labels))
            candidate.hello = {key: value for key, value in worker.hello.items() if key != "ready"}
            candidate.metrics["load_s"] = candidate.hello["load_s"]
            candidate.metrics["first_request_s"] = first_answers_s(worker, asked.workloads)
            workers[candidate.name] = worker
            progress.advance(note=candidate.name)
        yield workers


def first_answers_s(client: Client, workloads: Sequence[Workload]) -> float:
    """Seconds of a smallest first request of each task; sessions open on first use, so loading is not over before."""
    smallest = {
        "generate": {"op": "generate", "prompt_ids": [0], "new_tokens": 1},
        "score": {"op": "score", "prefix_ids": [0], "item_ids": [[0]]},
        "embed": {"op": "encode", "rows": [[0]]},
        "classify": {"op": "encode", "rows": [[0]]},
    }
    requests = [smallest[task] for task in sorted({workload.task for workload in workloads})]
    reply = client.ask("drive", requests=requests, arrivals=None, concurrency=1, batch=1, limit_s=3600.0)
    return float(reply["records"][-1]["end_s"])


def _speed(
    candidates: Sequence[Candidate],
    workers: Mapping[str, WorkerProcess],
    asked: Asked,
    journal: Journal,
    progress: Progress,
) -> None:
    vocab_size = min(Tokenizer.from_file(str(c.tokenizer)).get_vocab_size() for c in candidates)
    text = text_of(asked.data, candidates[0].tokenizer) if asked.drafts and asked.data else ()
    for workload in asked.workloads:
        progress.start(f"measure {workload.name}", None, "turns")
        runners = [_runner(one, workers[one.name]) for one in candidates]
        outcomes = measure(
            runners,
            workload,
            vocab_size=vocab_size,
            effort=asked.effort,
            seed=asked.seed,
            watch=asked.watch,
            journal=journal,
            text=text,
            done=lambda name: progress.advance(note=name),
        )
        if sweeps.points(workload):
            builds = [runner for runner in runners if runner.may_be_dropped]
            progress.start(f"sweep {workload.name}", sweeps.points(workload) * len(builds), "points")
            for runner in builds:
                sweeps.sweep(
                    runner,
                    workload,
                    outcomes[runner.name],
                    vocab_size=vocab_size,
                    seed=asked.seed,
                    done=lambda name: progress.advance(note=name),
                )
        for candidate in candidates:
            candidate.outcomes[workload.name] = outcomes[candidate.name]
            candidate.workloads[workload.name] = outcomes[candidate.name].to_dict(workload)
    _flatten(candidates, asked.workloads)


def _runner(candidate: Candidate, worker: WorkerProcess) -> Runner:
    batch = candidate.search["options"]["batch"] if candidate.search else None
    size, is_build = candidate.metrics["size_bytes"], candidate.role != "baseline"
    return Runner(candidate.name, worker, size, may_be_dropped=is_build, batch=batch)


def _flatten(candidates: Sequence[Candidate], workloads: Sequence[Workload]) -> None:
    """Each figure once without its workload's name, all percentiles of a latency from one workload (metrics.py)."""
    for candidate in candidates:
        for name, workload in owners(workloads, {one: set(found.metrics) for one, found in candidate.outcomes.items()}):
            outcome = candidate.outcomes[workload]
            candidate.metrics[name], candidate.drawn[name] = outcome.metrics[name], outcome.drawn[name]


def owners(workloads: Sequence[Workload], given: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Metric and workload that it is taken from, of what each workload has ``given``."""
    families: dict[str, tuple[int, int]] = {}
    for place, workload in enumerate(workloads):
        for name in given[workload.name]:
            rank = _rank(name, workload.scenario)
            family = _family(name)
            if rank is not None and (rank, place) < families.get(family, (9, 0)):
                families[family] = (rank, place)
    for family, (_, place) in families.items():
        workload = workloads[place]
        yield from ((name, workload.name) for name in sorted(given[workload.name]) if _family(name) == family)


def _family(name: str) -> str:
    base, _, label = name.rpartition("_")
    return base if label in PERCENTILES else name


def _rank(name: str, scenario: str) -> int | None:
    """How well a scenario is suited to speak for a metric, 0 best; None where it is not asked."""
    if _family(name) in LATENCIES or name.startswith("energy"):
        return {"single-stream": 0, "offline": 2}.get(scenario, 1)
    if name in ("requests_per_s", "goodput_per_s"):
        return {"offline": 1}.get(scenario, 0)
    return {"offline": 0, "concurrent": 1}.get(scenario)


def _quality(
    candidates: Sequence[Candidate],
    workers: Mapping[str, WorkerProcess],
    asked: Asked,
    data: Path,
    progress: Progress,
) -> None:
    progress.start("quality", None, "records")
    reference = baseline_of(candidates)
    found = quality.evaluate(
        {
            c.name: quality.Candidate(
                workers[c.name], c.tokenizer, c.max_length, c.tasks, fp32_of(c, candidates), digest(c.path)
            )
            for c in candidates
        },
        data,
        baseline=reference.name if reference else None,
        tokens=asked.quality_tokens,
        seed=asked.seed,
        cache=Cache(cache_folder()),
        done=lambda name: progress.advance(note=name),
    )
    for candidate in candidates:
        candidate.metrics |= found[candidate.name].metrics
        candidate.drawn |= found[candidate.name].drawn
        candidate.counts = found[candidate.name].counts


def measured_rows(measurement: Path) -> list[dict[str, Any]]:
    """The rows of a measurement, folder or file, as they were written, for printing."""
    file = measurement / MEASUREMENT if measurement.is_dir() else measurement
    report = json.loads(file.read_text(encoding="utf-8"))
    return list(report["rows"])
