"""How long work says where it is: a three-method protocol, so that no verb knows about terminals.

The command line supplies a rich bar (slmdeploy/console.py); the Python API defaults to silence.
"""

from typing import Protocol


class Progress(Protocol):
    """Receives the course of one piece of work at a time; `start` ends what ran before."""

    def start(self, label: str, total: int | None, unit: str) -> None:
        """Begin ``label``: ``total`` units of work, None when the amount is not known beforehand."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Add ``n`` finished units; ``note`` is a short live remark such as a loss."""

    def finish(self) -> None:
        """End the piece of work that runs."""


class _Silent:
    def start(self, label: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, n: int = 1, note: str = "") -> None:
        pass

    def finish(self) -> None:
        pass


SILENT: Progress = _Silent()
