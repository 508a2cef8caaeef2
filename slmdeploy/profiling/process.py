"""The parent's end of a worker: start it, ask it, end it, and turn each way in which it can fail into one error.

The protocol is JSON lines (worker.py). A worker that dies, hangs or answers nonsense becomes a ResourceError with the
end of its stderr; an error that the worker reports is raised again as what it was. Knows nothing of what is asked.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from slmdeploy.errors import CorruptArtifactError, InputError, ResourceError

START_TIMEOUT_S = 600.0
ASK_TIMEOUT_S = 600.0
_RAISED = {kind.exit_code: kind for kind in (InputError, CorruptArtifactError, ResourceError)}
_ROOT = Path(__file__).resolve().parents[2]


class Client(Protocol):
    """Whatever answers the ops of worker.py: a process here, a session in the same process in tests."""

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """The reply to one op."""


def build_command(path: Path, options: Sequence[str] = ()) -> list[str]:
    """The command that serves a build, with ``options`` of worker.py."""
    return [sys.executable, "-m", "slmdeploy.profiling.worker", str(path), *options]


def baseline_command(path: Path, *, threads: int, labels: Sequence[str] = ()) -> list[str]:
    """The command that serves a checkpoint by torch in eager mode.

    ``labels`` are the label words of its scores, its own default when empty; a build knows its own.
    """
    words = [f"--label={label}" for label in labels]
    return [sys.executable, "-m", "slmdeploy.exporting.eager", str(path), "--threads", str(threads), *words]


class WorkerProcess:
    """A running worker. ``hello`` is what it said of itself when it was ready (load_s, engine, …)."""

    def __init__(self, name: str, command: Sequence[str], *, threads: int, timeout_s: float = ASK_TIMEOUT_S) -> None:
        """Start ``command`` and wait until it is ready. Raises the worker's own error or a ResourceError."""
        self.name, self.timeout_s = name, timeout_s
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed in close()
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
        )
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.hello = self._hello()
        except BaseException:
            self.close()
            raise

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send one op and wait for its reply, at most ``timeout_s``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died(op) from error
        line = self._line(op, self.timeout_s)
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise ResourceError(
                f"the worker of {self.name} answered {op!r} with {line[:80]!r}, which is no JSON"
            ) from error
        return self._raise_reported(reply)

    def close(self) -> None:
        """End the process: politely, and by force when it does not listen. Safe to call twice."""
        if self._process.poll() is None:
            self._end()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None and not stream.closed:
                _close_quietly(stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b'{"op": "exit"}\n')
            self._process.stdin.flush()
            self._process.wait(5)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _hello(self) -> dict[str, Any]:
        # A library may print while it is imported, before the worker has closed stdout to it: such lines are no reply.
        while True:
            line = self._line("load", START_TIMEOUT_S)
            try:
                reply = json.loads(line)
            except ValueError:
                continue
            if isinstance(reply, dict) and (reply.get("ready") or "error" in reply):
                return self._raise_reported(reply)

    def _line(self, op: str, timeout_s: float) -> bytes:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._process.kill()
            raise ResourceError(f"the worker of {self.name} did not answer {op!r} within {timeout_s:g} s") from None
        if line is None:
            raise self._died(op)
        return line

    def _raise_reported(self, reply: dict[str, Any]) -> dict[str, Any]:
        if "error" in reply:
            raise _RAISED.get(reply["exit_code"], ResourceError)(f"{self.name}: {reply['error']}")
        return reply

    def _died(self, op: str) -> ResourceError:
        code = self._process.wait()
        if -code == signal.SIGKILL.value:
            return ResourceError(f"the worker of {self.name} was killed during {op!r}: most likely memory ran out")
        self._stderr.seek(0)
        tail = " | ".join(self._stderr.read().decode(errors="replace").strip().splitlines()[-3:])
        return ResourceError(
            f"the worker of {self.name} ended during {op!r} with status {code}: {tail or 'no message'}"
        )


def _close_quietly(stream: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # unsent bytes of a request to a worker that is gone: nothing is lost
        stream.close()
