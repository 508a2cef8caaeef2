"""Folders that verbs write: a manifest with hashes and lineage, atomic writes, and resume by content key.

An artifact is written to a temporary sibling and renamed when whole, so a killed run leaves nothing that a later run
trusts. Its content key is a hash of what determines it: kind, plan, the digests of its inputs and the version of
slmdeploy. Reading and verifying live in runtime/bundle.py, because a device verifies with the same code. Knows nothing
of what is inside the files.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slmdeploy.errors import CorruptArtifactError, InputError, OutputExistsError, ResourceError
from slmdeploy.runtime.bundle import MANIFEST, read_manifest, sha256_file, verify_files
from slmdeploy.version import __version__

SCHEMA = 1
_TOLD = ("plan", "inputs", "result")
"""Keys of a manifest that an artifact is read by; a device needs none of them."""
_RESUMING: ContextVar[bool] = ContextVar("resuming", default=False)


@dataclass(frozen=True)
class Artifact:
    """A finished, verified folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        """What it is: checkpoint, data, graph, build, measurement, selection or package."""
        return str(self.manifest["kind"])

    @property
    def content_key(self) -> str:
        """Hash of everything that determined it."""
        return str(self.manifest["content_key"])

    @property
    def plan(self) -> dict[str, Any]:
        """The resolved settings it was made with."""
        return dict(self.manifest["plan"])

    @property
    def inputs(self) -> dict[str, Any]:
        """Name and digest of each input."""
        return dict(self.manifest["inputs"])

    @property
    def result(self) -> dict[str, Any]:
        """What was done and found."""
        return dict(self.manifest["result"])


@dataclass
class Draft:
    """An artifact being written: put files into ``path`` and what was done into ``result``."""

    path: Path
    result: dict[str, Any] = field(default_factory=dict)


class _UpToDate(Exception):  # noqa: N818 - a signal between two functions of this file, not an error
    """Leaves a verb at its first write, when what it would make is there already."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact.path)
        self.artifact = artifact


def resumed(verb: Callable[[], Artifact]) -> tuple[Artifact, bool]:
    """Call ``verb`` unless its output is up to date; returns the artifact and whether it was there already.

    The verb itself knows nothing of this: its first call of `writing` names the content key, and that decides. An
    artifact with another key is replaced.
    """
    token = _RESUMING.set(True)
    try:
        return verb(), False
    except _UpToDate as found:
        return found.artifact, True
    finally:
        _RESUMING.reset(token)


def digest(path: Path) -> str:
    """Content hash of an input: of an artifact or any folder its files' hashes, of a file its own.

    Raises InputError when nothing is there.
    """
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise InputError(f"{path} does not exist")
    if (path / MANIFEST).is_file():
        files = read_manifest(path).files
        hashes = {name: entry.sha256 for name, entry in files.items()}
    else:
        hashes = {
            str(file.relative_to(path)): sha256_file(file)
            for file in sorted(path.rglob("*"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        }
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def origin(path: Path) -> dict[str, Any]:
    """Where an input comes from: its digest and, of an artifact, kind, content key, version and its own inputs.

    So each manifest holds the whole lineage behind it, though the folders of earlier steps may be gone.
    """
    found = {"digest": digest(path)}
    if not (path / MANIFEST).is_file():
        return found
    manifest = read_manifest(path).raw
    return found | {key: manifest[key] for key in ("kind", "content_key", "slmdeploy", "inputs") if key in manifest}


def content_key(kind: str, plan: dict[str, Any], inputs: dict[str, Path]) -> str:
    """The key that decides whether an artifact is up to date."""
    return _key(kind, plan, {name: digest(path) for name, path in inputs.items()})


def _key(kind: str, plan: dict[str, Any], digests: dict[str, str]) -> str:
    what = {"kind": kind, "plan": plan, "inputs": digests, "slmdeploy": __version__, "schema": SCHEMA}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def open_artifact(path: Path, kind: str | None = None) -> Artifact:
    """Open and verify the artifact at ``path``.

    Raises InputError when it is not there or of another kind, CorruptArtifactError when a file is missing or changed.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    manifest = read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise InputError(f"{path} is a {manifest.kind}, but a {kind} is needed here")
    missing = next((key for key in _TOLD if key not in manifest.raw), None)
    if missing is not None:
        raise CorruptArtifactError(f"{path / MANIFEST} has no {missing!r}, which every artifact has: make it again")
    verify_files(path, manifest)
    return Artifact(path, dict(manifest.raw))


def find(out: Path, key: str) -> Artifact | None:
    """The artifact at ``out`` if it is whole and has this content key, else None (it will be made anew)."""
    if not (out / MANIFEST).is_file():
        return None
    try:
        artifact = open_artifact(out)
    except CorruptArtifactError:
        return None
    return artifact if artifact.content_key == key else None


@contextmanager
def writing(
    out: Path,
    *,
    kind: str,
    plan: dict[str, Any],
    inputs: dict[str, Path],
    force: bool = False,
    made: Mapping[str, Any] | None = None,
) -> Iterator[Draft]:
    """Write an artifact: yields a Draft, and on leaving without an error puts it at ``out`` in one rename.

    ``made`` is a manifest whose time and machine stand for this one's, where the same input is to give the same bytes.

    A verb calls this before any costly work, so that a resumed run ends here when nothing changed.

    Raises OutputExistsError before any work when ``out`` is there and ``force`` is off, ResourceError when the disk is
    full or the place cannot be written. On any error the temporary folder is removed and ``out`` is as it was.
    """
    origins = {name: origin(path) for name, path in inputs.items()}
    digests = {name: str(found["digest"]) for name, found in origins.items()}
    resuming = _RESUMING.get()
    found = find(out, _key(kind, plan, digests)) if resuming else None
    if found:
        raise _UpToDate(found)
    refuse_existing(out, force or resuming)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        with _disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(out)
            temporary.mkdir()
            draft = Draft(temporary)
            yield draft
            _write_manifest(draft, kind, plan, origins, made or {"created": _now(), "machine": machine()})
            _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch(out: Path, purpose: str) -> Iterator[Path]:
    """A temporary folder beside ``out``, on its disk; removed on leaving, or by the next caller after a kill.

    Raises ResourceError when the disk is full or the place cannot be written.
    """
    suffix = f".{purpose}"
    folder = out.parent / f".{out.name}.{os.getpid()}{suffix}"
    try:
        with _disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(out, suffix)
            folder.mkdir()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(out: Path, force: bool) -> None:
    """Raise OutputExistsError when ``out`` is there and ``force`` is off; with it, only artifacts may be replaced."""
    if not out.exists():
        return
    if not force:
        raise OutputExistsError(f"{out} exists already: choose another output or pass --force to replace it")
    if not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputExistsError(f"{out} was not made by slmdeploy, so --force does not replace it: remove it yourself")


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{out} cannot be written: the disk is full; free space and run again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ResourceError(
                f"{out} cannot be written: {error.strerror}; choose a place you may write to"
            ) from error
        raise


def _remove_leftovers(out: Path, suffix: str = ".tmp") -> None:
    """Remove what killed writers of the same artifact left; a live one is recognised by its process id."""
    for leftover in out.parent.glob(f".{out.name}.*{suffix}"):
        owner = leftover.name.removesuffix(suffix).rsplit(".", 1)[1]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _write_manifest(
    draft: Draft, kind: str, plan: dict[str, Any], origins: dict[str, dict[str, Any]], made: Mapping[str, Any]
) -> None:
    digests = {name: str(found["digest"]) for name, found in origins.items()}
    files = {}
    for file in sorted(draft.path.rglob("*")):
        if file.is_file():
            _flush(file)
            name = file.relative_to(draft.path).as_posix()
            files[name] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
    manifest = {
        "schema": SCHEMA,
        "kind": kind,
        "slmdeploy": __version__,
        "created": made["created"],
        "machine": made["machine"],
        "content_key": _key(kind, plan, digests),
        "plan": plan,
        "inputs": origins,
        "files": files,
        "result": draft.result,
    }
    target = draft.path / MANIFEST
    target.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _flush(target)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """The machine in the few words that a manifest needs; `doctor` tells more."""
    return {
        "system": platform.system(),
        "arch": platform.machine(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, out: Path) -> None:
    """Put ``temporary`` at ``out``; the old folder steps aside first, so a kill between loses neither's bytes."""
    aside = out.parent / f".{out.name}.{os.getpid()}.old"
    if out.exists():
        out.rename(aside)
    temporary.rename(out)
    _flush(out.parent)
    shutil.rmtree(aside, ignore_errors=True)
