"""A run folder of schema 2 for tests: seeded synthetic figures on valid artifacts. Nothing here was measured.

`make_run` writes what `slmdeploy run` leaves: summary.json, measurement/, estimates/, selection/, builds/*/, graph/,
pruned/, distilled-1/. ``names`` replaces names of builds, which is how hostile text gets in; ``slower`` multiplies the
latencies of one build, which is what a regression looks like.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmdeploy.artifacts import writing
from slmdeploy.metrics import PERCENTILES, with_ratios
from slmdeploy.selection import select
from slmdeploy.specs import parse_budget

TARGET = "x86-64-avx512-vnni"
PLAN = {
    "workloads": [
        {"name": "continue", "task": "generate", "scenario": "single-stream", "prompt_tokens": 128, "new_tokens": 64},
        {"name": "search", "task": "score", "scenario": "single-stream", "prefix_tokens": 20, "items": 10},
        {"name": "search-hot", "task": "score", "scenario": "single-stream", "hot": True, "items": 10},
        {"name": "search-server", "task": "score", "scenario": "server", "rate_per_s": 40},
    ],
    "baseline": True,
    "effort": {"rounds": 5, "seconds": 1.0, "limit_s": 6.0, "precision": 0.05},
    "watch": ["score_ms_p99"],
    "seed": 0,
}
BUDGET = ["auc_ratio >= 0.95", "bits_per_byte_ratio <= 1.15", "tpot_ms_p50_ratio <= 0.25", "size_bytes <= 2e+07"]


@dataclass(frozen=True)
class Kind:
    """What the synthetic figures of one build are drawn around."""

    name: str
    precision: str
    tpot_ms: float
    score_ms: float
    bits: float
    auc: float
    size_bytes: int
    rss_bytes: int


BASELINE = Kind("baseline", "torch-eager-fp32", 6.5, 58.0, 0.948, 0.891, 21_300_000, 585_000_000)
KINDS = (
    Kind("cpu-fp32", "fp32", 0.41, 9.5, 0.998, 0.883, 24_560_000, 175_000_000),
    Kind("cpu-int8", "int8", 0.35, 9.7, 0.999, 0.882, 5_620_000, 118_000_000),
    Kind("cpu-int8-split", "int8+w8a8", 0.28, 7.1, 0.999, 0.881, 8_850_000, 131_000_000),
    Kind("cpu-int4", "int4", 0.26, 13.7, 1.004, 0.868, 4_130_000, 109_000_000),
)
ESTIMATED = Kind("cpu-int8-split", "int8+w8a8", 0.31, 8.2, 0.999, 0.881, 8_850_000, 131_000_000)
ELSEWHERE = "x86-64-amx"


def percentiles(base: str, values: np.ndarray) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics and intervals of one kind of sample, as a profiler would give them."""
    resampled = np.random.default_rng(1).choice(values, (60, values.size))
    metrics, intervals = {}, {}
    for label, percent in PERCENTILES.items():
        if values.size * (1 - percent / 100) < 1:
            continue
        metrics[f"{base}_{label}"] = float(np.percentile(values, percent))
        ends = np.percentile(np.percentile(resampled, percent, axis=1), (2.5, 97.5))
        intervals[f"{base}_{label}"] = [float(end) for end in ends]
    return metrics, intervals


def workload(task: str, scenario: str, samples: Mapping[str, np.ndarray], **more: Any) -> dict[str, Any]:
    """One workload of a row with everything that its samples give."""
    metrics: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for base, values in samples.items():
        found, ends = percentiles(base, values)
        metrics |= found
        intervals |= ends
    kept = {base: [round(float(value), 6) for value in values] for base, values in samples.items()}
    facts = {"spread": 0.08, "steal": 0.001, "noisy": False, "settled": True, "hot": False}
    size = len(next(iter(samples.values())))
    return {"task": task, "scenario": scenario, "requests": size, "metrics": metrics, "intervals": intervals,
            "samples": kept, **facts, **more}  # fmt: skip


def _draw(rng: np.random.Generator, median: float, count: int = 240) -> np.ndarray:
    return median * np.exp(rng.normal(0.0, 0.06, count)) + rng.exponential(0.03 * median, count)


def _server(rng: np.random.Generator, kind: Kind) -> dict[str, Any]:
    capacity = 1000.0 / kind.score_ms
    curve = []
    for share in (0.2, 0.4, 0.6, 0.8, 0.9):
        waiting = _draw(rng, kind.score_ms * (1 + share**2 / (2 * (1 - share))))
        metrics, intervals = percentiles("score_ms", waiting)
        rate = round(capacity * share, 2)
        curve.append({"rate_per_s": rate, "metrics": metrics, "intervals": intervals, "requests": waiting.size})
    samples = {"score_ms": _draw(rng, kind.score_ms * 1.3), "queue_ms": _draw(rng, kind.score_ms * 0.3)}
    return workload("score", "server", samples, curve=curve)


def _search(rng: np.random.Generator, kind: Kind, hot: bool) -> dict[str, Any]:
    start = 0.1 if hot else 0.4
    curve = []
    for items in (1, 2, 4, 8, 16, 32, 64):
        metrics, intervals = percentiles("score_ms", _draw(rng, kind.score_ms * (start + 0.06 * items), 60))
        curve.append({"items": items, "metrics": metrics, "intervals": intervals})
    samples = {"score_ms": _draw(rng, kind.score_ms * (start + 0.6))}
    return workload("score", "single-stream", samples, hot=hot, items_curve=curve)


def row(
    kind: Kind, seed: int, *, target: str = TARGET, source: str = "measured", slower: float = 1.0
) -> dict[str, Any]:
    """One row. An estimate has the medians and neither samples nor intervals."""
    rng = np.random.default_rng(seed)
    measured = {
        "continue": workload("generate", "single-stream", {
            "ttft_ms": _draw(rng, 12 * kind.tpot_ms * slower), "tpot_ms": _draw(rng, kind.tpot_ms * slower),
            "e2e_ms": _draw(rng, 75 * kind.tpot_ms * slower)}),
        "search": _search(rng, kind, hot=False),
        "search-hot": _search(rng, kind, hot=True),
        "search-server": _server(rng, kind),
    }  # fmt: skip
    metrics = {**measured["continue"]["metrics"], **measured["search"]["metrics"]}
    metrics |= {"size_bytes": kind.size_bytes, "rss_peak_bytes": kind.rss_bytes, "load_s": 0.1}
    metrics |= {"bits_per_byte": kind.bits, "auc": kind.auc}
    intervals = {**measured["continue"]["intervals"], **measured["search"]["intervals"]}
    intervals |= {"bits_per_byte": [kind.bits - 0.05, kind.bits + 0.05], "auc": [kind.auc - 0.02, kind.auc + 0.02]}
    if source == "estimated":
        metrics = {name: value for name, value in metrics.items() if not name.endswith(("p90", "p95", "p99"))}
        intervals, measured = {}, {}
    return {
        "build": kind.name, "path": f"runs/tiny/builds/{kind.name}", "role": "candidate", "target": target,
        "content_key": hashlib.sha256(kind.name.encode()).hexdigest(),
        "graph": "f" * 64, "profile": kind.name, "precision": kind.precision,
        "options": {"threads": 2, "spinning": True, "batch": 1}, "source": source, "passed": True, "speed": None,
        "gates": {"kl": {"passed": True, "value": 0.001, "limit": 0.01}}, "tasks": ["generate", "score"], "worker": {},
        "metrics": metrics, "intervals": intervals, "workloads": measured, "quality": {}, "noisy": False,
    }  # fmt: skip


def measurement(
    *, names: Mapping[str, str] | None = None, slower: Mapping[str, float] | None = None, seed: int = 0
) -> dict[str, Any]:
    """measurement.json: a baseline, four builds, one estimate; cpu-int8 is noisy and one of its workloads unsettled."""
    rows = [row(BASELINE, seed)]
    rows[0] |= {"role": "baseline", "gates": {}, "content_key": None, "graph": None, "profile": None, "path": "teacher"}
    rows += [row(kind, seed + at, slower=(slower or {}).get(kind.name, 1.0)) for at, kind in enumerate(KINDS, start=1)]
    rows.append(row(ESTIMATED, seed + 9, target=ELSEWHERE, source="estimated") | {"basis": "Drawn at random."})
    rows[2]["noisy"] = rows[2]["workloads"]["search"]["noisy"] = True
    rows[2]["workloads"]["search"]["settled"] = False
    for entry in rows:
        entry["metrics"] = with_ratios(entry["metrics"], rows[0]["metrics"])
        entry["build"] = (names or {}).get(entry["build"], entry["build"])
    return {
        "schema": 2, "slmdeploy": "0.1.0", "made": "2026-11-21T18:00:00Z", "target": TARGET, "source": "measured",
        "machine": {"cpu": "Synthetic CPU", "isa": ["avx2", "avx512_vnni"], "physical_cores": 2, "gpus": []},
        "threads": 2, "plan": PLAN, "rows": rows,
    }  # fmt: skip


def write_measurement(folder: Path, content: Mapping[str, Any], seed: int = 0) -> Path:
    """A measurement artifact."""
    with writing(folder, kind="measurement", plan={**PLAN, "seed": seed}, inputs={}) as draft:
        (draft.path / "measurement.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _artifact(folder: Path, kind: str, plan: Mapping[str, Any], result: Mapping[str, Any], **inputs: Path) -> Path:
    with writing(folder, kind=kind, plan=dict(plan), inputs=inputs) as draft:
        (draft.path / "content.txt").write_text(f"{kind} {folder.name}", encoding="utf-8")
        draft.result = dict(result)
    return folder


def _kept(part: str, loss: float) -> dict[str, Any]:
    return {"part": part, "wanted": "int4 block 128", "form": "int8 block 128", "kl_alone": loss, "reason": "sensitive"}


def _build(folder: Path, name: str, graph: Path, data: Path) -> Path:
    kept = [_kept("lm_head", 8.5e-3), _kept("model.layers.0.mlp.down_proj", 1.6e-3)] if name == "cpu-int4" else []
    parts = {f"model.layers.{at}.mlp.down_proj": "int4 block 128" for at in range(4)}
    parts |= {entry["part"]: entry["form"] for entry in kept}
    plan = {"profile": {"name": name}, "target": TARGET}
    return _artifact(folder / "builds" / name, "build", plan, {"parts": parts, "kept": kept}, graph=graph, data=data)


def make_run(
    folder: Path,
    *,
    names: Mapping[str, str] | None = None,
    slower: Mapping[str, float] | None = None,
    budget: Sequence[str] = BUDGET,
    seed: int = 0,
) -> Path:
    """A whole run folder, its selection made by the verb; returns it."""
    teacher = _artifact(folder / "teacher", "checkpoint", {}, {})
    data = _artifact(folder / "data", "data", {"source": "python standard library"}, {})
    pruned = _artifact(
        folder / "pruned", "checkpoint", {"verb": "prune", "ratio": 0.5, "method": "osscar", "seed": 0, "tile": 16},
        {}, data=data, checkpoint=teacher)  # fmt: skip
    stage = {"steps": 240, "loss": "forward_kl", "beta": None, "gradient_checkpointing": False, "warmup_share": 0.05}
    plan = {"verb": "distill", "stage": stage, "labels": [" no", " yes"]}
    student = _artifact(folder / "distilled-1", "checkpoint", plan, {}, data=data, teacher=teacher, student=pruned)
    tasks = {"tasks": ["generate", "score"], "dialect": "ort", "labels": [" no", " yes"]}
    graph = _artifact(folder / "graph", "graph", tasks, {}, checkpoint=student)
    builds = [_build(folder, kind.name, graph, data) for kind in KINDS]
    content = measurement(names=names, slower=slower, seed=seed)
    estimate = folder / "estimates" / f"{ELSEWHERE}.json"
    estimate.parent.mkdir()
    about = {"target": ELSEWHERE, "source": "estimated", "machine": None, "rows": [content["rows"].pop()]}
    estimate.write_text(json.dumps(content | about), encoding="utf-8")
    measured = write_measurement(folder / "measurement", content, seed)
    found = select([measured, estimate], budget=parse_budget(*budget), out=folder / "selection")
    places = [("data", data), ("prune", pruned), ("distill 1", student), ("export", graph)]
    places += [(f"build {build.name}", build) for build in builds]
    places += [("profile", measured), (f"estimate {ELSEWHERE}", estimate), ("select", folder / "selection")]
    steps = [
        {"name": name, "path": f"runs/tiny/{place.relative_to(folder)}", "reused": name == "data", "seconds": 4.2 * at}
        for at, (name, place) in enumerate(places)
    ]
    summary = {"recipe": "synthetic", "out": "runs/tiny", "feasible": found.feasible, "steps": steps, "rows": [],
               "package": "runs/tiny/package" if found.feasible else None, "trial": None}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def held_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run as its files have them, the estimates last."""
    files = (folder / "measurement" / "measurement.json", folder / "estimates" / f"{ELSEWHERE}.json")
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
