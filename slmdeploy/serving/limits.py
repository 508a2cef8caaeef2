"""How large a request's body may be, and how long it may take to arrive.

FastAPI has a limit on size too, whose refusal is plain text; clients of this server read OpenAI's form. A client that
sends a byte now and then would hold a connection and its memory for ever. Knows no endpoint.
"""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slmdeploy.serving.failures import ApiError


class BodyLimits:
    """Middleware that answers 413 where a body is larger than `most` bytes, and 408 where it takes too long."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(_announced(scope))
            body = await asyncio.wait_for(self._read(receive), self._seconds)
        except ApiError as error:
            # The rest of the body is still on its way, so the connection is of no use any more.
            await error.response({"Connection": "close"})(scope, receive, send)
        except TimeoutError:
            late = ApiError(408, f"The body was not there after {self._seconds:g} s.")
            await late.response({"Connection": "close"})(scope, receive, send)
        else:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> list[Message]:
        messages, size = [], 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            self._check(size)
            if not message.get("more_body", False):
                return messages

    def _check(self, size: int) -> None:
        if size > self._most:
            raise ApiError(413, f"The body is larger than {self._most} bytes, the most that this server takes.")


def _announced(scope: Scope) -> int:
    length = Headers(scope=scope).get("content-length", "0")
    return int(length) if length.isdecimal() else 0


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """What gives the messages that were read, then whatever comes: the client's hanging up."""
    left = list(reversed(messages))

    async def replayed() -> Message:
        return left.pop() if left else await receive()

    return replayed
