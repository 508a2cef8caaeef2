"""Server-sent events: one JSON object a line, `[DONE]` at the end, an error as an object in place of what is missing.

A client that hangs up, and one that takes nothing for too long, end the answer, and with it the work behind it. Knows
nothing of what the events say.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from slmdeploy.errors import SlmdeployError
from slmdeploy.serving.failures import ApiError, of_runtime

DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Neither caches nor proxies may hold events back."""
_log = logging.getLogger("slmdeploy.serving")


def event(value: object) -> str:
    """One event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def with_errors(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The events, then `[DONE]`; an error on the way becomes the last event, since the status has long gone out."""
    try:
        async with aclosing(events):
            async for each in events:
                yield each
        yield DONE
    except ApiError as error:
        yield event(error.body())
    except SlmdeployError as error:
        yield event(of_runtime(error).body())


class EventStream(StreamingResponse):
    """A response of events; however it ends, `on_end` is called and the generator closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], stall_s: float, on_end: Callable[[], None]) -> None:
        super().__init__(events, headers=HEADERS)
        self._events, self._stall_s, self._on_end = events, stall_s, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, the client's or that of its patience."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._stall_s):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            _log.warning("a client took nothing of its stream for %g s and was let go", self._stall_s)
        finally:
            self._on_end()  # a generator that was never begun does not run its own end
            await self._events.aclose()
