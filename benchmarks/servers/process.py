"""A server's process: started on a free port, waited for until it generates, and ended with all of its children.

Knows a server as a row of catalogue.py and where things are from benchmarks/peers.
"""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from benchmarks.peers.setup import ROOT, NotRun, Places, digest, ensure, python_of
from benchmarks.peers.shapes import Shape
from benchmarks.servers.catalogue import ServerRow, checkpoint_beside, peer_of
from slmdeploy.errors import InputError
from slmdeploy.profiling.live_http import Server, UnansweredError, answer, first_model

_START_S = 180.0
_END_S = 20.0


def prepared(row: ServerRow, shape: Shape, places: Places) -> tuple[Path, Path]:
    """Interpreter and folder of a server, made where they are not there. Raises NotRun."""
    peer = peer_of(row)
    python, folder = python_of(peer, places), ensure(peer, shape, places)
    if row.installs:
        stamp = python.parent.parent / f"finished-server-{digest(row.installs)}"
        if not stamp.exists():
            done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *row.installs], check=False)
            if done.returncode:
                raise NotRun(f"{row.name}: its server's packages cannot be installed")
            stamp.touch()
    return python, folder


def versions(python: Path, distributions: tuple[str, ...]) -> dict[str, str]:
    """Versions of what an interpreter has installed."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([str(python), "-c", code, *distributions], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@contextmanager
def running(row: ServerRow, python: Path, folder: Path, threads: int) -> Iterator[tuple[Server, int]]:
    """A started server that has answered a first request, and its process id. Raises NotRun."""
    port = _free_port()
    command = row.command(python, folder, port, row.threads or threads)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            yield _ready(row, folder, process, f"http://127.0.0.1:{port}", output), process.pid
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ready(row: ServerRow, folder: Path, process: subprocess.Popen[bytes], url: str, output: BinaryIO) -> Server:
    """The server once it has generated two tokens."""
    until, reason = time.monotonic() + _START_S, ""
    while time.monotonic() < until:
        if process.poll() is not None:
            raise NotRun(f"{row.name} ended with {process.returncode}: {_last_line(output)}")
        try:
            return _asked(row, folder, url)
        except (InputError, UnansweredError) as error:
            reason = str(error)
        time.sleep(0.5)
    raise NotRun(f"{row.name} did not answer within {_START_S:.0f} s: {reason}: {_last_line(output)}")


def _asked(row: ServerRow, folder: Path, url: str) -> Server:
    name = str(checkpoint_beside(folder)) if row.takes_paths else first_model(Server(url), 5.0)
    server = Server(url, name, more=row.more)
    prompt = [40, 41, 42] if row.prompts == "ids" else "abc"
    answer(server, {"op": "generate", "prompt": prompt, "new_tokens": 2}, "generate", 120.0)
    return server


def _last_line(output: BinaryIO) -> str:
    output.seek(0)
    lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group, SIGKILL to what is left of it."""
    for sign, wait in ((signal.SIGTERM, _END_S), (signal.SIGKILL, _END_S)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait)
            return


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a process, from Linux's VmHWM."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024
