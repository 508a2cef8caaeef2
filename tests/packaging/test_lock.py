"""Locks: every distribution with the sha256 of its wheel, by a real pip over a folder of wheels."""

import hashlib
import re
import zipfile
from pathlib import Path

import pytest

from slmdeploy.errors import InputError
from slmdeploy.packaging.lock import lock_requirements


def write_wheel(folder: Path, name: str, *, needs: str | None = None) -> str:
    """A wheel without code; returns its sha256."""
    file, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            "Version: 1.0",
            *([f"Requires-Dist: {needs}"] if needs else []),
        ]
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(folder)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    return folder


def test_a_lock_holds_what_was_asked_for_and_what_that_needs(index: Path, tmp_path: Path) -> None:
    inner = write_wheel(index, "inner_thing")
    outer = write_wheel(index, "outer_thing", needs="inner_thing>=1")
    lock_requirements({"outer_thing": "1.0"}, tmp_path / "requirements.lock")
    text = (tmp_path / "requirements.lock").read_text()
    assert re.match(r"# Wheels for CPython 3\.\d+\.\d+ on \w+ \w+", text)
    expected = [f"inner_thing==1.0 --hash=sha256:{inner}", f"outer_thing==1.0 --hash=sha256:{outer}"]
    assert text.replace("\\\n    ", "").splitlines()[1:] == expected


def test_what_cannot_be_found_is_one_sentence_and_no_file(index: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be locked \(ERROR: .*outer_thing==1\.0.*\): package without --lock"):
        lock_requirements({"outer_thing": "1.0"}, tmp_path / "requirements.lock")
    assert not (tmp_path / "requirements.lock").exists()
