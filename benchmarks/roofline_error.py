"""How far estimates are from measurements on this machine, on builds and shapes that the fit has not seen.

    python benchmarks/roofline_error.py [--work work/roofline] [--models work/cpu_peers/models] [--rounds 3]
                                        [--no-measure]

Makes builds of small random-weight models under --work (once), takes those of cpu_peers.py under --models beside them
where there are any, and measures all of them in rounds, each build in a process of its own (some twenty minutes). Then
fits the roofline's costs to the shapes FITTED of all models but one, and compares its estimates with what was measured
of that one under the shapes HELD OUT; so for each model in turn. Writes benchmarks/results/roofline.json, the table of
docs/targets.md, and targets/calibration.json, which is fitted to everything. --no-measure fits what is there anew.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.checkpoints import ensure_checkpoint
from benchmarks.peers.engines.ours import GRAPH, export_graph, prepare
from benchmarks.peers.shapes import llama
from slmdeploy.profiling.calibration import (
    Calibration,
    Errors,
    Reference,
    Sample,
    error_summary,
    first_guess,
    fit,
    fit_memory,
    seconds,
)
from slmdeploy.profiling.cpu import last_level_bytes
from slmdeploy.profiling.facts import BuildFacts, read_facts
from slmdeploy.profiling.hardware import detect
from slmdeploy.profiling.load import requests
from slmdeploy.profiling.process import WorkerProcess, build_command
from slmdeploy.profiling.roofline import request_work
from slmdeploy.profiling.runs import request_of
from slmdeploy.specs import Workload
from slmdeploy.specs.workloads import named_workload
from slmdeploy.version import __version__

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "roofline.json"
CALIBRATION = REPOSITORY / "targets" / "calibration.json"
PAGE = REPOSITORY / "docs" / "targets.md"
MARKS = ("<!-- roofline_error: begin -->", "<!-- roofline_error: end -->")

PROFILES = ("cpu-fp32", "cpu-int4", "cpu-int8", "cpu-int8-weight")
PEER_PROFILES = ("cpu-int4", "cpu-int8", "cpu-int4-split", "cpu-int8-split")
FITTED = {
    "decoder": (
        "generate-32-32",
        "generate-128-32",
        "generate-512-32",
        "score-64-8x24",
        "score-512-32x16",
        "score-512-32x16-hot",
    ),
    "encoder": ("embed-16", "embed-128", "embed-8x128"),
}
HELD_OUT = {
    "decoder": ("generate-256-32", "generate-1024-32", "score-256-16x24", "score-512-4x16-hot"),
    "encoder": ("embed-64", "embed-16x64", "embed-4x256"),
}
_REQUEST_S, _MOST = 0.5, 6
"""A turn of a workload: requests for so long, at least two, at most so many; the first one does not count."""


_MORE = {"max_position_embeddings": 4096, "rope_theta": 1e4, "rms_norm_eps": 1e-5}
OWN = (
    llama("llama-12m", 256, 8, 4, 4, 1024, 16384, **_MORE),
    llama("llama-45m", 512, 10, 8, 2, 1792, 32000, **_MORE),
    llama("llama-110m", 768, 12, 12, 4, 2560, 32000, **_MORE),
)
"""Of no public model: from what fits into a cache to what does not, with other ratios of heads and widths."""


def builds(work: Path, models: Path) -> Iterator[tuple[str, str, Path]]:
    """Model, profile and folder of each build; those of OWN are made where they are not there."""
    for shape in OWN:
        place = work / shape.name
        checkpoint = ensure_checkpoint(shape, place)
        if not (place / GRAPH).exists():
            export_graph(checkpoint, place / GRAPH)
        for profile in PROFILES:
            if not (place / profile / "manifest.json").exists():
                prepare(checkpoint, place / profile, profile)
            yield shape.name, profile, place / profile
    for model in ("smollm2-135m", "qwen2.5-0.5b", "minilm-6-384", "bert-base"):
        for profile in PEER_PROFILES:
            folder = models / model / f"slmdeploy-{profile}"
            if (folder / "manifest.json").exists():
                yield model, profile, folder


def workloads(facts: BuildFacts, shapes: dict[str, tuple[str, ...]]) -> list[Workload]:
    """The workloads of these shapes that a build can run."""
    return [named_workload(name) for name in shapes["encoder" if "encode" in facts.graphs else "decoder"]]


@cache
def facts_of(folder: Path, name: str) -> BuildFacts:
    """`read_facts`, whose hashing of every file takes seconds, once for each build."""
    return read_facts(folder, name)


def measure(folder: Path, facts: BuildFacts, threads: int, round_: int) -> dict[str, Any]:
    """Times in ms of a build's own process by workload and metric, and the process's peak memory."""
    found: dict[str, Any] = {}
    command = build_command(folder)
    with WorkerProcess(facts.name, command, threads=threads) as worker:
        for workload in (*workloads(facts, FITTED), *workloads(facts, HELD_OUT)):
            asked = requests(workload, _MOST + 1, vocab_size=facts.vocab_size, seed=round_)
            worker.ask(**asked[0])
            times: dict[str, list[float]] = {}
            until = time.perf_counter() + _REQUEST_S
            for number, request in enumerate(asked[1:]):
                if number >= 2 and time.perf_counter() > until:
                    break
                for name, value in _times(worker.ask(**request)).items():
                    times.setdefault(name, []).append(value)
            found[workload.name] = times
        found["rss"] = worker.ask("rss")["peak_bytes"]
    return found


def _times(reply: dict[str, Any]) -> dict[str, float]:
    if "stamps_ms" not in reply:
        return {"request": reply["ms"]}
    stamps = reply["stamps_ms"]
    return {"first": stamps[0], "step": (stamps[-1] - stamps[0]) / (len(stamps) - 1)}


def measurements(every: list[tuple[str, str, Path]], rounds: int, machine: Reference, kept: Path) -> None:
    """Write one entry per build to ``kept``, with its times of all rounds so far; it is written anew after each round.

    Rounds go over all builds, so that a slow minute of the machine falls on all alike.
    """
    facts = [facts_of(folder, f"{model}/{profile}") for model, profile, folder in every]
    entries: list[dict[str, Any]] = [
        {"model": model, "profile": profile, "path": str(folder), "content_key": one.content_key, "rounds": []}
        for (model, profile, folder), one in zip(every, facts, strict=True)
    ]
    for round_ in range(rounds):
        for entry, one in zip(entries, facts, strict=True):
            started = time.perf_counter()
            entry["rounds"].append(measure(Path(entry["path"]), one, machine.threads, round_))
            print(f"round {round_} {one.name}: {time.perf_counter() - started:.0f} s", flush=True)
        kept.write_text(json.dumps({"machine": machine.model_dump(), "entries": entries}))


def samples(entry: dict[str, Any], shapes: dict[str, tuple[str, ...]], machine: Reference) -> dict[str, Sample]:
    """Samples of one build by `workload metric`: the fastest request of all rounds, as other work can only slow it."""
    facts = facts_of(Path(entry["path"]), entry["model"])
    found = {}
    for workload in workloads(facts, shapes):
        request = request_of(workload, facts, machine.threads)
        first, later = request_work(request, facts, threads=machine.threads, cache_bytes=machine.cache_bytes)
        work = {"first": first, "request": first, "step": later / max(1, request.counts - 1)}
        for name in entry["rounds"][0][workload.name]:
            values = [value for one in entry["rounds"] for value in one[workload.name][name]]
            found[f"{workload.name} {name}"] = Sample(work[name], min(values) / 1e3)
    return found


def held_out_errors(entries: list[dict[str, Any]], machine: Reference) -> list[dict[str, Any]]:
    """Each model in turn: fitted to the other ones under FITTED, compared with it under HELD_OUT."""
    rows = []
    for model in dict.fromkeys(entry["model"] for entry in entries):
        others = [entry for entry in entries if entry["model"] != model]
        seen = [sample for entry in others for sample in samples(entry, FITTED, machine).values()]
        costs = fit(seen, first_guess(machine))
        for entry in (entry for entry in entries if entry["model"] == model):
            for name, sample in samples(entry, HELD_OUT, machine).items():
                workload, _, kind = name.partition(" ")
                rows.append(
                    {
                        "model": model,
                        "profile": entry["profile"],
                        "workload": workload,
                        "time": kind,
                        "measured_ms": sample.seconds * 1e3,
                        "estimated_ms": seconds(sample.work, costs) * 1e3,
                        "error": sample.error(costs),
                    }
                )
    return rows


def calibrate(entries: list[dict[str, Any]], machine: Reference, errors: Errors) -> Calibration:
    """The costs fitted to every build and shape, with the errors of those that were left out."""
    every = [
        sample
        for entry in entries
        for shapes in (FITTED, HELD_OUT)
        for sample in samples(entry, shapes, machine).values()
    ]
    weights, peaks = [], []
    for entry in entries:
        facts = facts_of(Path(entry["path"]), entry["model"])
        longest = 1056 if "encode" not in facts.graphs else 0
        weights.append(float(facts.memory_bytes(set(facts.graphs))))
        peaks.append(statistics.median(one["rss"] for one in entry["rounds"]) - longest * facts.kv_bytes_per_token)
    return Calibration(
        slmdeploy=__version__,
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=machine,
        costs=fit(every, first_guess(machine)),
        memory=fit_memory(weights, peaks),
        errors=errors,
        builds={f"{entry['model']}/{entry['profile']}": entry["content_key"] for entry in entries},
        samples=len(every),
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the median error by model and kind of time, and over all."""
    kinds = {"first": "to the first token", "step": "a later token", "request": "scores or vectors"}
    lines = [
        "| model left out | times | " + " | ".join(kinds.values()) + " | all | p90 |",
        "|---|---|---|---|---|---|---|",
    ]

    def line(title: str, wanted: Callable[[dict[str, Any]], bool]) -> str:
        here = [row for row in rows if wanted(row)]
        cells = [_median([row["error"] for row in here if row["time"] == kind]) for kind in kinds]
        sizes = np.abs([row["error"] for row in here])
        return (
            f"| {title} | {len(here)} | {' | '.join(cells)} | {np.median(sizes):.0%} | {np.percentile(sizes, 90):.0%} |"
        )

    for model in dict.fromkeys(row["model"] for row in rows):
        lines.append(line(model, lambda row, model=model: row["model"] == model))  # type: ignore[misc]
    return "\n".join([*lines, line("**all**", lambda row: True)])


def _median(errors: list[float]) -> str:
    return f"{np.median(np.abs(errors)):.0%}" if errors else "–"


def write_page(text: str) -> None:
    """Put the table between its marks in docs/targets.md."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = (re.escape(mark) for mark in MARKS)
    block = f"{MARKS[0]}\n{text}\n{MARKS[1]}"
    PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: block, page, flags=re.DOTALL), encoding="utf-8")


def reference(looks: int = 3) -> Reference:
    """What the calibration keeps of the machine, its figures the best of a few looks."""
    seen = [detect() for _ in range(looks)]
    machine = seen[0]
    return Reference(
        cpu=machine.cpu,
        arch=machine.arch,
        threads=machine.threads,
        read_bandwidth_bytes_per_s=max(one.read_bandwidth_bytes_per_s or 0.0 for one in seen),
        fp32_peak_ops_per_s=max(one.fp32_peak_ops_per_s or 0.0 for one in seen),
        int8_peak_ops_per_s=max(one.int8_peak_ops_per_s or 0.0 for one in seen),
        cache_bytes=last_level_bytes(machine.caches) or 0,
    )


def main() -> None:
    """Measure, fit, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work/roofline"))
    parser.add_argument("--models", type=Path, default=Path("work/cpu_peers/models"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-measure", action="store_true")
    options = parser.parse_args()

    kept = options.work / "measurements.json"
    if not options.no_measure:
        every = list(builds(options.work, options.models))
        measurements(every, options.rounds, reference(), kept)
    content = json.loads(kept.read_text())
    machine, entries = Reference.model_validate(content["machine"]), content["entries"]

    rows = held_out_errors(entries, machine)
    errors = error_summary([row["error"] for row in rows])
    calibration = calibrate(entries, machine, errors)
    CALIBRATION.write_text(calibration.model_dump_json(indent=1) + "\n")
    result = {
        "machine": machine.model_dump(),
        "errors": errors.model_dump(),
        "builds": calibration.builds,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    write_page(table(rows))
    print(json.dumps(errors.model_dump()))


if __name__ == "__main__":
    main()
