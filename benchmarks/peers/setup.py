"""What has to be there before anything is measured: environments by venv and pip, and one folder per engine and model.

Everything is made once and found again by its key, a hash of what determined it: requirements and options, for our own
builds the profile and the sources that build. An engine that cannot be installed or cannot convert the model is not an
error here but a result: its rows say why.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.catalogue import ENVIRONMENTS, Environment, Peer
from benchmarks.peers.checkpoints import ensure_checkpoint
from benchmarks.peers.shapes import Shape

ROOT = Path(__file__).resolve().parents[2]
_CONVERT_SECONDS = 3600
_STAMP = "finished.json"
_NOT_WEIGHTS = ("*token*", "finished*", "manifest.json", "standard.onnx*")
"""Files that are no part of an engine's size: tokenizers, which are the same for all, and what only others read."""


class NotRun(Exception):  # noqa: N818  # a result: the report says which engine was not run, and why
    """An engine cannot be had here; the message says why."""


@dataclass(frozen=True)
class Places:
    """Where things are: the work folder, environments, and whether our builds may be older than our sources."""

    work: Path
    environments: Path
    keep_builds: bool = False

    def model(self, shape: Shape) -> Path:
        """Checkpoint and folders of one model."""
        return self.work / "models" / shape.name

    def hidden(self, text: str) -> str:
        """A message without the paths of this machine, which have no place in committed results."""
        for path, name in ((self.work, "WORK"), (self.environments, "ENVS"), (ROOT, ".")):
            text = text.replace(str(path), name)
        return text

    def folder(self, shape: Shape, peer: Peer) -> Path:
        """What one engine runs."""
        return self.model(shape) / peer.name.replace(" ", "-")


def digest(*parts: object) -> str:
    """Twelve hex digits of a hash of the parts."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]


def sources(*folders: Path) -> str:
    """A digest of all Python files under the folders."""
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return digest(*(file.read_text() for file in files))


def build_key(peer: Peer, shape: Shape) -> str:
    """What a prepared folder is known by."""
    if peer.is_ours:
        house = ROOT / "slmdeploy"
        profile = (ROOT / "profiles" / f"{peer.options['profile']}.toml").read_text()
        return digest(profile, sources(house / "exporting", house / "building"), shape.config)
    needs = ENVIRONMENTS[peer.environment].requirements if peer.environment else ()
    return digest(peer.module, peer.options, needs, shape.config)


def version_key(peer: Peer, shape: Shape, threads: int) -> str:
    """What a figure is known by, so that a rerun measures anew what has changed: the build, what runs it, threads."""
    ran_by = sources(ROOT / "slmdeploy" / "runtime") if peer.is_ours else ""
    return digest(build_key(peer, shape), ran_by, threads)


def python_of(peer: Peer, places: Places) -> Path:
    """The interpreter of an engine, its environment made or brought up to date first. Raises NotRun."""
    if peer.environment is None:
        return Path(sys.executable)
    wanted = ENVIRONMENTS[peer.environment]
    folder = (places.environments / peer.environment).absolute()
    python, stamp = folder / "bin" / "python", folder / f"finished-{digest(wanted)}"
    if not stamp.exists():
        if not python.exists():
            _run([sys.executable, "-m", "venv", folder], f"environment {peer.environment}")
        _install(python, wanted, peer.environment)
        stamp.touch()
    return python


def _install(python: Path, wanted: Environment, name: str) -> None:
    # torch first and alone: packages that ask for any torch would fetch one with CUDA.
    for group in (wanted.requirements[:1], wanted.requirements):
        command: list[str | Path] = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            *wanted.options,
            *group,
        ]
        _run(command, f"environment {name}", wanted.variables)
    if wanted.without:
        _run([python, "-m", "pip", "uninstall", "--yes", "--quiet", *wanted.without], f"environment {name}")


def _run(command: Sequence[str | Path], what: str, variables: dict[str, str] | None = None) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (variables or {})
    try:
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=_CONVERT_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"{what}: not done after {_CONVERT_SECONDS} s") from None
    if done.returncode:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise NotRun(f"{what}: {words[-1][:300] if words else f'status {done.returncode}'}")


def ensure(peer: Peer, shape: Shape, places: Places) -> Path:
    """The folder that the engine runs, made by its own converter where there is none. Raises NotRun."""
    folder = places.folder(shape, peer)
    key = build_key(peer, shape)
    found = _stamp(folder)
    if found == key or (found and peer.is_ours and places.keep_builds):
        return folder
    python = python_of(peer, places)
    checkpoint = ensure_checkpoint(shape, places.model(shape))
    if peer.is_ours:
        _ensure_graph(shape, places, checkpoint)
    shutil.rmtree(folder, ignore_errors=True)
    command: list[str | Path] = [python, "-m", "benchmarks.peers.worker", peer.module, folder]
    try:
        _run([*command, "--options", json.dumps(peer.options), "--prepare", checkpoint], f"converting {shape.name}")
    except NotRun:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    (folder / _STAMP).write_text(json.dumps({"key": key}))
    return folder


def _stamp(folder: Path) -> str | None:
    file = folder / _STAMP
    return str(json.loads(file.read_text())["key"]) if file.exists() else None


def _ensure_graph(shape: Shape, places: Places, checkpoint: Path) -> None:
    from benchmarks.peers.engines.ours import GRAPH, export_graph

    folder = places.model(shape) / GRAPH
    stamp = places.model(shape) / f"{GRAPH}.{sources(ROOT / 'slmdeploy' / 'exporting')}"
    if stamp.exists() and folder.exists():
        return
    export_graph(checkpoint, folder)
    for old in places.model(shape).glob(f"{GRAPH}.*"):
        old.unlink()
    stamp.touch()


def weight_bytes(folder: Path) -> int:
    """Size of what an engine reads of its folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if not any(file.match(one) for one in _NOT_WEIGHTS))
