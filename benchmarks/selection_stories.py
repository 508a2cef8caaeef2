"""The outputs in docs/selection.md, from its own commands over the measurements beside it.

    python benchmarks/selection_stories.py

A block of the language `sh` that calls slmdeploy, with a `text` block right behind it, is a story: its command is run
in the repository's root, and what it prints takes the place of the text. tests/benchmarks/test_selection_stories.py
holds the page to that.
"""

import contextlib
import os
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from slmdeploy.cli import app
from slmdeploy.errors import InfeasibleError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "selection.md"
STORY = re.compile(r"^```sh\nslmdeploy (?P<command>[^`]+)```\n\n?```text\n(?P<said>.*?)^```", re.MULTILINE | re.DOTALL)


def told(command: str) -> str:
    """What ``slmdeploy command`` prints, with exit code 3 where it ends so. Any other error is raised."""
    arguments = shlex.split(command.replace("\\\n", " "))
    with contextlib.chdir(ROOT):
        done = CliRunner().invoke(app, arguments, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "130"})
    if done.exception is None:
        return done.stdout
    if isinstance(done.exception, InfeasibleError):
        return f"{done.stdout}exit code {done.exception.exit_code}\n"
    raise done.exception


def retold(page: str) -> str:
    """``page`` with the output of each story as its command prints it now."""

    def block(match: re.Match[str]) -> str:
        text = "\n".join(line.rstrip() for line in told(match["command"]).splitlines())
        return f"```sh\nslmdeploy {match['command']}```\n```text\n{text}\n```"

    return STORY.sub(block, page)


def main() -> None:
    """Write the page anew."""
    PAGE.write_text(retold(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
