"""Packs an artifact into one file: .tar.gz, .tar.zst or .zip, by the name that is asked for.

Reproducible: the manifest first and then names in order, no owners, one date, two modes, so the same folder gives the
same bytes (with the same zlib or zstd: another version of those may compress otherwise). Only what the manifest lists
goes in, and its signature where there is one. Knows nothing of what the files mean; unpacking.py is the way back.
"""

import errno
import gzip
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from slmdeploy.errors import InputError, OutputExistsError, ResourceError
from slmdeploy.extras import require
from slmdeploy.packaging.signature import SIGNATURE
from slmdeploy.runtime.bundle import MANIFEST, read_manifest, verify_files

_GZIP_LEVEL = 6
_ZSTD_LEVEL = 10
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest that a .zip can say."""
_ZIP64_BYTES = (1 << 31) - 1
_UNIX = 3
_CHUNK = 1 << 20
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def pack(folder: Path, archive: Path) -> Path:
    """Write the files that the manifest of `folder` lists, and the manifest, as `archive`; returns `archive`.

    The files are verified first. Raises InputError for a name that is none of the three formats, OutputExistsError when
    `archive` is there, MissingExtraError for .tar.zst without zstandard, CorruptArtifactError and ResourceError.
    """
    write = check_name(archive)
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    if archive.exists():
        raise OutputExistsError(f"{archive} exists already: choose another name or remove it")
    signature = [SIGNATURE] if (folder / SIGNATURE).is_file() else []
    temporary = archive.with_name(f".{archive.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(archive):
            archive.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as raw:
                write(raw, folder, [MANIFEST, *signature, *sorted(manifest.files)])
            temporary.replace(archive)
    finally:
        temporary.unlink(missing_ok=True)
    return archive


Writer = Callable[[IO[bytes], Path, Sequence[str]], None]


def check_name(archive: Path) -> Writer:
    """What writes an archive of this name; InputError or MissingExtraError where nothing can, before any work."""
    for suffix, write in _FORMATS.items():
        if archive.name.endswith(suffix):
            if write is _write_zstd:
                require("package", "zstandard")
            return write
    raise InputError(f"{archive} is no name of an archive: end it in {', '.join(_FORMATS)}")


def _write_gzip(raw: IO[bytes], folder: Path, names: Sequence[str]) -> None:
    # gzip writes the name of the file and the time into its header unless told otherwise.
    with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=_GZIP_LEVEL, mtime=0) as packed:
        _write_tar(packed, folder, names)


def _write_zstd(raw: IO[bytes], folder: Path, names: Sequence[str]) -> None:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
    with compressor.stream_writer(raw, closefd=False) as packed:
        _write_tar(packed, folder, names)


def _write_tar(packed: IO[bytes] | gzip.GzipFile, folder: Path, names: Sequence[str]) -> None:
    with tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = (folder / name).stat().st_size
            info.mode = _mode(folder / name)
            with (folder / name).open("rb") as source:
                tar.addfile(info, source)


def _write_zip(raw: IO[bytes], folder: Path, names: Sequence[str]) -> None:
    with zipfile.ZipFile(raw, "w") as packed:
        for name in names:
            info = zipfile.ZipInfo(name, _ZIP_DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = _UNIX
            info.external_attr = (stat.S_IFREG | _mode(folder / name)) << 16
            large = (folder / name).stat().st_size >= _ZIP64_BYTES
            with (folder / name).open("rb") as source, packed.open(info, "w", force_zip64=large) as target:
                shutil.copyfileobj(source, target, _CHUNK)


_FORMATS: dict[str, Writer] = {".tar.gz": _write_gzip, ".tar.zst": _write_zstd, ".zip": _write_zip}


def _mode(file: Path) -> int:
    return 0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn what a disk can refuse into a ResourceError about `out`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        reason = error.strerror
        raise ResourceError(f"{out} cannot be written ({reason}): free space or choose another place") from error
