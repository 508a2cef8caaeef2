"""A real server on a free port in a thread, and an engine that does as a test tells it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2
import uvicorn
from fastapi import FastAPI

from slmdeploy.runtime.requests import (
    ChoiceDone,
    EngineStats,
    Event,
    Finished,
    GenerateRequest,
    Request,
    Ticket,
    TokenEvent,
    Usage,
)
from slmdeploy.serving import server

PATIENCE_S = 60.0
"""Of a machine on which much else runs; only a test that fails waits so long."""


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it came true within the patience of a test."""
    end = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@contextmanager
def running(app: FastAPI, stall_s: float = 5.0, *, ready: bool = True) -> Iterator[str]:
    """The URL of the application under uvicorn, once it is ready."""
    bound = server.listen("127.0.0.1", 0, stall_s)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    under = uvicorn.Server(config)
    thread = threading.Thread(target=under.run, args=([bound],))
    thread.start()
    try:
        assert wait_for(lambda: under.started)
        assert not ready or wait_for(lambda: app.state.lifecycle.state == "ready")
        yield server.address_of(bound)
    finally:
        under.should_exit = True
        thread.join()


def client(url: str, **options: object) -> httpx2.Client:
    """A plain client, with the patience of a test."""
    return httpx2.Client(base_url=url, timeout=PATIENCE_S, **options)  # type: ignore[arg-type]


@dataclass
class _Running:
    request: GenerateRequest
    on_event: Callable[[Event], None]


class ScriptedEngine:
    """Requests stay as they are until the test says what happens: `say`, `finish`, or the client's cancelling."""

    def __init__(self) -> None:
        self.running: dict[int, _Running] = {}
        self.cancelled: list[int] = []
        self.refusal: Exception | None = None
        self.opening = threading.Event()
        self.opening.set()
        self._number = 0

    def start(self) -> None:
        assert self.opening.wait(PATIENCE_S)

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket:
        if self.refusal is not None:
            raise self.refusal
        assert isinstance(request, GenerateRequest)
        self._number += 1
        self.running[self._number] = _Running(request, on_event)
        return Ticket(self._number)

    def cancel(self, ticket: Ticket) -> None:
        if self.running.pop(ticket.number, None):
            self.cancelled.append(ticket.number)

    def close(self) -> None:
        self.running.clear()

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.running), batch_sizes={1: 3, 4: 2}, cache_hit_tokens=7)

    def one(self) -> int:
        """The number of the request that has come."""
        assert wait_for(lambda: bool(self.running))
        return max(self.running)

    def say(self, number: int, *texts: str) -> None:
        """Tokens of the first choice."""
        for text in texts:
            self.running[number].on_event(TokenEvent(0, 5, text, -1.5, ((5, -1.5), (6, -2.0))))

    def finish(self, number: int, reason: str = "stop", rest: str = "") -> None:
        """The end of every choice, and of the request."""
        run = self.running.pop(number)
        for choice in range(run.request.n):
            run.on_event(ChoiceDone(choice, reason, rest))  # type: ignore[arg-type]
        run.on_event(Finished(Usage(len(run.request.prompt_ids), 2, 3)))
