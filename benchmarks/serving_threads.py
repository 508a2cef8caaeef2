"""What HTTP takes from the engine: tokens per second and gaps between tokens, alone and behind `slmdeploy serve`.

    python benchmarks/serving_threads.py BUILD [--threads 1 2] [--clients 8] [--rounds 5]

For each number of threads there is an engine in this process and one in a server's. They take turns in an order that
rotates; in a turn `clients` requests begin at once, the same ones for all, and stream greedy tokens to their ends. A
token's time is taken where it arrives: in the receiver of the engine's event, or in a client's thread, whose work this
machine does as well. Writes benchmarks/results/serving_threads.json and the table between the markers of
docs/engine.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slmdeploy.profiling.hardware import detect
from slmdeploy.profiling.live_http import Server, answer, first_model
from slmdeploy.runtime.bundle import read_manifest, read_runtime
from slmdeploy.runtime.engine import Engine
from slmdeploy.runtime.generation import Settings
from slmdeploy.runtime.model import load
from slmdeploy.runtime.requests import EngineSettings, Event, Failed, Finished, GenerateRequest, TokenEvent

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- serving_threads -->\n", "<!-- /serving_threads -->\n"
WAYS = ("engine alone", "behind HTTP")
PATIENCE_S = 120.0
Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Turn:
    """What came of the requests of one turn: the times of each one's tokens, ms behind its sending, and of all."""

    stamps_ms: Sequence[Sequence[float]]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Over all requests, from the first sending to the last token."""
        return sum(map(len, self.stamps_ms)) / self.seconds

    @property
    def gaps_ms(self) -> list[float]:
        """Between two tokens of a request."""
        return [later - earlier for stamps in self.stamps_ms for earlier, later in pairwise(stamps)]


class Way(Protocol):
    """An engine, however it is reached."""

    def turn(self, prompts: Prompts, new_tokens: int) -> Turn: ...


class Alone:
    """An engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def turn(self, prompts: Prompts, new_tokens: int) -> Turn:
        """See Way."""
        settings = Settings(max_new_tokens=new_tokens, ignore_eos=True)
        began = time.perf_counter()
        waiting = [_Stamps(began) for _ in prompts]
        for prompt, stamps in zip(prompts, waiting, strict=True):
            self._engine.submit(GenerateRequest(prompt, settings), stamps)
        return Turn([stamps.result() for stamps in waiting], time.perf_counter() - began)


class _Stamps:
    """Takes the events of a request, and the times of its tokens."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._stamps: list[float] = []
        self._last: Event | None = None
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, TokenEvent):
            self._stamps.append(1e3 * (time.perf_counter() - self._began))
        elif isinstance(event, Finished | Failed):
            self._last = event
            self._ended.set()

    def result(self) -> list[float]:
        if not self._ended.wait(PATIENCE_S) or not isinstance(self._last, Finished):
            raise SystemExit(f"a request of the engine had no answer: {self._last}")
        return self._stamps


class BehindHttp:
    """A server in a process of its own, and a thread here for each client."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def turn(self, prompts: Prompts, new_tokens: int) -> Turn:
        """See Way."""

        def ask(prompt: tuple[int, ...]) -> list[float]:
            request = {"prompt": prompt, "new_tokens": new_tokens}
            stamps: list[float] = answer(self._server, request, "generate", PATIENCE_S)["stamps_ms"]
            return stamps

        with ThreadPoolExecutor(len(prompts)) as pool:
            began = time.perf_counter()
            stamps = list(pool.map(ask, prompts))
            return Turn(stamps, time.perf_counter() - began)


@contextmanager
def engine_alone(build: Path, threads: int, clients: int) -> Iterator[Way]:
    """An engine over a model of its own."""
    with Engine(load(build, threads=threads, verify=False), EngineSettings(slots=clients)) as engine:
        yield Alone(engine)


@contextmanager
def server_process(build: Path, threads: int, clients: int) -> Iterator[Way]:
    """`slmdeploy serve` with as many slots as there are clients, once it takes requests."""
    command = [sys.executable, "-m", "slmdeploy", "serve", str(build.resolve()), "--port", "0"]
    command += ["--threads", str(threads), "--slots", str(clients)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None, "its first line is the URL"
            url = process.stdout.readline().strip()
            wait_until_ready(url)
            yield BehindHttp(Server(url, first_model(Server(url), PATIENCE_S)))
        finally:
            process.terminate()


def wait_until_ready(url: str) -> None:
    """Return when the server takes requests."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=PATIENCE_S):
                return
        except (urllib.error.URLError, ValueError):
            time.sleep(0.1)
    raise SystemExit(f"the server at {url!r} does not become ready")


def measure(
    ways: dict[tuple[int, str], Way], *, rounds: int, clients: int, prompt_tokens: int, new_tokens: int, vocab: int
) -> dict[tuple[int, str], list[Turn]]:
    """The turns of each way; the first round warms up and does not count."""
    random = np.random.default_rng(0)
    keys = list(ways)
    found: dict[tuple[int, str], list[Turn]] = {key: [] for key in keys}
    for round_ in range(rounds + 1):
        prompts = [tuple(prompt) for prompt in random.integers(0, vocab, (clients, prompt_tokens)).tolist()]
        start = round_ % len(keys)
        for key in (*keys[start:], *keys[:start]):
            turn = ways[key].turn(prompts, new_tokens)
            if round_:
                found[key].append(turn)
    return found


def rows_of(found: dict[tuple[int, str], list[Turn]]) -> list[dict[str, Any]]:
    """One line for each way: the median over turns of tokens per second, and percentiles over all gaps."""
    rows = []
    for (threads, way), turns in found.items():
        gaps = [gap for turn in turns for gap in turn.gaps_ms]
        speeds = [turn.tokens_per_s for turn in turns]
        p50, p99 = np.percentile(gaps, [50, 99])
        rows.append(
            {
                "threads": threads,
                "way": way,
                "tokens_per_s": statistics.median(speeds),
                "slowest_turn": min(speeds),
                "fastest_turn": max(speeds),
                "itl_ms_p50": float(p50),
                "itl_ms_p99": float(p99),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The lines in Markdown, each beside the engine alone with as many threads."""
    alone = {row["threads"]: row for row in rows if row["way"] == WAYS[0]}
    lines = [
        "| threads | | tokens/s (slowest to fastest turn) | of alone | between tokens, p50 (ms) | p99 (ms) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = row["tokens_per_s"] / alone[row["threads"]]["tokens_per_s"]
        spread = f"{row['slowest_turn']:.3g} to {row['fastest_turn']:.3g}"
        lines.append(
            f"| {row['threads']} | {row['way']} | {row['tokens_per_s']:.3g} ({spread}) | {share:.0%} | "
            f"{row['itl_ms_p50']:.3g} | {row['itl_ms_p99']:.3g} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print the table, write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="a build with the task generate")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/serving_threads.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/engine.md")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    ways: dict[tuple[int, str], Way] = {}
    with ExitStack() as stack:
        for threads in options.threads:
            for way, opened in zip(WAYS, (engine_alone, server_process), strict=True):
                ways[threads, way] = stack.enter_context(opened(options.build, threads, options.clients))
        sizes = {name: getattr(options, name) for name in ("rounds", "clients", "prompt_tokens", "new_tokens")}
        rows = rows_of(measure(ways, **sizes, vocab=read_runtime(options.build).vocab_size))
    about: dict[str, Any] = {
        "build": options.build.name,
        "content_key": read_manifest(options.build).content_key,
        "machine": detect(bench=False).cpu,
        "cores": os.cpu_count(),
        "load_before": load_before,
        **sizes,
    }
    write(about, rows, options.results, options.page)


def write(about: dict[str, Any], rows: list[dict[str, Any]], results: Path, page: Path) -> None:
    """Print the table; write all figures, and the table with what it was measured on between the page's markers."""
    said = (
        f"`{about['build']}` on {about['cores']} cores of {about['machine']}, {about['clients']} requests at once of "
        f"{about['prompt_tokens']} + {about['new_tokens']} tokens, {about['rounds']} turns each:"
    )
    text = f"{said}\n\n{table(rows)}"
    print(text)
    results.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
