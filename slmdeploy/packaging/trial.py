"""Tries a package the way a device would: packed, unpacked elsewhere, run in a fresh process that has no torch.

The process sees the standard library and what the package requires, and nothing else of this environment: `-S` leaves
out site-packages, and a folder of links offers those. So what the package forgot cannot help it.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slmdeploy.errors import GateError
from slmdeploy.packaging.archive import pack, unpack
from slmdeploy.packaging.edge import requirements
from slmdeploy.runtime.bundle import read_runtime

_TIMEOUT_S = 300
_NEW_TOKENS = 48


def try_package(package: Path, data: Path) -> dict[str, Any]:
    """Run `verify` and every task of ``package`` on the first test records of ``data``, and say what came out.

    Raises GateError with the end of stderr when a command of the unpacked package fails.
    """
    config = read_runtime(package)
    tasks, needed = config.tasks, requirements(config)
    with tempfile.TemporaryDirectory(prefix="slmdeploy-trial-") as place:
        archive, links = Path(place) / "package.tar.gz", Path(place) / "links"
        pack(package, archive)
        device = _Device(unpack(archive, Path(place) / "device"), _link_requirements(needed, links))
        found: dict[str, Any] = {
            "torch_importable": device.can_import("torch"),
            "archive_bytes": archive.stat().st_size,
        }
        device.run("verify")
        if "generate" in tasks:
            record = _first(data / "generate.test.jsonl")
            reply = device.run("generate", "--max-new-tokens", str(_NEW_TOKENS), "--json", "--", record["prompt"])
            found["generated"] = json.loads(reply.splitlines()[-1])["text"]
        if "score" in tasks:
            record = _first(data / "score.test.jsonl")
            reply = device.run("score", "--prefix", record["prefix"], "--json", "--", *record["items"])
            found["scores"] = json.loads(reply.splitlines()[-1])["scores"]
            found["best item"] = record["items"][found["scores"].index(max(found["scores"]))]
    found["summary"] = (
        f"unpacked elsewhere, verified, and ran {' and '.join(tasks)} in fresh processes with "
        f"{', '.join(needed)} alone (torch {'can' if found['torch_importable'] else 'cannot'} be imported there)"
    )
    return found


class _Device:
    """An unpacked package and the bare interpreter that runs it."""

    def __init__(self, folder: Path, links: Path) -> None:
        self.folder = folder
        kept = ("PATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ} | {"PYTHONPATH": str(links)}

    def can_import(self, module: str) -> bool:
        """Whether ``module`` can be found there."""
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        return self._call("-c", code).returncode == 0

    def run(self, *arguments: str) -> str:
        """stdout of the package's own command."""
        done = self._call(str(self.folder / "run"), *arguments)
        if done.returncode != 0:
            tail = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise GateError(f"the package does not work where it was unpacked: run {arguments[0]}: {tail[0]}")
        return done.stdout

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            cwd=self.folder.parent,
            env=self.environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_TIMEOUT_S,
            check=False,
        )


def _link_requirements(names: Iterable[str], folder: Path) -> Path:
    """A folder with a link to each top-level file and folder that the required distributions installed."""
    folder.mkdir()
    for name in names:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
        for top in sorted(tops):
            link = folder / top
            if not link.exists() and top != "__pycache__":
                link.symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def _first(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        record: dict[str, Any] = json.loads(file.readline())
    return record
