"""Environments of their own for other people's packages, whose pins would not go with ours.

Each is made once, by venv and pip, under the folder named by SLMDEPLOY_TEST_ENVIRONMENTS or else pytest's cache, and is
made anew when its requirements change. A test that cannot have its environment is skipped with pip's last word on why.
What runs there is a script of peers/, which reads one JSON object from stdin and prints one as its last line.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).parent / "peers"
REQUIREMENTS = {
    "genai": ("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1"),
    "optimum": (
        *("torch==2.13.0", "optimum-onnx==0.1.0", "onnxruntime==1.31.1", "transformers==4.57.6"),
        "sentence-transformers==5.7.0",
    ),
    "openvino": ("openvino==2026.4.1",),
}
_INSTALL_SECONDS, _RUN_SECONDS = 1800, 600


class Environment:
    """A Python that has the packages of one entry of REQUIREMENTS, and nothing of ours."""

    def __init__(self, python: Path) -> None:
        self._python = python

    def run(self, script: str, question: dict[str, Any]) -> Any:
        """What a script of peers/ answers; fails the test with its stderr when it does not."""
        command = [self._python, "-I", PEERS / script]
        done = subprocess.run(
            command,
            input=json.dumps(question),
            capture_output=True,
            encoding="utf-8",
            timeout=_RUN_SECONDS,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"{script} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def environment(name: str, cache: pytest.Cache) -> Environment:
    """The environment `name`, made where there is none; skips the test when that is not possible."""
    requirements = REQUIREMENTS[name]
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:8]
    place = os.environ.get("SLMDEPLOY_TEST_ENVIRONMENTS")
    folder = (Path(place) if place else cache.mkdir("environments")).absolute() / f"{name}-{digest}"
    finished = folder / "finished"
    python = folder / "bin" / "python"
    if not finished.exists():
        _run(name, sys.executable, "-m", "venv", "--clear", folder)
        _run(name, python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)
        finished.touch()
    return Environment(python)


def _run(name: str, *command: str | Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=_INSTALL_SECONDS, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"nothing after {_INSTALL_SECONDS} seconds"
    if problem:
        pytest.skip(f"the environment {name!r} cannot be made: {problem.splitlines()[-1]}")
