"""One request to a live server that speaks OpenAI's HTTP interface, and when its tokens came.

Generation goes to /v1/completions as ids of tokens and comes back as server-sent events; scoring, embedding and
classifying go to /score, /v1/embeddings and /classify as texts. Every request opens its own connection, as a client
that is new does. What a server sends is hostile: lines and bodies have a largest size, and each wait a time limit.
Knows nothing of load or statistics: live_client.py sends many.
"""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from slmdeploy.errors import InputError

Json = dict[str, Any]
LARGEST_BYTES = 64 << 20
_LARGEST_LINE = 1 << 20
_SHOWN = 200


class UnansweredError(Exception):
    """A request that got no answer, and why; too_late: because its time was over."""

    def __init__(self, reason: str, *, too_late: bool = False) -> None:
        super().__init__(reason)
        self.too_late = too_late


@dataclass(frozen=True)
class Server:
    """Where a live server is, the model that is asked for, and the key that it wants; `url` has no /v1 at its end.

    more: fields of a generation's body besides prompt, length, temperature and stream. By default they ask to go on
    behind an end token and to count the tokens; a server that refuses these wants its own.
    """

    url: str
    model: str = ""
    key: str | None = field(default=None, repr=False)
    more: Mapping[str, Any] = field(
        default_factory=lambda: {"ignore_eos": True, "stream_options": {"include_usage": True}}
    )

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port  # the port raises where it is no number
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https") or parts.username or parts.query or parts.fragment:
            raise InputError(f"{self.url!r} is no address of a server: write http://HOST:PORT")

    @classmethod
    def at(cls, url: str, model: str = "", key: str | None = None) -> "Server":
        """The server at an address as people write it, with or without /v1."""
        return cls(url.rstrip("/").removesuffix("/v1"), model, key)


def read_key(file: Path) -> str:
    """The key in a file, which has it alone on its first line; InputError where there is none."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as a key: write it there in ASCII, on one line") from error
    if not lines or not lines[0].strip().isprintable() or not lines[0].strip():
        raise InputError(f"{file} has no key on its first line")
    return lines[0].strip()


def first_model(server: Server, timeout_s: float) -> str:
    """The first id that /v1/models gives; InputError where the server cannot be asked."""
    try:
        reply = _json(server, "GET", "/v1/models", None, timeout_s)
        return str(reply["data"][0]["id"])
    except (UnansweredError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{server.url}/v1/models does not name a model ({error}): check the address and the key, or give --model"
        ) from error


def answer(server: Server, request: Mapping[str, Any], task: str, timeout_s: float) -> Json:
    """Send a request, in the form of live_texts.py, and wait: `stamps_ms` of its tokens, or nothing but its success.

    `spread` says that events held several tokens, whose times between the first and the last are evenly spread.
    Raises UnansweredError.
    """
    if task == "generate":
        return _generated(server, request, timeout_s)
    if task == "score":
        body: Json = {"prefix": request["prefix"], "items": request["items"]}
        _json(server, "POST", "/score", body, timeout_s)
    elif task == "embed":
        _json(server, "POST", "/v1/embeddings", {"model": server.model, "input": request["texts"]}, timeout_s)
    else:
        _json(server, "POST", "/classify", {"input": request["texts"]}, timeout_s)
    return {}


def _generated(server: Server, request: Mapping[str, Any], timeout_s: float) -> Json:
    wanted = request["new_tokens"]
    body = {
        "model": server.model,
        "prompt": request["prompt"],
        "max_tokens": wanted,
        "temperature": 0,
        "stream": True,
        **server.more,
    }
    stamps: list[float] = []
    ends: list[tuple[float, bool]] = []
    counted: int | None = None
    began = time.perf_counter()
    with _opened(server, "POST", "/v1/completions", body, timeout_s) as (response, remaining):
        for event in _events(response, remaining):
            now = (time.perf_counter() - began) * 1e3
            for choice in _choices(event):
                reason = choice.get("finish_reason")
                if reason is None:
                    stamps.append(now)
                else:
                    ends.append((now, bool(choice.get("text"))))
                counted = wanted if reason == "length" else counted
            if isinstance(usage := event.get("usage"), dict):
                counted = usage.get("completion_tokens")
    return _stamped(stamps, ends, wanted, counted)


def _choices(event: Json) -> list[Json]:
    """The choices of an event; UnansweredError where they are no objects."""
    found = event.get("choices") or []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UnansweredError(f"the choices of an event are no objects: {_shown(found)}")
    return found


def _stamped(stamps: list[float], ends: list[tuple[float, bool]], wanted: int, counted: int | None) -> Json:
    """The times of `wanted` tokens from those of events; `ends` are events that end a choice, and whether with text.

    Tokens that are half a character have no text, and some servers say nothing until the end.
    """
    if len(stamps) != wanted:
        stamps = stamps + [at for at, has_text in ends if has_text or not stamps]
    made = len(stamps) if counted is None else counted
    if made != wanted or not stamps:
        raise UnansweredError(f"{made} tokens came of {wanted}: the server must go on behind an end token (ignore_eos)")
    if len(stamps) == wanted:
        return {"stamps_ms": stamps, "spread": False}
    places = np.linspace(0, len(stamps) - 1, wanted)
    return {"stamps_ms": np.interp(places, np.arange(len(stamps)), stamps).tolist(), "spread": True}


def _events(response: HTTPResponse, remaining: "_Remaining") -> Iterator[Json]:
    """The JSON objects of a stream of server-sent events, up to [DONE] or, since not all servers say that, its end."""
    while True:
        remaining.apply()
        line = response.readline(_LARGEST_LINE + 1)
        if len(line) > _LARGEST_LINE:
            raise UnansweredError("an event of the stream is larger than 1 MiB")
        data = line[5:].strip()
        if not line or data == b"[DONE]":
            return
        if not line.startswith(b"data:"):
            continue
        event = _object(data)
        if "error" in event:
            raise UnansweredError(_shown(event["error"]))
        yield event


def _json(server: Server, method: str, path: str, body: Json | None, timeout_s: float) -> Json:
    with _opened(server, method, path, body, timeout_s) as (response, _):
        return _object(_body(response))


def _body(response: HTTPResponse) -> bytes:
    data = response.read(LARGEST_BYTES + 1)
    if len(data) > LARGEST_BYTES:
        raise UnansweredError("the answer is larger than 64 MiB")
    return data


class _Remaining:
    """What is left of a request's time, set on its socket before each wait."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._socket, self._until = connection, until

    def apply(self) -> None:
        """Let the next wait take no longer than what is left."""
        left = self._until - time.perf_counter()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


@contextmanager
def _opened(
    server: Server, method: str, path: str, body: Json | None, timeout_s: float
) -> Iterator[tuple[HTTPResponse, _Remaining]]:
    """The response to a request, of status 200; whatever goes wrong until it is read is UnansweredError."""
    parts = urlsplit(server.url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    assert parts.hostname is not None, "Server lets no address through without a host"
    connection = kind(parts.hostname, parts.port, timeout=max(timeout_s, 1e-3))
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {server.key}"} if server.key else {})
    until = time.perf_counter() + timeout_s
    try:
        connection.connect()
        remaining = _Remaining(connection.sock, until)
        remaining.apply()
        connection.request(method, parts.path + path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            remaining.apply()
            raise UnansweredError(f"{path} answered {response.status}: {_reason(_body(response))}")
        yield response, remaining
    except TimeoutError as error:
        raise UnansweredError(f"{path} did not answer within {timeout_s:.3g} s", too_late=True) from error
    except (OSError, HTTPException, UnicodeError) as error:  # the last of a host that is no name of one
        raise UnansweredError(f"{path} cannot be reached: {error}") from error
    finally:
        connection.close()


def _object(data: bytes) -> Json:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnansweredError(f"the answer is no JSON: {_shown(data[:_SHOWN].decode(errors='replace'))}") from error
    if not isinstance(found, dict):
        raise UnansweredError(f"the answer is no JSON object: {_shown(found)}")
    return found


def _reason(data: bytes) -> str:
    """The message of an error, which OpenAI's form has in error.message."""
    try:
        error = _object(data).get("error")
    except UnansweredError:
        return _shown(data[:_SHOWN].decode(errors="replace"))
    return _shown(error.get("message") if isinstance(error, dict) else error)


def _shown(value: object) -> str:
    """Text from outside for a terminal: printable, one line, not long."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value))[:_SHOWN]
