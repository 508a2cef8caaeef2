"""Every hostile or damaged archive is refused with nothing left behind, in each of the three formats."""

import gzip
import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import zstandard

from slmdeploy.errors import CorruptArtifactError, InputError, OutputExistsError, ResourceError
from slmdeploy.packaging import unpacking
from slmdeploy.packaging.archive import pack
from slmdeploy.packaging.unpacking import unpack
from tests.packaging.packages import package

MANIFEST = json.dumps({"schema": 1, "kind": "package", "content_key": "k", "files": {}}).encode()
FORMATS = ["p.tar.gz", "p.tar.zst", "p.zip"]


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_of(path: Path, *members: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for info, data in members:
            packed.writestr(info, data)
    return path


def entry(name: str, kind: int = stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.filename = info.orig_filename = name
    info.create_system, info.external_attr = 3, (kind | 0o644) << 16
    return info


def refused(archive: Path, out: Path, problem: str) -> None:
    with pytest.raises(CorruptArtifactError, match=problem):
        unpack(archive, out)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.endswith(".tmp")], "a temporary folder was left"


HOSTILE_NAMES = [
    ("/etc/cron", "is absolute"),
    ("../../up", "leaves the folder"),
    ("a/../../up", "leaves the folder"),
    ("a\\b", "backslash"),
    ("C:/x", "colon"),
    ("a\x1bb", "control character"),
    ("nul.txt", "Windows reads otherwise"),
    ("trailing.", "Windows reads otherwise"),
    ("COM\u00b9.txt", "Windows reads otherwise"),
    ("conout$", "Windows reads otherwise"),
    ("aux .txt", "Windows reads otherwise"),
    ("fdp\u202egpj.exe", "cannot be seen"),
    ("a\u200bb", "cannot be seen"),
    (".git/config", "is a repository's"),
    ("x/.GIT/hooks/post-checkout", "is a repository's"),
    ("MANIFEST.json", "is there twice"),
    ("Manifest.JSON/x", "writes otherwise"),
    ("manifest.json", "is there twice"),
]


@pytest.mark.parametrize(("name", "problem"), HOSTILE_NAMES)
def test_hostile_names_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    archive = tar_of(tmp_path / "bad.tar.gz", (member("manifest.json"), MANIFEST), (member(name), b"x"))
    refused(archive, tmp_path / "out", problem)
    assert not (tmp_path.parent / "up").exists()


@pytest.mark.parametrize(("name", "problem"), HOSTILE_NAMES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_names_in_a_zip_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    archive = zip_of(tmp_path / "bad.zip", ("manifest.json", MANIFEST), (entry(name), b"x"))
    refused(archive, tmp_path / "out", problem)
    assert not (tmp_path.parent / "up").exists()


def test_a_name_cut_at_a_nul_is_judged_as_it_stands_in_the_file(tmp_path: Path) -> None:
    archive = zip_of(tmp_path / "bad.zip", ("manifest.json", MANIFEST), (entry("run0.sh"), b"x"))
    archive.write_bytes(archive.read_bytes().replace(b"run0.sh", b"run\0.sh"))
    refused(archive, tmp_path / "out", "control character")


def test_names_that_differ_in_how_an_accent_is_written_are_one(tmp_path: Path) -> None:
    members = ((member("manifest.json"), MANIFEST), (member("caf\u00e9"), b"x"), (member("cafe\u0301"), b"y"))
    refused(tar_of(tmp_path / "bad.tar.gz", *members), tmp_path / "out", "is there twice")


@pytest.mark.parametrize("names", [("d", "D/a"), ("d/a", "D/b"), ("d/e/a", "d/E/b"), ("caf\u00e9/a", "cafe\u0301/b")])
def test_folders_that_are_one_on_some_systems_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    members = [(member(name), b"x") for name in names]
    archive = tar_of(tmp_path / "bad.tar.gz", (member("manifest.json"), MANIFEST), *members)
    refused(archive, tmp_path / "out", "writes otherwise")


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), "neither a file nor a folder"),
        (member("hard", tarfile.LNKTYPE, "manifest.json"), "neither a file nor a folder"),
        (member("device", tarfile.CHRTYPE), "neither a file nor a folder"),
        (member("disk", tarfile.BLKTYPE), "neither a file nor a folder"),
        (member("pipe", tarfile.FIFOTYPE), "neither a file nor a folder"),
        (member("manifest.json/x"), "a member is a file where another needs a folder"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_members_that_are_no_files_are_refused(tmp_path: Path, bad: tarfile.TarInfo, problem: str) -> None:
    archive = tar_of(tmp_path / "bad.tar.gz", (member("manifest.json"), MANIFEST), (bad, b"x"))
    refused(archive, tmp_path / "out", problem)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_members_of_a_zip_that_are_no_files_are_refused(tmp_path: Path, kind: int) -> None:
    archive = zip_of(tmp_path / "bad.zip", ("manifest.json", MANIFEST), (entry("link", kind), b"/etc/passwd"))
    refused(archive, tmp_path / "out", "neither a file nor a folder")


def test_a_zip_that_is_encrypted_or_packed_otherwise_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr("manifest.json", MANIFEST)
    refused(tmp_path / "lzma.zip", tmp_path / "out", "compressed in a way")
    data = bytearray(zip_of(tmp_path / "plain.zip", ("manifest.json", MANIFEST)).read_bytes())
    for header, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + at] |= 1
    (tmp_path / "encrypted.zip").write_bytes(data)
    refused(tmp_path / "encrypted.zip", tmp_path / "out", "is encrypted")


def test_a_bomb_is_refused_by_its_declared_size_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = ((member("manifest.json"), MANIFEST), (member("zeros"), bytes(1 << 20)))
    archive = tar_of(tmp_path / "bomb.tar.gz", *members)
    packed = zip_of(tmp_path / "bomb.zip", ("manifest.json", MANIFEST), ("zeros", bytes(1 << 20)))
    for bomb in (archive, packed):
        with pytest.raises(CorruptArtifactError, match="zeros' takes the contents over 1000 bytes"):
            unpack(bomb, tmp_path / "out", max_bytes=1000)
    monkeypatch.setattr(unpacking, "MAX_MEMBERS", 1)
    refused(archive, tmp_path / "out", "1 members")


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["gzip", "zstd"])
def test_a_bomb_in_a_header_is_refused_before_it_is_in_memory(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    header = member("bomb", tarfile.XHDTYPE)
    header.size = 64 << 20
    (tmp_path / "bomb").write_bytes(compress(header.tobuf() + bytes(header.size)))
    refused(tmp_path / "bomb", tmp_path / "out", "it unpacks to more than its members")


def test_a_zip_member_that_is_longer_than_it_says_is_refused(tmp_path: Path) -> None:
    data = zip_of(tmp_path / "honest.zip", ("manifest.json", MANIFEST), (entry("zeros"), bytes(5000))).read_bytes()
    liar = data.replace((5000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    assert liar != data
    (tmp_path / "liar.zip").write_bytes(liar)
    refused(tmp_path / "liar.zip", tmp_path / "out", "damaged|not listed|in the archive and not")


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    sparse = member("sparse")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(1 << 30)}
    sparse.pax_headers["GNU.sparse.map"] = f"{(1 << 30) - 1},1"
    archive = tar_of(tmp_path / "sparse.tar.gz", (member("manifest.json"), MANIFEST), (sparse, b"x"))
    refused(archive, tmp_path / "out", "neither a file nor a folder")


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_archives_are_refused(tmp_path: Path, name: str) -> None:
    data = pack(package(tmp_path / "p"), tmp_path / name).read_bytes()
    for broken in (b"", b"no archive", data[:4], data[: len(data) // 2], data[:60] + b"\0\1\2\3" + data[64:]):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(CorruptArtifactError):
            unpack(tmp_path / "broken", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_changed_in_an_archive_it_is_whole_or_refused(tmp_path: Path, name: str) -> None:
    folder, random = package(tmp_path / "p"), Random(0)
    data = pack(folder, tmp_path / name).read_bytes()
    whole = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refusals = 0
    for number in range(80):
        broken, at = bytearray(data), random.randrange(len(data))
        broken[at : at + random.randrange(3)] = random.randbytes(random.randrange(3))
        (tmp_path / "broken").write_bytes(broken)
        out = tmp_path / f"out{number}"
        try:
            unpack(tmp_path / "broken", out)
        except CorruptArtifactError:
            refusals += 1
            assert not out.exists()
        else:
            assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == whole
    assert refusals > 20


def test_contents_must_be_what_the_manifest_says(tmp_path: Path) -> None:
    folder = package(tmp_path / "p")
    manifest = (folder / "manifest.json").read_bytes()
    changed = tar_of(tmp_path / "changed.tar.gz", (member("manifest.json"), manifest), (member("run"), b"rm -rf"))
    refused(changed, tmp_path / "out", r"is missing|bytes where manifest\.json says")
    refused(tar_of(tmp_path / "none.tar.gz", (member("run"), b"x")), tmp_path / "out", r"has no manifest\.json")
    stray = tar_of(tmp_path / "stray.tar.gz", (member("manifest.json"), MANIFEST), (member("numpy.py"), b"evil"))
    refused(stray, tmp_path / "out", r"'numpy\.py' is in the archive and not in manifest\.json")


def test_no_archive_and_no_room_are_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is not a file"):
        unpack(tmp_path / "none.tar.gz", tmp_path / "out")
    archive = pack(package(tmp_path / "p"), tmp_path / "p.tar.gz")
    with pytest.raises(OutputExistsError, match="p exists already"):
        unpack(archive, tmp_path / "p")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpacking.shutil, "copyfileobj", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
