"""From the engine's thread to the event loop: the events of one HTTP request, bounded, and cancelled when nobody reads.

The engine calls back from its own thread and must not wait, so events go into a buffer under a lock and the loop is
woken once for as many as have come. A reader that falls further behind than the buffer holds loses its request rather
than the server its memory. Leaving a `Run` cancels what is still running, whatever the reason was. Knows no endpoint.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol, Self, TypeVar

from fastapi import Request as HttpRequest

from slmdeploy.runtime.requests import EngineStats, Event, Failed, Finished, Request, ScoreEvent, Ticket
from slmdeploy.serving.failures import ApiError

T = TypeVar("T")
_LAST = (Finished, ScoreEvent, Failed)


class EngineLike(Protocol):
    """What the server needs of runtime.engine.Engine; tests have a scripted one."""

    def start(self) -> None: ...
    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Ticket: ...
    def cancel(self, ticket: Ticket) -> None: ...
    def close(self) -> None: ...
    def stats(self) -> EngineStats: ...


class SlowReaderError(ApiError):
    """A stream whose reader fell further behind than is kept for it."""

    def __init__(self) -> None:
        super().__init__(408, "The answer was read too slowly and was ended.", code="slow_reader")


class Run:
    """The requests to the engine that one HTTP request comes to; `async with` it, and iterate over their events."""

    def __init__(self, engine: EngineLike, requests: Sequence[Request], limit: int | None) -> None:
        self._engine, self._requests, self._limit = engine, requests, limit
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._buffer: deque[tuple[int, Event]] = deque()
        self._woken = False
        self._too_slow = False
        self._arrived = asyncio.Event()
        self._tickets: dict[int, Ticket] = {}

    async def __aenter__(self) -> Self:
        """Submit all; where one does not fit into the queue, none runs and its error is raised."""
        self.submit()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def submit(self) -> None:
        """What entering does, for an answer that is written after the handler has returned."""
        for source, request in enumerate(self._requests):
            try:
                self._tickets[source] = self._engine.submit(request, self._receiver(source))
            except BaseException:
                self.cancel()
                raise

    def cancel(self) -> None:
        """End what has not ended; its slot is free after the engine's next step."""
        for source in list(self._tickets):
            self._engine.cancel(self._tickets.pop(source))

    def _receiver(self, source: int) -> Callable[[Event], None]:
        def receive(event: Event) -> None:
            with self._lock:
                self._too_slow |= self._limit is not None and len(self._buffer) >= self._limit
                if not self._too_slow:
                    self._buffer.append((source, event))
                wake, self._woken = not self._woken, True
            if wake:
                with suppress(RuntimeError):  # the loop has closed: nobody waits any more
                    self._loop.call_soon_threadsafe(self._wake)

        return receive

    def _wake(self) -> None:
        with self._lock:
            self._woken = False
        if self._too_slow:
            self.cancel()
        self._arrived.set()

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """The events, each with the number of its request, until every request has ended.

        Raises the error of a request that failed, and SlowReaderError where events had to be dropped.
        """
        left = len(self._requests)
        while left:
            await self._arrived.wait()
            self._arrived.clear()
            if self._too_slow:
                raise SlowReaderError
            for source, event in self._taken():
                if isinstance(event, Failed):
                    self._tickets.pop(source, None)
                    raise event.error
                if isinstance(event, _LAST):
                    self._tickets.pop(source, None)
                    left -= 1
                yield source, event

    def _taken(self) -> list[tuple[int, Event]]:
        with self._lock:
            taken = list(self._buffer)
            self._buffer.clear()
        return taken


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client has hung up: nobody would read it."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "The client has hung up.", code="client_gone")
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
