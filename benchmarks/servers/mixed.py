"""What a soaked server is asked: kinds of requests, right and hostile, and whether each answer was as it should be.

A complete answer must be one that `right` accepts (servers/greedy.py), scores those that came when nothing else ran,
and every bad request must be refused by its status. Knows the server by its HTTP interface alone.
"""

import http.client
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PROMPTS = ("a", "one two three", "def f(x):\n    return", "the same words, the same words, the same")
NEW_TOKENS = 24
_ITEMS = ("first", "second", "a third one")
_TIMEOUT_S = 120.0
_CALM_S = 30.0
Json = dict[str, Any]
Right = Callable[[str, str, bool], bool]
"""Prompt, text, and whether the text is a whole answer or the beginning of one."""


@dataclass
class Soak:
    """A server under test: what it should say, what was asked, and everything that was wrong.

    long_words: of a prompt that no context of the served model holds. scores: None where the model does not score.
    """

    url: str
    right: Right
    long_words: int = 40_000
    model: str = ""
    scores: list[float] | None = None
    asked: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def learn(self, *, scores: bool) -> None:
        """Ask for the model's name and, of one that scores, for the scores while nothing else runs."""
        self.model = json.loads(self.get("/v1/models"))["data"][0]["id"]
        if scores:
            self.scores = self._scored()

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
        return {"model": self.model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, **more}

    def _whole(self, prompt: str) -> str:
        status, data = self._post("/v1/completions", self._body(prompt))
        return str(json.loads(data)["choices"][0]["text"]) if status == 200 else f"status {status}: {data[:200]!r}"

    def _scored(self) -> list[float]:
        status, data = self._post("/score", {"prefix": PROMPTS[1], "items": list(_ITEMS)})
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

    def _gone(self, prompt: str) -> None:
        """A stream whose client hangs up before it can have read anything."""
        with self._connection() as connection:
            body = json.dumps(self._body(prompt, stream=True))
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})

    def one(self, kind: str, rng: random.Random) -> None:
        """One request of a kind; what is wrong with its answer is noted."""
        prompt = rng.choice(PROMPTS)
        as_it_should: dict[str, Callable[[], bool]] = {
            "whole": lambda: self.right(prompt, self._whole(prompt), True),
            "stream": lambda: self.right(prompt, self._streamed(prompt), True),
            "slow reader": lambda: self.right(prompt, self._streamed(prompt, pause_s=0.02), True),
            "left": lambda: self.right(prompt, self._streamed(prompt, most=rng.randint(1, 6)), False),
            "gone": lambda: self._gone(prompt) is None,
            "score": lambda: _near(self._scored(), self.scores or []),
            "no json": lambda: self._refused(b'{"model": '),
            "unknown field": lambda: self._refused(self._body(prompt, nonsense=1)),
            "long prompt": lambda: self._refused(self._body("word " * self.long_words)),
            "large body": lambda: self._refused(b" " * (6 << 20)),
            "half a request": lambda: self._half_a_request() is None,
        }
        try:
            problem = None if as_it_should[kind]() else "the answer is wrong"
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
        kinds = ["whole", "stream", "slow reader", "left", "left", "gone", "half a request"]
        kinds += ["no json", "unknown field", "long prompt", "large body"]
        kinds += ["score", "score"] if self.scores is not None else []
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
