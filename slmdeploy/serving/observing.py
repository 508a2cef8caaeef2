"""The outermost middleware: every request gets an id, a time of arrival, a line in the log and a place in the figures.

A bug of ours ends here: it is logged with its traceback and tells the client nothing but the request's id. Requests in
flight are counted, since a draining server waits for them. Prompts and answers are not logged here.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slmdeploy.serving.failures import ApiError
from slmdeploy.serving.logs import DETAILS
from slmdeploy.serving.metrics import Figures

REQUEST_ID = "x-request-id"
_SOUND_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = frozenset({"/health", "/ready", "/metrics"})
_log = logging.getLogger("slmdeploy.serving.access")


def note(request: Request, details: Mapping[str, Any]) -> None:
    """Add to the request's line in the log."""
    request.state.details.update(details)


class Observed:
    """Middleware; `in_flight` is told +1 and -1."""

    def __init__(self, app: ASGIApp, figures: Figures, in_flight: Callable[[int], None]) -> None:
        self._app, self._figures, self._in_flight = app, figures, in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _SOUND_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state |= {"request_id": request_id, "arrived": time.monotonic(), "details": {}}
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        self._in_flight(1)
        self._figures.in_flight(1)
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            _log.exception("a bug", extra={DETAILS: {"request_id": request_id}})
            if status:
                raise  # the answer has begun: the connection has to be closed
            known = f"An error of the server; its log has it under request {request_id}."
            await ApiError(500, known, code="bug").response()(scope, receive, send_with_id)
        finally:
            self._in_flight(-1)
            self._figures.in_flight(-1)
            self._ended(scope, status)

    def _ended(self, scope: Scope, status: int) -> None:
        # A path that no route has is the client's text, which neither figures nor log take over.
        path = getattr(scope.get("route"), "path", "unknown")
        self._figures.answered(path, status)
        if path in _QUIET:
            return
        state = scope["state"]
        line = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": path,
            "status": status,
            "ms": round(1e3 * (time.monotonic() - state["arrived"]), 1),
            **state["details"],
        }
        _log.info("answered", extra={DETAILS: line})
