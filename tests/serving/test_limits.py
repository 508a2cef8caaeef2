"""Bodies that are too large or too slow are refused before anything reads them."""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from slmdeploy.runtime.model import load
from slmdeploy.serving.app import create_app
from slmdeploy.serving.settings import ServerSettings
from tests.serving.live import PATIENCE_S, ScriptedEngine, client, running

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def small(decoder: Path) -> Iterator[str]:
    settings = ServerSettings(max_body_bytes=1000)
    with running(create_app(load(decoder), settings, engine=ScriptedEngine())) as url:
        yield url


def spoken(url: str, *parts: bytes) -> bytes:
    """What a server says to bytes as they are."""
    with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=PATIENCE_S) as raw:
        for part in parts:
            raw.sendall(part)
        answer = b""
        while piece := raw.recv(4096):
            answer += piece
    return answer


def test_a_body_beyond_the_limit_is_413(small: str) -> None:
    with client(small) as asking:
        answer = asking.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 2000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_a_body_that_does_not_say_its_size_is_counted(small: str) -> None:
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
    answer = spoken(small, f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk + chunk)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_arrive_is_408(decoder: Path) -> None:
    app = create_app(load(decoder), ServerSettings(body_s=0.2), engine=ScriptedEngine())
    with running(app) as url:
        answer = spoken(url, f"{HEAD}Content-Length: 100\r\n\r\n".encode() + b'{"model"')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer


def test_a_size_that_is_no_number_is_no_crash(small: str) -> None:
    assert spoken(small, f"{HEAD}Content-Length: x\r\n\r\n".encode()).startswith(b"HTTP/1.1 400 ")
