"""Artifacts: whole or not there, verified on opening, reused by content key, never overwritten unasked."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from slmdeploy import artifacts
from slmdeploy.errors import CorruptArtifactError, InputError, OutputExistsError, ResourceError


def make(
    out: Path, text: str = "hello", *, plan: dict[str, object] | None = None, force: bool = False
) -> artifacts.Artifact:
    with artifacts.writing(out, kind="data", plan=plan or {}, inputs={}, force=force) as draft:
        (draft.path / "a.txt").write_text(text)
        draft.result["length"] = len(text)
    return artifacts.open_artifact(out, "data")


def test_written_whole_and_read_back(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    assert artifact.result == {"length": 5}
    assert artifact.manifest["files"]["a.txt"]["bytes"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with artifacts.writing(tmp_path / "out", kind="data", plan={}, inputs={}) as draft:
            (draft.path / "a.txt").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_and_only_artifacts_are_replaced(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputExistsError, match="exists already"):
        make(tmp_path / "out")
    assert make(tmp_path / "out", "again", force=True).result == {"length": 5}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="was not made by slmdeploy"):
        make(mine, force=True)
    assert (mine / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_damage_is_found_on_opening(tmp_path: Path, damage: str) -> None:
    file = make(tmp_path / "out").path / "a.txt"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("jello" if damage == "changed" else "he")
    with pytest.raises(CorruptArtifactError, match=r"a\.txt"):
        artifacts.open_artifact(tmp_path / "out")


@pytest.mark.parametrize("key", ["plan", "inputs", "result"])
def test_a_manifest_that_lacks_what_every_artifact_says_is_damage(tmp_path: Path, key: str) -> None:
    file = make(tmp_path / "out").path / "manifest.json"
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != key}))
    with pytest.raises(CorruptArtifactError, match=f"has no '{key}', which every artifact has"):
        artifacts.open_artifact(tmp_path / "out")


def test_another_kind_or_nothing_is_bad_input(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(InputError, match="is a data, but a graph is needed"):
        artifacts.open_artifact(tmp_path / "out", "graph")
    with pytest.raises(InputError, match="does not exist"):
        artifacts.open_artifact(tmp_path / "nothing")


def test_the_content_key_follows_plan_and_inputs(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "x").write_text("1")
    key = artifacts.content_key("data", {"a": 1}, {"in": source})
    assert key == artifacts.content_key("data", {"a": 1}, {"in": source})
    assert key != artifacts.content_key("data", {"a": 2}, {"in": source})
    (source / "x").write_text("2")
    assert key != artifacts.content_key("data", {"a": 1}, {"in": source})


def test_resumed_work_is_done_once_and_again_when_the_plan_changes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert artifacts.resumed(lambda: make(out, plan={"a": 1}))[1] is False
    before = (out / "a.txt").stat().st_mtime_ns
    artifact, reused = artifacts.resumed(lambda: make(out, plan={"a": 1}))
    assert reused
    assert artifact.result == {"length": 5}
    assert (out / "a.txt").stat().st_mtime_ns == before
    assert artifacts.resumed(lambda: make(out, plan={"a": 2}))[1] is False


def test_resuming_does_not_trust_a_damaged_artifact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    (out / "a.txt").write_text("jello")
    artifact, reused = artifacts.resumed(lambda: make(out))
    assert not reused
    assert (artifact.path / "a.txt").read_text() == "hello"


def test_a_full_disk_and_a_read_only_place_are_one_sentence(tmp_path: Path) -> None:
    for code, said in ((errno.ENOSPC, "disk is full"), (errno.EACCES, "choose a place you may write to")):
        with (
            pytest.raises(ResourceError, match=said),
            artifacts.writing(tmp_path / "out", kind="data", plan={}, inputs={}),
        ):
            raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        make(tmp_path / "file" / "out")


def test_kill_9_leaves_no_artifact_and_the_next_writer_cleans_up(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from slmdeploy import artifacts
        with artifacts.writing(Path({str(tmp_path / "out")!r}), kind="data", plan={{}}, inputs={{}}) as draft:
            (draft.path / "a.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    make(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    manifest = artifact.path / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["../secret"] = content["files"].pop("a.txt")
    manifest.write_text(json.dumps(content))
    with pytest.raises(CorruptArtifactError, match="secret"):
        artifacts.open_artifact(artifact.path)
