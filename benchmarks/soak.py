"""Soaks a server in mixed and hostile requests and looks for leaks, wrong answers and slots that stay taken.

    python benchmarks/soak.py BUILD [--requests 1000] [--minutes 20] [--clients 8]

Starts `slmdeploy serve BUILD` and sends it, in random order: generations read to the end or slowly, whole answers,
scores, streams that are left half-way, bodies that are no JSON, have unknown fields, end too early or are too large,
and prompts that no context holds. Every answer that is complete must be the one that the same request got alone at the
beginning; every bad request must be refused by its status. Afterwards nothing may be running or queued, and memory may
not have grown since the second fifth beyond GROWTH. With --minutes the rounds of requests go on so long. The last line
on stdout is one JSON object; exit code 1 where something was wrong.
"""

import argparse
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

GROWTH = 0.05
"""Share by which memory may grow, besides _ALLOWED_BYTES for allocators that keep what they had once."""
_ALLOWED_BYTES = 16 << 20
_PROMPTS = ("a", "one two three", "def f(x):\n    return", "the same words, the same words, the same")
_ITEMS = ("first", "second", "a third one")
_NEW = 24
_TIMEOUT_S = 120.0
_CALM_S = 30.0
Json = dict[str, Any]


@dataclass
class Soak:
    """A server under test: what it should say, what was asked, and everything that was wrong.

    long_words: of a prompt that no context of the served model holds.
    """

    url: str
    long_words: int = 40_000
    model: str = ""
    expected: dict[str, Any] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def learn(self, *, scores: bool) -> None:
        """Ask everything once, alone: these are the right answers."""
        self.model = json.loads(self.get("/v1/models"))["data"][0]["id"]
        for prompt in _PROMPTS:
            self.expected[prompt] = self._whole(prompt)
        if scores:
            self.expected["scores"] = self._scored()

    def get(self, path: str) -> str:
        """The body of a GET; OSError where the status is another than 200."""
        with self._connection() as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read().decode()
            if response.status != 200:
                raise OSError(f"{path} answered {response.status}: {body[:200]}")
            return body

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None, "the address has a host"
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_S)
        try:
            yield connection
        finally:
            connection.close()

    def _post(self, path: str, body: Json | bytes) -> tuple[int, bytes]:
        with self._connection() as connection:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()

    def _body(self, prompt: str, **more: Any) -> Json:
        return {"model": self.model, "prompt": prompt, "max_tokens": _NEW, "temperature": 0, **more}

    def _whole(self, prompt: str) -> str:
        status, data = self._post("/v1/completions", self._body(prompt))
        return str(json.loads(data)["choices"][0]["text"]) if status == 200 else f"status {status}: {data[:200]!r}"

    def _scored(self) -> list[float]:
        status, data = self._post("/score", {"prefix": _PROMPTS[1], "items": list(_ITEMS)})
        return [float(score) for score in json.loads(data)["scores"]] if status == 200 else []

    def _streamed(self, prompt: str, *, pause_s: float = 0.0, most: int | None = None) -> str:
        """The text of a stream, read as slowly as asked; left after `most` events."""
        with self._connection() as connection:
            body = json.dumps(self._body(prompt, stream=True))
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text, events = "", 0
            while line := response.readline():
                if not line.startswith(b"data: {"):
                    continue
                time.sleep(pause_s)
                text += "".join(choice["text"] for choice in json.loads(line[6:]).get("choices", ()))
                events += 1
                if most is not None and events >= most:
                    break
            return text

    def _half_a_request(self) -> None:
        parts = urlsplit(self.url)
        with socket.create_connection((parts.hostname, parts.port), _TIMEOUT_S) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")

    def one(self, kind: str, rng: random.Random) -> None:
        """One request of a kind; what is wrong with its answer is noted."""
        prompt = rng.choice(_PROMPTS)
        right: dict[str, Callable[[], bool]] = {
            "whole": lambda: self._whole(prompt) == self.expected[prompt],
            "stream": lambda: self._streamed(prompt) == self.expected[prompt],
            "slow reader": lambda: self._streamed(prompt, pause_s=0.02) == self.expected[prompt],
            "left": lambda: self.expected[prompt].startswith(self._streamed(prompt, most=rng.randint(1, 6))),
            "score": lambda: _near(self._scored(), self.expected.get("scores", [])),
            "no json": lambda: self._refused(b'{"model": '),
            "unknown field": lambda: self._refused(self._body(prompt, nonsense=1)),
            "long prompt": lambda: self._refused(self._body("word " * self.long_words)),
            "large body": lambda: self._refused(b" " * (6 << 20)),
            "half a request": lambda: self._half_a_request() is None,
        }
        try:
            problem = None if right[kind]() else "the answer is wrong"
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            # A server may close the connection on a body that it does not want to read.
            problem = None if kind == "large body" else f"{type(error).__name__}: {error}"
        with self._lock:
            self.asked[kind] += 1
            self.problems += [] if problem is None else [f"{kind}: {problem}"]

    def _refused(self, body: Json | bytes) -> bool:
        return self._post("/v1/completions", body)[0] in (400, 413, 422)

    def run(self, requests: int, clients: int, seed: int) -> None:
        """So many requests in a seeded order, `clients` at a time."""
        kinds = ["whole", "stream", "slow reader", "left", "left", "half a request"]
        kinds += ["no json", "unknown field", "long prompt", "large body"]
        kinds += ["score", "score"] if "scores" in self.expected else []
        order = random.Random(seed)
        with ThreadPoolExecutor(clients) as pool:
            asked = [(order.choice(kinds), random.Random(order.random())) for _ in range(requests)]
            for _ in pool.map(lambda one: self.one(*one), asked):
                pass

    def calm(self) -> dict[str, float]:
        """What is still running, queued and held once the server has had time to let go."""
        until = time.monotonic() + _CALM_S
        while True:
            text = self.get("/metrics")
            names = ("running", "queued", "kv_tokens_used")
            found = {name: float(m[1]) for name in names if (m := re.search(rf"^slmdeploy_{name} (\S+)", text, re.M))}
            if not any(found.values()) or time.monotonic() > until:
                return found
            time.sleep(0.1)


def _near(found: list[float], wanted: list[float]) -> bool:
    return len(found) == len(wanted) and all(abs(a - b) < 1e-4 for a, b in zip(found, wanted, strict=True))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process (Linux)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


@contextmanager
def served(build: Path, threads: int) -> Iterator[tuple[str, int]]:
    """The address of `slmdeploy serve` on a free port, and its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "slmdeploy", "serve", str(build), "--port", str(port), "--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + _TIMEOUT_S
    try:
        while process.poll() is None and time.monotonic() < until:
            try:
                Soak(url).get("/ready")
                break
            except (OSError, http.client.HTTPException):
                time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit(f"`{' '.join(command)}` ended with {process.returncode}: run it to see why")
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(_TIMEOUT_S)


def main() -> int:
    """Soak a build's server; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    started, memory = time.monotonic(), []
    with served(options.build, options.threads) as (url, pid):
        soak = Soak(url)
        soak.learn(scores="score" in json.loads((options.build / "runtime.json").read_text())["tasks"])
        part = max(1, options.requests // 5)
        rounds = 0
        while rounds < 5 or time.monotonic() - started < 60 * options.minutes:
            soak.run(part, options.clients, seed=rounds)
            memory.append(resident_bytes(pid))
            rounds += 1
            print(f"{sum(soak.asked.values())} requests, {memory[-1] / 1e6:.0f} MB, {len(soak.problems)} problems")
        held = soak.calm()
    settled = memory[1]
    if memory[-1] > (1 + GROWTH) * settled + _ALLOWED_BYTES:
        soak.problems.append(f"memory grew from {settled / 1e6:.0f} to {memory[-1] / 1e6:.0f} MB")
    soak.problems += [f"{name} is {value:g} when all is over" for name, value in held.items() if value]
    found = {"requests": sum(soak.asked.values()), "kinds": soak.asked, "memory_bytes": memory, "held": held}
    print(json.dumps({**found, "problems": soak.problems[:50], "minutes": (time.monotonic() - started) / 60}))
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
