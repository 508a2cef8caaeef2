"""Archives: each format comes back as it was, and is the same bytes each time."""

import tarfile
import zipfile
from pathlib import Path

import pytest

from slmdeploy.errors import CorruptArtifactError, InputError, MissingExtraError, OutputExistsError
from slmdeploy.packaging import archive as archive_module
from slmdeploy.packaging.archive import pack
from slmdeploy.packaging.signature import read_private_key, sign
from slmdeploy.packaging.unpacking import unpack
from tests.packaging.packages import package, write_keys

FORMATS = ["p.tar.gz", "p.tar.zst", "p.zip"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_package_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    folder = package(tmp_path / "p")
    out = unpack(pack(folder, tmp_path / name), tmp_path / "else" / "where")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) == files
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in files)
    assert (out / "run").stat().st_mode & 0o777 == 0o755
    assert (out / "model.onnx").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_package_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    first = pack(package(tmp_path / "a"), tmp_path / f"first-{name}")
    again = package(tmp_path / "b")
    (again / "model.onnx").touch()
    (again / "run").chmod(0o700)
    assert pack(again, tmp_path / f"again-{name}").read_bytes() == first.read_bytes()


def test_only_listed_and_sound_files_are_packed_and_the_signature_behind_the_manifest(tmp_path: Path) -> None:
    folder = package(tmp_path / "p")
    (folder / "notes.txt").write_text("mine")
    with tarfile.open(pack(folder, tmp_path / "p.tar.gz")) as tar:
        assert tar.getnames() == ["manifest.json", "model.onnx", "run", "runtime/model.py"]
    sign(folder, read_private_key(write_keys(tmp_path / "keys")[0]))
    with zipfile.ZipFile(pack(folder, tmp_path / "p.zip")) as packed:
        assert packed.namelist()[:3] == ["manifest.json", "manifest.json.sig", "model.onnx"]
    (folder / "model.onnx").write_bytes(bytes(999))
    with pytest.raises(CorruptArtifactError, match="999 bytes"):
        pack(folder, tmp_path / "q.tar.gz")
    assert not (tmp_path / "q.tar.gz").exists()


def test_large_files_make_a_zip_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "_ZIP64_BYTES", 500)
    out = unpack(pack(package(tmp_path / "p"), tmp_path / "p.zip"), tmp_path / "out")
    assert (out / "model.onnx").read_bytes() == bytes(1000)


def test_names_outputs_and_extras_are_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = package(tmp_path / "p")
    with pytest.raises(InputError, match=r"end it in \.tar\.gz, \.tar\.zst, \.zip"):
        pack(folder, tmp_path / "p.rar")
    (tmp_path / "there.zip").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"there\.zip exists already"):
        pack(folder, tmp_path / "there.zip")
    monkeypatch.setattr("slmdeploy.extras.find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=r"zstandard.*slmdeploy\[package\]"):
        pack(folder, tmp_path / "p.tar.zst")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "there.zip"]
