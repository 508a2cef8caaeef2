"""Holds the profiler against other engines' own benchmark tools: same files, same lengths, interleaved, in one run.

    .venv/bin/python benchmarks/validation.py \
        --genai ENV/bin/python benchmark_e2e.py GENAI_FOLDER --llama ENV/bin/python llama-bench GGUF_FOLDER

The genai folder and the GGUF file are those that benchmarks/cpu_peers.py --prepare-only makes, in the environments that
it makes; benchmark_e2e.py is onnxruntime-genai's (benchmark/python of its repository, needs pandas, psutil and tqdm),
llama-bench is built from llama.cpp's tools. Each round the profiler drives the engine in a process of its own and then
the tool runs. Writes benchmarks/results/validation.json and docs/validation.md; --report-only makes the page again.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slmdeploy.profiling import load  # noqa: E402  # the path above is what finds it
from slmdeploy.profiling.hardware import detect  # noqa: E402
from slmdeploy.profiling.process import WorkerProcess  # noqa: E402
from slmdeploy.profiling.statistics import draws, interval  # noqa: E402
from slmdeploy.specs import Workload  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "validation.json"
PAGE = ROOT / "docs" / "validation.md"
PROMPT, NEW, REPETITIONS = 128, 32, 5
WORKLOAD = Workload(name="validation", task="generate", prompt_tokens=PROMPT, new_tokens=NEW)
Figures = dict[str, float]
Tool = Callable[[], Figures]


def ours(worker: WorkerProcess, round_: int) -> Figures:
    """Medians of one turn as the profiler takes it: a request that does not count, then the counted ones."""
    requests = load.requests(WORKLOAD, REPETITIONS + 1, vocab_size=4096, seed=round_)
    options = {"arrivals": None, "concurrency": 1, "batch": 1, "limit_s": 3600.0}
    records = worker.ask("drive", requests=requests, **options)["records"][1:]
    stamps = [record["stamps_ms"] for record in records]
    return {
        "ttft_ms": statistics.median(stamp[0] for stamp in stamps),
        "tpot_ms": statistics.median((stamp[-1] - stamp[0]) / (NEW - 1) for stamp in stamps),
    }


def genai_tool(python: str, script: str, folder: str) -> Figures:
    """onnxruntime-genai's benchmark_e2e.py."""
    lengths = ["-l", PROMPT, "-g", NEW, "-r", REPETITIONS, "-w", 1]
    how = ["-k", 1, "--use_random_tokens", "--aggregation", "median", "-e", "cpu", "-o", "/dev/null"]
    said = _run([python, script, "-i", folder, *lengths, *how], cwd=Path(script).parent)
    return {
        "ttft_ms": _number(r"Median Time to First Token: ([\d.]+) ms", said),
        "tpot_ms": _number(r"Median Token Generation Latency \(per token\): ([\d.]+) ms", said),
    }


def with_threads(folder: Path, threads: int, place: Path) -> Path:
    """The same genai folder with the number of threads in its config, which the tool has no option for."""
    for file in folder.iterdir():
        (place / file.name).symlink_to(file.absolute())
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (place / "genai_config.json").unlink()
    (place / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return place


def llama_tool(program: str, folder: str, threads: int) -> Figures:
    """llama.cpp's llama-bench: a prompt, and tokens behind a prompt of the same length."""
    (file,) = Path(folder).glob("*.gguf")
    command = [program, "-m", file, "-t", threads, "-fa", 1, "-r", REPETITIONS, "-o", "json"]
    prompt = json.loads(_run([*command, "-p", PROMPT, "-n", 0]))[0]
    steps = json.loads(_run([*command, "-p", 0, "-n", NEW, "-d", PROMPT]))[0]
    return {
        "ttft_ms": statistics.median(prompt["samples_ns"]) / 1e6,
        "tpot_ms": statistics.median(steps["samples_ns"]) / 1e6 / NEW,
    }


def _run(command: Sequence[object], cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def _number(pattern: str, said: str) -> float:
    match = re.search(pattern, said)
    if match is None:
        raise SystemExit(f"the tool did not say {pattern!r}: {said[-300:]}")
    return float(match[1])


def engines(given: argparse.Namespace, threads: int, scratch: Path) -> dict[str, tuple[list[str], Tool, str]]:
    """By name: the profiler's worker, the tool, and what the tool is."""
    found: dict[str, tuple[list[str], Tool, str]] = {}
    session = ["-m", "benchmarks.peers.session"]
    if given.genai:
        python, script, given_folder = given.genai
        folder = str(with_threads(Path(given_folder), threads, scratch))
        worker = [python, *session, "genai", folder, "--threads", str(threads)]
        found["onnxruntime-genai"] = (worker, lambda: genai_tool(python, script, folder), "benchmark_e2e.py")
    if given.llama:
        own, program, gguf = given.llama
        worker = [
            own,
            *session,
            "llamacpp",
            gguf,
            "--threads",
            str(threads),
            "--options",
            '{"form": "Q4_0", "pure": true}',
        ]
        found["llama.cpp"] = (worker, lambda: llama_tool(program, gguf, threads), "llama-bench")
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all engines."""
    os.environ["PYTHONPATH"] = str(ROOT)
    machine = detect()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="validation-")))
        chosen = engines(given, machine.threads, scratch)
        rounds: dict[str, list[dict[str, Figures]]] = {name: [] for name in chosen}
        workers = {
            name: stack.enter_context(WorkerProcess(name, command, threads=machine.threads))
            for name, (command, _, _) in chosen.items()
        }
        for round_ in range(given.rounds):
            for name, (_, tool, _) in chosen.items():
                rounds[name].append({"ours": ours(workers[name], round_), "tool": tool()})
                print(f"round {round_ + 1} {name}: {rounds[name][-1]}", file=sys.stderr)
    commit = _run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]).strip()
    return {
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit,
        "cpu": machine.cpu,
        "threads": machine.threads,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "repetitions": REPETITIONS,
        "tools": {name: tool for name, (_, _, tool) in chosen.items()},
        "rounds": rounds,
    }


def agreement(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Medians of both sides over rounds, and the median of their ratios with its 95 % bootstrap interval."""
    table = np.array(pairs)
    ratios = table[:, 0] / table[:, 1]
    low, high = interval(draws(ratios, lambda drawn: np.median(drawn, axis=-1), 0))
    return {
        "ours": float(np.median(table[:, 0])),
        "tool": float(np.median(table[:, 1])),
        "ratio": float(np.median(ratios)),
        "interval": [low, high],
        "spread": float(np.ptp(np.percentile(table[:, 1], [25, 75])) / np.median(table[:, 1])),
    }


_HEAD = """# How far the profiler's figures can be trusted

Written by `python benchmarks/validation.py` from `benchmarks/results/validation.json`; do not edit it by hand.

## Against other engines' own tools

{cpu}, {threads} threads; {made}, commit {commit}; the SmolLM2-135M shape, random weights in 4 bits, prompts of
{prompt_tokens} tokens, {new_tokens} new ones. In each round the profiler drives the engine ({repetitions} requests,
each with a prompt of its own, and one before them that does not count), then the engine's own tool measures the same
files ({repetitions} repetitions), both on the same number of threads. Noise is the interquartile range of the tool's
own figure over rounds.

| engine | tool | figure | profiler (ms) | tool (ms) | profiler / tool, 95 % interval | noise | agree |
|---|---|---|---|---|---|---|---|
"""
_TAIL = """
They agree where the interval of the ratio holds 1, or where the ratio is off by no more than the tool's own noise.
Where they do not, the clocks start at different moments: the profiler's when a request arrives, so making the generator
and its cache is in its time to the first token, benchmark_e2e.py's after that was done. The profiler's time also has
the choice of the token, llama-bench's does not.

## Against theory

The load generator knows only a session that answers, so in the tests it drives one with a known service time and a
clock of its own:

- Poisson arrivals: gaps are exponential (Kolmogorov-Smirnov at 1 %), neighbouring gaps are uncorrelated, counts in
  windows have their mean as variance (`tests/profiling/test_arrivals.py`).
- Fixed service times under Poisson arrivals are an M/D/1 queue: at loads of 0.3, 0.6 and 0.8 the mean wait is within
  8 % of Pollaczek and Khinchine's, and the share that does not wait within 0.02 of 1 - load
  (`tests/profiling/test_driving.py`).
- One stalled request makes those behind it late by what they waited: no coordinated omission (the same file).
- Bootstrap intervals of a mean have the width that theory gives (`tests/profiling/test_statistics.py`).

What a load needs in machines is checked against this load generator too: [selection.md](selection.md).
"""


def page(data: dict[str, Any]) -> str:
    """docs/validation.md."""
    rows = []
    for name, rounds in data["rounds"].items():
        for figure, title in (("ttft_ms", "time to the first token"), ("tpot_ms", "time per output token")):
            found = agreement([(one["ours"][figure], one["tool"][figure]) for one in rounds])
            low, high = found["interval"]
            agrees = low <= 1 <= high or abs(found["ratio"] - 1) <= found["spread"]
            ratio = f"{found['ratio']:.3f} ({low:.3f} to {high:.3f}), {len(rounds)} rounds"
            cells = (name, data["tools"][name], title, f"{found['ours']:.3g}", f"{found['tool']:.3g}", ratio)
            rows.append(f"| {' | '.join(cells)} | {found['spread']:.0%} | {'yes' if agrees else '**no**'} |\n")
    return _HEAD.format(**data) + "".join(rows) + _TAIL


def main() -> None:
    """Measure and write, or write alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genai", nargs=3, metavar=("PYTHON", "SCRIPT", "FOLDER"))
    parser.add_argument("--llama", nargs=3, metavar=("PYTHON", "LLAMA_BENCH", "FOLDER"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--report-only", action="store_true")
    given = parser.parse_args()
    if not given.report_only:
        RESULTS.write_text(json.dumps(measure(given), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
