"""Packs an artifact into a .tar.gz and unpacks one that may be hostile.

`pack` is reproducible: names in order, no times, no owners, two modes, so the same folder gives the same bytes.
`unpack` trusts nothing: it takes plain files and folders under plain names, each once, within a budget that is checked
against the declared sizes before a byte is written; it writes to a temporary sibling, verifies the manifest there, and
renames. Knows nothing of what the files mean.
"""

import errno
import gzip
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slmdeploy.errors import CorruptArtifactError, InputError, OutputExistsError, ResourceError
from slmdeploy.runtime.bundle import MANIFEST, name_problem, read_manifest, verify_files

MAX_UNPACKED_BYTES = 64 << 30
MAX_MEMBERS = 100_000
_LEVEL = 6
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def pack(folder: Path, archive: Path) -> Path:
    """Write the files that the manifest of `folder` lists, and the manifest, as a .tar.gz; returns `archive`.

    The files are verified first. Raises OutputExistsError when `archive` is there.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    if archive.exists():
        raise OutputExistsError(f"{archive} exists already: choose another name or remove it")
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}.tmp")
    try:
        with _disk_errors(archive):
            archive.parent.mkdir(parents=True, exist_ok=True)
            # gzip writes the name of the file and the time into its header unless told otherwise.
            with (
                temporary.open("wb") as raw,
                gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=_LEVEL, mtime=0) as packed,
                tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
            ):
                for name in [MANIFEST, *sorted(manifest.files)]:
                    _add(tar, folder / name, name)
            temporary.replace(archive)
    finally:
        temporary.unlink(missing_ok=True)
    return archive


def _add(tar: tarfile.TarFile, file: Path, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.size = file.stat().st_size
    info.mode = 0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644
    with file.open("rb") as source:
        tar.addfile(info, source)


def unpack(archive: Path, out: Path, *, max_bytes: int = MAX_UNPACKED_BYTES) -> Path:
    """Unpack a .tar.gz of an artifact to the new folder `out` and verify it there; returns `out`.

    Raises InputError when there is no such file, OutputExistsError when `out` is there, CorruptArtifactError for an
    archive that is damaged, hostile or larger than `max_bytes`; `out` appears whole or not at all.
    """
    if not archive.is_file():
        raise InputError(f"{archive} is not a file: give the path of a .tar.gz")
    if out.exists() or out.is_symlink():
        raise OutputExistsError(f"{out} exists already: choose another folder or remove it")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with _disk_errors(out):
            temporary.mkdir(parents=True)
            with _damage(archive), tarfile.open(archive, mode="r:gz") as tar:
                for member in _sound_members(tar, archive, max_bytes):
                    _extract(tar, member, temporary)
            verify_files(temporary, read_manifest(temporary))
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _sound_members(tar: tarfile.TarFile, archive: Path, max_bytes: int) -> Iterator[tarfile.TarInfo]:
    """The members one by one, each checked before it is given out."""
    seen: set[str] = set()
    total = 0
    for member in tar:
        name = member.name
        problem = None if name == MANIFEST else name_problem(name)
        if problem is None and not (member.isreg() or member.isdir()):
            problem = "is neither a file nor a folder"
        # Names that differ in case alone are one file on some systems.
        if problem is None and name.casefold() in seen:
            problem = "is there twice"
        seen.add(name.casefold())
        total += member.size
        if problem is None and (total > max_bytes or len(seen) > MAX_MEMBERS):
            problem = f"takes the contents over {max_bytes} bytes or {MAX_MEMBERS} members"
        if problem is not None:
            raise CorruptArtifactError(f"{archive}: the member {name[:80]!r} {problem}, so nothing was unpacked")
        yield member


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write one member; of its mode only the execute bit of the owner is taken over."""
    target = folder / member.name
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None, "only regular files get here"
    with source, target.open("xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    target.chmod(0o755 if member.mode & stat.S_IXUSR else 0o644)


@contextmanager
def _damage(archive: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UnicodeError) as error:
        raise CorruptArtifactError(f"{archive} is damaged or no .tar.gz ({error}): fetch it again") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise CorruptArtifactError(f"{archive}: a member is a file where another needs a folder") from error


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        reason = error.strerror
        raise ResourceError(f"{out} cannot be written ({reason}): free space or choose another place") from error
