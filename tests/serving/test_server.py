"""`slmdeploy serve` in a process of its own: where it listens, what it refuses, and an end that finishes what runs."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from slmdeploy.cli import app
from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.serving.server import address_of, check_exposure, listen
from tests.graphs import write_tiny_graph
from tests.serving.live import PATIENCE_S, client, wait_for

BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_address_needs_no_key(host: str) -> None:
    check_exposure(host, (), insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
def test_any_other_address_needs_a_key_or_consent(host: str) -> None:
    with pytest.raises(InputError, match="API key"):
        check_exposure(host, (), insecure=False)
    check_exposure(host, ("key",), insecure=False)
    check_exposure(host, (), insecure=True)


def test_a_taken_port_and_a_foreign_address_are_sentences() -> None:
    with listen("127.0.0.1", 0, 5) as taken:
        assert address_of(taken).startswith("http://127.0.0.1:")
        with pytest.raises(InputError, match="another --port"):
            listen("127.0.0.1", taken.getsockname()[1], 5)
    with pytest.raises(InputError, match="cannot be listened on"):
        listen("192.0.2.1", 0, 5)
    for host in ("no such host", "a" * 70):
        with pytest.raises(InputError, match="no address"):
            listen(host, 0, 5)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no such option")
def test_an_accepted_connection_is_dropped_by_the_kernel_when_its_peer_stops_reading() -> None:
    with (
        listen("127.0.0.1", 0, 1.5) as bound,
        socket.create_connection(bound.getsockname()),
        bound.accept()[0] as taken,
    ):
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_an_ipv6_address_is_written_in_brackets() -> None:
    try:
        bound = listen("::1", 0, 5)
    except InputError:
        pytest.skip("this machine has no IPv6 loopback")
    with bound:
        assert address_of(bound).startswith("http://[::1]:")


def test_what_cannot_be_served_is_refused_before_anything_listens(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "tiny")
    (folder / "model.onnx").write_bytes(b"changed")
    for arguments, error in (
        ([str(folder)], CorruptArtifactError),
        ([str(tmp_path / "none")], InputError),
        ([str(folder), "--host", "0.0.0.0"], InputError),
        ([str(folder), "--api-key-file", str(tmp_path / "none")], InputError),
        ([str(folder), "--budget", "nonsense"], InputError),
    ):
        found = CliRunner().invoke(app, ["serve", *arguments, "--port", "0"], env={"SLMDEPLOY_API_KEYS": ""})
        assert isinstance(found.exception, error), (arguments, found.output)


def _status(late: Any) -> int | None:
    """What a request that comes late is answered; None where the server has ended already."""
    try:
        return int(late.post("/v1/completions", json=BODY | {"stream": False, "max_tokens": 1}).status_code)
    except httpx2.TransportError:
        return None


def test_a_draft_that_does_not_fit_is_refused_before_anything_listens(tmp_path: Path, decoder: Path) -> None:
    other = write_tiny_graph(tmp_path / "other", vocab=280, tasks=("generate",))
    for options, message in (
        (["--draft", str(other)], "has another vocabulary"),
        (["--draft", str(decoder), "--prompt-lookup"], "do not go together"),
    ):
        found = CliRunner().invoke(
            app, ["serve", str(decoder), *options, "--port", "0"], env={"SLMDEPLOY_API_KEYS": ""}
        )
        assert isinstance(found.exception, InputError)
        assert message in str(found.exception)


def test_sigterm_finishes_what_runs_refuses_the_new_and_exits_0(decoder: Path) -> None:
    command = [sys.executable, "-m", "slmdeploy", "serve", str(decoder), "--port", "0", "--max-output-tokens", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:")
            with client(url) as asking, client(url) as late:
                assert wait_for(lambda: late.get("/ready").status_code == 200)
                with asking.stream("POST", "/v1/completions", json=BODY) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    process.send_signal(signal.SIGTERM)
                    status = _status(late)
                    rest = [line for line in lines if line]
            log = process.communicate(timeout=PATIENCE_S)[1]
        finally:
            process.kill()
    assert process.returncode == 0
    assert status in (200, 503, None)  # the signal may come after this request, and the end before it
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    messages = [json.loads(line)["message"] for line in log.splitlines()]
    assert any(message.startswith("draining: ") for message in messages)
