"""What each training aid saves of time and peak memory: `PYTHONPATH=. python benchmarks/training_aids.py`.

The shipped teacher and a half of it run the same short stage of distillation, each variant in a process of its own and
in turns; ratios are over `plain`: float32, the teacher running, no checkpointing. Memory is VmHWM of Linux beyond what
was resident when torch was there; seconds are processor time of the whole stage. `cached teacher` is timed with its
cache written by an earlier run; what writing it cost is `cache_seconds`. Packing is told as the share of a row's tokens
that are records', against one record a row of the same length. Writes benchmarks/results/training_aids.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.distill_memory import peak_bytes, processor
from slmdeploy import corpus

RESULTS = Path(__file__).parent / "results" / "training_aids.json"
TEACHER = Path(__file__).parent.parent / "examples" / "teacher"
CACHED = "cached teacher"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "gradient checkpointing": {"dtype": "fp32", "gradient_checkpointing": True},
    CACHED: {"dtype": "fp32", "cached_rows": 32},
    "all three": {"dtype": "bf16", "gradient_checkpointing": True, "cached_rows": 32},
}


def run_once(name: str, work: Path, steps: int, rows: int) -> dict[str, float]:
    """One stage in this process."""
    from slmdeploy.compress import stage as loaded  # noqa: F401 - torch and all else is resident before
    from slmdeploy.compress.distill import distill
    from slmdeploy.specs import DistillStage

    stage = DistillStage(steps=steps, batch_rows=rows, eval_rows=0, save_steps=10**6, **VARIANTS[name])
    before, start = peak_bytes(), time.process_time()
    out, cache = work / "student", work / f"cache-{name.replace(' ', '-')}"
    distill(TEACHER, work / "half", out=out, data=work / "data", stage=stage, cache=cache, force=True)
    return {"bytes": peak_bytes() - before, "seconds": time.process_time() - start}


def child(name: str, options: argparse.Namespace) -> dict[str, float]:
    """`run_once` in a process of its own."""
    arguments = ["--child", name, "--work", str(options.work.resolve())]
    arguments += ["--steps", str(options.steps), "--batch-rows", str(options.batch_rows)]
    command = [sys.executable, "-m", "benchmarks.training_aids", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def packing(data: Path, length: int = 512, count: int = 200) -> dict[str, float]:
    """The share of tokens that are records' in packed rows, and with a record a row, of the same records."""
    from slmdeploy.checkpoint import LABELS
    from slmdeploy.compress.data import make_texts, open_sources, pieces

    source = open_sources(data, "train")["generate"]
    texts = make_texts(TEACHER, (), LABELS, scored=False)
    sizes = [len(piece.ids) for piece in islice(pieces(source, texts, length, 0), count)]
    return {"alone": statistics.mean(sizes) / length, "records": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work/training_aids"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=sorted(VARIANTS))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_once(options.child, options.work, options.steps, options.batch_rows)))
        return
    prepare(options.work)
    first = {name: child(name, options) for name in VARIANTS}  # writes the caches, warms the disk
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, found in runs.items():
            found.append(child(name, options))
    middle = {name: {k: statistics.median(run[k] for run in found) for k in found[0]} for name, found in runs.items()}
    plain = middle["plain"]
    result = {
        "processor": processor(),
        "settings": {"steps": options.steps, "batch_rows": options.batch_rows, "rounds": options.rounds},
        "plain": plain,
        "ratios": {name: {k: value / plain[k] for k, value in one.items()} for name, one in middle.items()},
        "cache_seconds": first[CACHED]["seconds"] - middle[CACHED]["seconds"],
        "packing": packing(options.work / "data"),
    }
    options.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def prepare(work: Path) -> None:
    """The data and the student, half of the teacher's neurons, once."""
    from slmdeploy.compress.prune import prune

    if not (work / "data").exists():
        corpus.prepare(work / "data")
    if not (work / "half").exists():
        prune(
            TEACHER,
            out=work / "half",
            data=work / "data",
            ratio=0.5,
            attention_ratio=0.0,
            method="magnitude",
            calibration_tokens=512,
        )


if __name__ == "__main__":
    main()
