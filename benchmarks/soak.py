"""Soaks a server in mixed and hostile requests and looks for leaks, wrong answers and slots that stay taken.

    python benchmarks/soak.py BUILD --minutes 20 --results benchmarks/results/soak.json

Starts `slmdeploy serve BUILD` and sends it, in random order: generations read to the end or slowly, whole answers,
scores, streams that are left at once or half-way, bodies that are no JSON, have unknown fields, end too early or are
too large, and prompts that no context holds (servers/mixed.py). Every answer must be what the model says alone, up to
ties (servers/greedy.py); every bad request must be refused by its status. Afterwards nothing may be running or queued,
no more files be open than when the load began, and memory (servers/memory.py) may not have grown beyond GROWTH. With
--minutes the rounds of requests go on so long. The last line on stdout is one JSON object; exit code 1 where something
was wrong.
"""

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers.page import about  # the path above is what finds it
from benchmarks.peers.setup import ROOT
from benchmarks.servers.greedy import Greedy
from benchmarks.servers.memory import Growth, Sample, growth, open_files, watched
from benchmarks.servers.mixed import NEW_TOKENS, Soak

GROWTH = 0.05
"""Share of the settled memory by which it may grow, besides _ALLOWED_BYTES for allocators that keep what they had."""
_ALLOWED_BYTES = 8 << 20
_SAMPLES = 60
"""Of memory, at most so many go into the results."""
_START_S = 120.0
Json = dict[str, Any]


@contextmanager
def served(build: Path, threads: int) -> Iterator[tuple[str, int]]:
    """The address of `slmdeploy serve` on a free port, and its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "slmdeploy", "serve", str(build), "--port", str(port), "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + _START_S
    try:
        while process.poll() is None and time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=_START_S).close()
                break
            except (OSError, http.client.HTTPException):
                time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit(f"`{' '.join(command)}` ended with {process.returncode}: run it to see why")
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(_START_S)


@dataclass(frozen=True)
class Ended:
    """What a soak found: memory over time, what was held and which files were open before the load and after it."""

    samples: list[Sample]
    files: tuple[int, int]
    held: dict[str, float]
    minutes: float


def soaked(soak: Soak, pid: int, options: argparse.Namespace) -> Ended:
    """Rounds of requests until there were enough, for long enough; a line a round."""
    soak.run(options.requests // 5, options.clients, seed=-1)
    soak.asked.clear()
    soak.calm()
    files, started, rounds = open_files(pid), time.monotonic(), 0
    with watched(pid, options.every) as samples:
        while rounds < 5 or time.monotonic() - started < 60 * options.minutes:
            soak.run(max(1, options.requests // 5), options.clients, seed=rounds)
            rounds += 1
            _say(soak, samples, (time.monotonic() - started) / 60)
    held = soak.calm()
    return Ended(samples, (files, open_files(pid)), held, (time.monotonic() - started) / 60)


def _say(soak: Soak, samples: list[Sample], minutes: float) -> None:
    size = f"{samples[-1][1] / 1e6:.1f} MB" if samples else "memory not looked at yet"
    print(f"{minutes:.1f} min: {soak.asked.total()} requests, {size}, {len(soak.problems)} problems", flush=True)


def judged(soak: Soak, ended: Ended) -> tuple[Growth, list[str]]:
    """The growth of memory, and all that was wrong."""
    found, problems = growth(ended.samples), list(soak.problems)
    if found.growth_bytes > GROWTH * found.settled_bytes + _ALLOWED_BYTES:
        sizes = f"{found.growth_bytes / 1e6:.1f} MB over {found.settled_bytes / 1e6:.1f} MB"
        problems.append(f"memory grew by {sizes}")
    if ended.files[1] > ended.files[0]:
        problems.append(f"{ended.files[1]} files are open, {ended.files[0]} were before the load")
    problems += [f"{name} is {value:g} when all is over" for name, value in ended.held.items() if value]
    return found, problems


def results_of(soak: Soak, ended: Ended, precision: str, options: argparse.Namespace) -> Json:
    """The committed results: where and of what, what was asked, what came of it."""
    found, problems = judged(soak, ended)
    every = -(-len(ended.samples) // _SAMPLES)
    return {
        "format": 1,
        **about(ROOT, options.threads),
        "uncommitted_changes": _changed(),
        "build": precision,
        "clients": options.clients,
        "minutes": round(ended.minutes, 2),
        "requests": soak.asked.total(),
        "kinds": dict(sorted(soak.asked.items())),
        "settled_bytes": found.settled_bytes,
        "growth_bytes": found.growth_bytes,
        "slope_bytes_per_minute": round(60 * found.slope_bytes_per_s),
        "memory_bytes": [[round(at, 1), size] for at, size in ended.samples[::every]],
        "open_files": list(ended.files),
        "held": ended.held,
        "problems": problems[:50],
        "passed": not problems,
    }


def _changed() -> bool:
    """Whether the code that was run differs from the commit that is named."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "slmdeploy"]
    return bool(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    """Soak a build's server; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--requests", type=int, default=1000, help="at least; five rounds of a fifth of them")
    parser.add_argument("--minutes", type=float, default=0.0, help="at least")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two looks at memory")
    parser.add_argument("--results", type=Path, help="write the results here too")
    options = parser.parse_args()
    runtime = json.loads((options.build / "runtime.json").read_text())
    # So that who ends this ends the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    judge = Greedy(options.build)
    with served(options.build, options.threads) as (url, pid):
        soak = Soak(url, lambda prompt, text, whole: judge.accepts(prompt, text, NEW_TOKENS, whole))
        soak.learn(scores="score" in runtime["tasks"])
        ended = soaked(soak, pid, options)
    results = results_of(soak, ended, runtime["precision"], options)
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
