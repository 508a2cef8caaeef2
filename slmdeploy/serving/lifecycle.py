"""From loading to the end: whether the server takes requests, how many are in flight, and a drain that waits for them.

States go one way: loading, ready, draining; broken when loading or the engine failed. Knows neither engine nor HTTP
server; both are told what to do by whoever holds this.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from slmdeploy.serving.auth import OPEN
from slmdeploy.serving.failures import ApiError

State = Literal["loading", "ready", "draining", "broken"]
_TELLS = {
    "loading": "The model is being loaded: try again in a moment.",
    "draining": "The server is stopping and takes no new requests.",
    "broken": "The model cannot compute; the server's log says why.",
}


class Lifecycle:
    """Where the server stands."""

    def __init__(self) -> None:
        self._state: State = "loading"
        self._in_flight = 0
        self._healthy: Callable[[], bool] = lambda: True

    @property
    def state(self) -> State:
        """Now; a server whose engine has died is broken, whatever it was."""
        return self._state if self._healthy() else "broken"

    @property
    def in_flight(self) -> int:
        """Requests between arrival and the end of their answer."""
        return self._in_flight

    def loaded(self, healthy: Callable[[], bool]) -> None:
        """The model is there; `healthy` is asked from now on. A drain that has begun meanwhile goes on."""
        self._healthy = healthy
        if self._state == "loading":
            self._state = "ready"

    def failed(self) -> None:
        """The model could not be loaded."""
        self._state = "broken"

    def count(self, change: int) -> None:
        """A request more or fewer in flight."""
        self._in_flight += change

    async def drain(self, seconds: float) -> int:
        """Take no more and wait for what is in flight, at most so long; how many were left."""
        self._state = "draining"
        end = time.monotonic() + seconds
        while self._in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return self._in_flight


class Gate:
    """Middleware that answers 503 unless the server is ready, and 429 where `most` requests are in flight already.

    Probes, figures and the page pass.
    """

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, most: int) -> None:
        self._app, self._lifecycle, self._most = app, lifecycle, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        refusal = self._refusal() if scope["type"] == "http" and scope["path"] not in OPEN else None
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self) -> ApiError | None:
        state = self._lifecycle.state
        if state != "ready":
            return ApiError(503, _TELLS[state], code=state)
        if self._lifecycle.in_flight > self._most:  # this one is counted already
            return ApiError(429, f"{self._most} requests are in flight, as many as may: try again.", code="queue_full")
        return None
