"""Archives: the same bytes each time, and every hostile member refused with nothing left behind."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from slmdeploy.errors import CorruptArtifactError, InputError, OutputExistsError, ResourceError
from slmdeploy.packaging import archive as archive_module
from slmdeploy.packaging.archive import pack, unpack
from tests.graphs import write_manifest

MANIFEST = json.dumps({"schema": 1, "kind": "package", "content_key": "k", "files": {}}).encode()


def package(folder: Path) -> Path:
    (folder / "runtime").mkdir(parents=True)
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o775)
    (folder / "runtime" / "model.py").write_text("pass\n")
    (folder / "model.onnx").write_bytes(bytes(1000))
    write_manifest(folder, kind="package")
    return folder


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


def refused(archive: Path, out: Path, problem: str) -> None:
    with pytest.raises(CorruptArtifactError, match=problem):
        unpack(archive, out)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.endswith(".tmp")], "a temporary folder was left"


def test_a_package_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = package(tmp_path / "p")
    out = unpack(pack(folder, tmp_path / "p.tar.gz"), tmp_path / "else" / "where")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) == files
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in files)
    assert (out / "run").stat().st_mode & 0o777 == 0o755
    assert (out / "model.onnx").stat().st_mode & 0o777 == 0o644


def test_the_same_package_gives_the_same_bytes(tmp_path: Path) -> None:
    first = pack(package(tmp_path / "a"), tmp_path / "first.tar.gz")
    again = package(tmp_path / "b")
    (again / "model.onnx").touch()
    (again / "run").chmod(0o700)
    assert pack(again, tmp_path / "again.tar.gz").read_bytes() == first.read_bytes()


def test_only_listed_and_sound_files_are_packed(tmp_path: Path) -> None:
    folder = package(tmp_path / "p")
    (folder / "notes.txt").write_text("mine")
    with tarfile.open(pack(folder, tmp_path / "p.tar.gz")) as tar:
        assert tar.getnames() == ["manifest.json", "model.onnx", "run", "runtime/model.py"]
    (folder / "model.onnx").write_bytes(bytes(999))
    with pytest.raises(CorruptArtifactError, match="999 bytes"):
        pack(folder, tmp_path / "q.tar.gz")
    assert not (tmp_path / "q.tar.gz").exists()


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    archive = pack(package(tmp_path / "p"), tmp_path / "p.tar.gz")
    with pytest.raises(OutputExistsError, match=r"p\.tar\.gz exists already"):
        pack(tmp_path / "p", archive)
    with pytest.raises(OutputExistsError, match="p exists already"):
        unpack(archive, tmp_path / "p")


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (member("/etc/cron"), "is absolute"),
        (member("../../up"), "leaves the folder"),
        (member("a/../../up"), "leaves the folder"),
        (member("a\\b"), "backslash"),
        (member("C:/x"), "colon"),
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), "neither a file nor a folder"),
        (member("hard", tarfile.LNKTYPE, "manifest.json"), "neither a file nor a folder"),
        (member("device", tarfile.CHRTYPE), "neither a file nor a folder"),
        (member("pipe", tarfile.FIFOTYPE), "neither a file nor a folder"),
        (member("manifest.json"), "is there twice"),
        (member("MANIFEST.json"), "is there twice"),
        (member("manifest.json/x"), "a member is a file where another needs a folder"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else "",
)
def test_hostile_members_are_refused(tmp_path: Path, bad: tarfile.TarInfo, problem: str) -> None:
    archive = tar_of(tmp_path / "bad.tar.gz", (member("manifest.json"), MANIFEST), (bad, b"x"))
    refused(archive, tmp_path / "out", problem)
    assert not (tmp_path.parent / "up").exists()


def test_a_bomb_is_refused_by_its_declared_size_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = ((member("manifest.json"), MANIFEST), (member("zeros"), bytes(1 << 20)))
    archive = tar_of(tmp_path / "bomb.tar.gz", *members)
    with pytest.raises(CorruptArtifactError, match="zeros' takes the contents over 1000 bytes"):
        unpack(archive, tmp_path / "out", max_bytes=1000)
    monkeypatch.setattr(archive_module, "MAX_MEMBERS", 1)
    refused(archive, tmp_path / "out", "1 members")


def test_sparse_members_count_with_what_they_would_write(tmp_path: Path) -> None:
    sparse = member("sparse")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(1 << 40)}
    sparse.pax_headers["GNU.sparse.map"] = f"{(1 << 40) - 1},1"
    archive = tar_of(tmp_path / "sparse.tar.gz", (member("manifest.json"), MANIFEST), (sparse, b"x"))
    refused(archive, tmp_path / "out", "neither a file nor a folder|takes the contents over")


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    archive = pack(package(tmp_path / "p"), tmp_path / "p.tar.gz")
    data = archive.read_bytes()
    plain = gzip.decompress(data)
    for broken in (b"", b"no archive", data[: len(data) // 2], data[:60] + b"\0\0\0\0" + data[64:], plain):
        (tmp_path / "broken.tar.gz").write_bytes(broken)
        with pytest.raises(CorruptArtifactError):
            unpack(tmp_path / "broken.tar.gz", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_contents_must_be_what_the_manifest_says(tmp_path: Path) -> None:
    folder = package(tmp_path / "p")
    manifest = (folder / "manifest.json").read_bytes()
    changed = tar_of(tmp_path / "changed.tar.gz", (member("manifest.json"), manifest), (member("run"), b"rm -rf"))
    refused(changed, tmp_path / "out", r"is missing|bytes where manifest\.json says")
    refused(tar_of(tmp_path / "none.tar.gz", (member("run"), b"x")), tmp_path / "out", r"has no manifest\.json")


def test_no_archive_and_no_room_are_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is not a file"):
        unpack(tmp_path / "none.tar.gz", tmp_path / "out")
    archive = pack(package(tmp_path / "p"), tmp_path / "p.tar.gz")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive_module.shutil, "copyfileobj", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
