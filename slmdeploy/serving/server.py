"""Runs the application under uvicorn: a checked address, our logs, and an end that waits for what is in flight.

SIGTERM and Ctrl-C drain: /ready and new requests get 503 while answers that have begun are finished; a second signal
ends at once. Knows nothing of what the application does.
"""

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from slmdeploy.errors import InputError
from slmdeploy.serving.lifecycle import Lifecycle
from slmdeploy.serving.settings import ServerSettings

_log = logging.getLogger("slmdeploy.serving")
_LINGER_S = 2
"""After a drain: what is still open had its time and is cut."""


def check_exposure(host: str, keys: tuple[str, ...], *, insecure: bool) -> None:
    """InputError for an address that others can reach when nothing asks them for a key."""
    if keys or insecure or _is_loopback(host):
        return
    raise InputError(
        f"--host {host} can be reached by others and there is no API key: give --api-key-file, or --insecure where "
        "something else guards it."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int, stall_s: float) -> socket.socket:
    """A bound socket; port 0 takes a free one. InputError where the address cannot be had.

    The kernel drops a connection whose peer acknowledges nothing for `stall_s`, where it can (Linux): a client that
    reads nothing would keep its connection beyond the answer's end.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:  # the latter of what is no name of a host
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} is no address of this machine ({reason}).") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * stall_s))
        bound.bind(address)
        bound.listen()  # from now on the kernel holds connections until uvicorn takes them
    except OSError as error:
        bound.close()
        raise InputError(f"{host}:{port} cannot be listened on ({error.strerror}): give another --port.") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """uvicorn, whose first signal asks for a drain and whose second one ends at once."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_signal = on_signal
        self._asked = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn.Server, which would end at once and by the signal."""
        if self._asked:
            self.should_exit = self.force_exit = True
        self._asked = True
        self._on_signal()


async def serve(app: FastAPI, bound: socket.socket, settings: ServerSettings) -> int:
    """Serve until a signal; how many requests were cut at the end, 0 after a whole drain."""
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=_LINGER_S,
    )
    server = DrainingServer(config, lambda: loop.call_soon_threadsafe(asked.set))
    serving = asyncio.create_task(server.serve([bound]))
    stopped = asyncio.create_task(asked.wait())
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    left = 0
    if not serving.done():
        lifecycle: Lifecycle = app.state.lifecycle
        _log.info("draining: %d requests in flight", lifecycle.in_flight)
        draining = asyncio.create_task(lifecycle.drain(settings.drain_s))
        await asyncio.wait({serving, draining}, return_when=asyncio.FIRST_COMPLETED)
        left = draining.result() if draining.done() else lifecycle.in_flight
        draining.cancel()
        server.should_exit = True
    await serving
    if left:
        _log.warning("%d requests were cut after %g s", left, settings.drain_s)
    return left


def run(app: FastAPI, bound: socket.socket, settings: ServerSettings) -> int:
    """`serve` in an event loop of its own; between signals' default handling and uvicorn's nothing is lost."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return asyncio.run(serve(app, bound, settings))
    except KeyboardInterrupt:  # a signal before uvicorn had its own handlers
        return 0
