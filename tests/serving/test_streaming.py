"""Streams end for readers that do not read: events beyond the buffer, and a send that stalls; errors become events."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from urllib.parse import urlsplit

from slmdeploy.errors import InputError
from slmdeploy.runtime.model import load
from slmdeploy.serving.app import create_app
from slmdeploy.serving.settings import ServerSettings
from slmdeploy.serving.streaming import DONE, EventStream, event, with_errors
from tests.serving.live import ScriptedEngine, running, wait_for

BODY = b'{"model": "tiny", "prompt": "hello", "stream": true}'


async def _letters(fail: bool) -> AsyncGenerator[str, None]:
    yield event("a")
    if fail:
        raise InputError("No more letters.")


async def _all(fail: bool) -> list[str]:
    return [each async for each in with_errors(_letters(fail))]


def test_a_stream_ends_with_done_or_with_its_error() -> None:
    assert asyncio.run(_all(False)) == ['data: "a"\n\n', DONE]
    *_, last = asyncio.run(_all(True))
    assert '"message":"No more letters."' in last


def test_an_event_is_one_line_whatever_the_text() -> None:
    assert event("a\nb\u2028é") == 'data: "a\\nb\u2028é"\n\n'


def test_a_stream_that_never_began_still_tells_its_end() -> None:
    ended: list[bool] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        await asyncio.sleep(60)

    stream = EventStream(with_errors(_letters(False)), 0.05, lambda: ended.append(True))
    asyncio.run(stream({"type": "http"}, receive, send))
    assert ended == [True]


def test_a_reader_that_stalls_is_let_go() -> None:
    ended: list[bool] = []

    async def receive() -> dict[str, object]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(_: object) -> None:
        await asyncio.sleep(60)

    stream = EventStream(with_errors(_letters(False)), 0.05, lambda: ended.append(True))
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 10))
    assert ended == [True]


def test_a_reader_that_reads_nothing_loses_its_request_not_the_server_its_memory(decoder: Path) -> None:
    engine = ScriptedEngine()
    app = create_app(load(decoder), ServerSettings(stream_events=16, stall_s=0.5), engine=engine)
    with running(app) as url, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", urlsplit(url).port))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}"
        )
        lazy.sendall(head.encode() + b"\r\n\r\n" + BODY)
        number = engine.one()
        text = "x" * 65536
        for _ in range(200):
            if number in engine.running:
                engine.say(number, text)
        assert wait_for(lambda: engine.cancelled == [number])
        assert wait_for(lambda: app.state.lifecycle.in_flight == 0)
