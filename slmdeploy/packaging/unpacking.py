"""Unpacks the archive of an artifact that may be hostile: .tar.gz, .tar.zst or .zip, told apart by the first bytes.

Trusts nothing: it takes plain files and folders under plain names, each once on every file system, within a budget that
is checked against the declared sizes before a byte is written, and reads no more of a stream than the members that it
approved can take. It writes to a temporary sibling, checks every file against the manifest there, refuses what the
manifest does not list, and renames. Knows nothing of what the files mean.
"""

import errno
import gzip
import io
import os
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from slmdeploy.errors import CorruptArtifactError, InputError, OutputExistsError
from slmdeploy.extras import require
from slmdeploy.packaging.archive import disk_errors
from slmdeploy.packaging.signature import SIGNATURE, check_signature, read_public_key
from slmdeploy.runtime.bundle import MANIFEST, name_problem, read_manifest, verify_files

MAX_UNPACKED_BYTES = 64 << 30
MAX_MEMBERS = 100_000
_HEADER_BYTES = 1 << 20
"""Bytes of a stream beside its members' contents: headers and padding, for each member a little more."""
_MEMBER_BYTES = 4096
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_ENCRYPTED = 1
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{digit}" for port in ("COM", "LPT") for digit in "123456789¹²³"
}
"""What Windows takes for a device, whatever folder it is in and whatever ending it has."""
_UNSEEN = ("Cf", "Zl", "Zp")
"""Unicode's categories of marks that turn text around, join it or break it: a name would not be what it looks."""

_DAMAGE = (
    tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, struct.error, EOFError, UnicodeError,
    NotImplementedError,
)  # fmt: skip
"""What the readers of the three formats raise for bytes that they cannot make sense of."""


@dataclass(frozen=True)
class _Member:
    """One member of an archive: ``problem`` says what is wrong with its kind, ``open`` gives its contents."""

    name: str
    size: int
    folder: bool
    executable: bool
    problem: str | None
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, out: Path, *, key: Path | None = None, max_bytes: int = MAX_UNPACKED_BYTES) -> Path:
    """Unpack an archive of an artifact to the new folder `out` and verify it there; returns `out`.

    With `key`, the PEM file of a public key, only what that key signed is unpacked. Raises InputError when there is no
    such file, OutputExistsError when `out` is there, MissingExtraError for .tar.zst without zstandard,
    CorruptArtifactError for an archive that is damaged, hostile, unsigned, or larger than `max_bytes`; `out` appears
    whole or not at all.
    """
    if not archive.is_file():
        raise InputError(f"{archive} is not a file: give the path of a .tar.gz, .tar.zst or .zip")
    if out.exists() or out.is_symlink():
        raise OutputExistsError(f"{out} exists already: choose another folder or remove it")
    signer = read_public_key(key) if key else None
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(out):
            temporary.mkdir(parents=True)
            with _damage(archive), _opened(archive) as members:
                found = [_extract(member, temporary) for member in _sound(members, archive, max_bytes)]
            _check(temporary, {name for name in found if name})
            if signer:
                check_signature(temporary, signer)
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _check(folder: Path, found: set[str]) -> None:
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    stray = found - set(manifest.files) - {MANIFEST, SIGNATURE}
    if stray:
        raise CorruptArtifactError(f"{min(stray)[:80]!r} is in the archive and not in {MANIFEST}: nothing was unpacked")


def _sound(members: Iterator[_Member], archive: Path, max_bytes: int) -> Iterator[_Member]:
    """The members one by one, each checked before it is given out."""
    seen: set[str] = set()
    spelled: dict[str, str] = {}
    total = 0
    for member in members:
        key = _one_name(member.name)
        total += member.size
        problem = _name_problem(member.name) or member.problem
        if problem is None and key in seen:
            problem = "is there twice"
        if problem is None:
            problem = _folder_problem(member.name, spelled)
        seen.add(key)
        if problem is None and (total > max_bytes or len(seen) > MAX_MEMBERS):
            problem = f"takes the contents over {max_bytes} bytes or {MAX_MEMBERS} members"
        if problem is not None:
            raise CorruptArtifactError(f"{archive}: the member {member.name[:80]!r} {problem}, so nothing was unpacked")
        yield member


def _one_name(name: str) -> str:
    """The same for names that differ in case or in how an accent is written: they are one file on some systems."""
    return unicodedata.normalize("NFC", name).casefold()


def _folder_problem(name: str, spelled: dict[str, str]) -> str | None:
    """Whether a folder of the name, or the name, was written otherwise before; what is new is added to ``spelled``."""
    parts = name.split("/")
    for end in range(1, len(parts) + 1):
        above = "/".join(parts[:end])
        if spelled.setdefault(_one_name(above), above) != above:
            return "is in a folder that another member writes otherwise"
    return None


def _name_problem(name: str) -> str | None:
    problem = None if name == MANIFEST else name_problem(name)
    if problem is not None:
        return problem
    parts = name.split("/")
    if any(part.split(".")[0].strip().upper() in _RESERVED or part[-1] in ". " for part in parts):
        return "has a name that Windows reads otherwise"
    if any(unicodedata.category(letter) in _UNSEEN for letter in name):
        return "has a character that cannot be seen"
    if any(part.casefold() == ".git" for part in parts):
        return "is a repository's, whose settings run programs"
    return None


def _extract(member: _Member, folder: Path) -> str | None:
    """Write one member and return its name, None for a folder; of its mode only the owner's execute bit is taken."""
    target = folder / member.name
    if member.folder:
        target.mkdir(parents=True, exist_ok=True)
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, target.open("xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    target.chmod(0o755 if member.executable else 0o644)
    return member.name


@contextmanager
def _opened(archive: Path) -> Iterator[Iterator[_Member]]:
    """The members of an archive in the format that its first bytes say."""
    with archive.open("rb") as raw:
        start = raw.read(4)
        raw.seek(0)
        match next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None):
            case "gzip":
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield _tar_members(stream)
            case "zstd":
                require("package", "zstandard")
                import zstandard

                try:
                    with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
                        yield _tar_members(stream)
                except zstandard.ZstdError as error:
                    raise CorruptArtifactError(f"{archive} is damaged ({error}): fetch it again") from error
            case "zip":
                with zipfile.ZipFile(raw) as packed:
                    yield _zip_members(packed)
            case _:
                raise CorruptArtifactError(f"{archive} is no .tar.gz, .tar.zst or .zip: fetch it again")


class _Source(Protocol):
    """What an archive is read from; gzip's file is that and no IO[bytes]."""

    def read(self, size: int = -1, /) -> bytes:
        """See io.RawIOBase."""


class _Bounded(io.RawIOBase):
    """A stream that ends in an error once more was read of it than was allowed, however little it is when packed."""

    def __init__(self, stream: _Source) -> None:
        self._stream = stream
        self._left = _HEADER_BYTES

    def allow(self, size: int) -> None:
        """Let so many bytes more be read, and what goes with a member."""
        self._left += size + _MEMBER_BYTES

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError("it unpacks to more than its members")
        return data


def _tar_members(stream: _Source) -> Iterator[_Member]:
    bounded = _Bounded(stream)
    # As a stream: each member is read before the next is looked for, and nothing is sought.
    with tarfile.open(fileobj=bounded, mode="r|") as tar:
        for info in tar:
            plain = (info.isreg() and not info.issparse()) or info.isdir()
            yield _Member(
                name=info.name,
                size=info.size,
                folder=info.isdir(),
                executable=bool(info.mode & stat.S_IXUSR),
                problem=None if plain else "is neither a file nor a folder",
                open=partial(_tar_contents, tar, info, bounded),
            )


def _tar_contents(tar: tarfile.TarFile, info: tarfile.TarInfo, bounded: _Bounded) -> IO[bytes]:
    # Asked for only when the member was found sound.
    bounded.allow(info.size)
    source = tar.extractfile(info)
    assert source is not None, "only regular files get here"
    return source


def _zip_members(packed: zipfile.ZipFile) -> Iterator[_Member]:
    for info in packed.infolist():
        mode = info.external_attr >> 16
        yield _Member(
            # `filename` is what zipfile made of the name, cut at a NUL; what stands in the file is judged.
            name=info.orig_filename.removesuffix("/"),
            size=info.file_size,
            folder=info.is_dir(),
            executable=bool(mode & stat.S_IXUSR),
            problem=_zip_problem(info, mode),
            open=partial(packed.open, info),
        )


def _zip_problem(info: zipfile.ZipInfo, mode: int) -> str | None:
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is neither a file nor a folder"
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed in a way that packages are not"
    if info.is_dir() and info.file_size:
        return "is a folder with contents"
    return None


@contextmanager
def _damage(archive: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise CorruptArtifactError(f"{archive} is damaged or no archive ({error}): fetch it again") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise CorruptArtifactError(f"{archive}: a member is a file where another needs a folder") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # zipfile went to a place before the file's beginning, as a torn directory told it to.
        raise CorruptArtifactError(f"{archive} is damaged: fetch it again") from error
