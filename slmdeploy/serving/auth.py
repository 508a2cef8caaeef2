"""API keys: where they come from, and whether a request has one of them.

A key is compared in time that depends on neither the keys nor how much of one was guessed. Health, figures and the
page are open, since probes and scrapers have no keys and learn no content there. Knows nothing of what it guards.
"""

import hmac
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from slmdeploy.errors import InputError
from slmdeploy.serving.failures import ApiError

VARIABLE = "SLMDEPLOY_API_KEYS"
OPEN = frozenset(
    {"/", "/page.css", "/page.js", "/page.json", "/health", "/ready", "/metrics", "/docs", "/openapi.json"}
)
_LEAST = 16


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of a file, one a line, # for comments, or of the variable, separated by commas; none for no keys.

    Raises InputError for a file that cannot be read or holds none, and for a key that is short or has odd characters.
    """
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as a file of API keys ({type(error).__name__}).") from None
        found, where = [line.strip() for line in lines if not line.lstrip().startswith("#")], str(file)
    else:
        found, where = [part.strip() for part in environment.get(VARIABLE, "").split(",")], VARIABLE
    keys = tuple(key for key in found if key)
    if file is not None and not keys:
        raise InputError(f"{file} holds no API key: write one a line.")
    for number, key in enumerate(keys, 1):
        if len(key) < _LEAST or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                f"Key {number} of {where} is no API key: it needs {_LEAST} or more printable ASCII characters."
            )
    return keys


class KeyGuard:
    """Middleware that answers 401 where a key is asked for and none of the right ones is there."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["path"] not in OPEN and not self._knows(Headers(scope=scope)):
            message = "This server wants an API key: send it as Authorization: Bearer KEY."
            await ApiError(401, message).response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, so that the time does not say which one it was.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)
