"""The command line inside the tests' own process, where nothing has to be imported anew for each command.

tests/test_cli.py starts the real process as well: its exit code, its streams and its completion.
"""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from slmdeploy.cli import main


@dataclass(frozen=True)
class Ended:
    """What a command that has ended left, by the names of subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


def slm(*arguments: str | Path) -> Ended:
    """Run one command; an exception that the command line does not turn into a sentence comes through."""
    out, errors = io.StringIO(), io.StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(errors), patch.object(sys, "argv", ["slmdeploy", *map(str, arguments)]):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
    return Ended(code, out.getvalue(), errors.getvalue())
