"""Manifests and runtime.json: what is sound is read whole, and each hostile form is refused in one sentence."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.runtime.bundle import (
    name_problem,
    read_manifest,
    read_runtime,
    require_listed,
    sha256_file,
    verify_files,
)
from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.strictjson import MAX_JSON_BYTES

SOUND_RUNTIME: dict[str, Any] = {
    "format": 1,
    "tasks": ["generate", "score"],
    "interface": "shared",
    "layers": 2,
    "kv_heads": [2, 1],
    "head_dim": 16,
    "vocab_size": 100,
    "max_length": 64,
    "bos_token_id": None,
    "eos_token_ids": [1],
    "score": {"labels": [" no", " yes"], "label_ids": [12, 34]},
    "session": {"threads": 0, "spinning": True, "parallel_items": False},
    "precision": "fp32",
}


def artifact(folder: Path, **changes: Any) -> Path:
    """A folder with two files and a manifest that lists them, some of its keys changed."""
    entries = {}
    for name, data in {"model.onnx": b"graph", "sub/words.txt": b"abc"}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        entries[name] = {"sha256": sha256_file(path), "bytes": len(data)}
    manifest = {"schema": 1, "kind": "build", "content_key": "k", "files": entries, "result": {"passed": True}}
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return folder


def test_a_sound_artifact_is_read_and_verified(tmp_path: Path) -> None:
    manifest = read_manifest(artifact(tmp_path))
    verify_files(tmp_path, manifest)
    assert (manifest.kind, manifest.content_key, manifest.result) == ("build", "k", {"passed": True})
    assert manifest.total_bytes == 8
    assert sorted(manifest.files) == ["model.onnx", "sub/words.txt"]


def test_no_folder_is_bad_input_and_no_manifest_is_corrupt(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", "a\0b"):
        with pytest.raises(InputError, match="is not a folder"):
            read_manifest(path)
    with pytest.raises(CorruptArtifactError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/etc/passwd", "is absolute"),
        ("../up", "leaves the folder"),
        ("a/../../up", "leaves the folder"),
        ("a/./b", "leaves the folder"),
        ("a//b", "leaves the folder"),
        ("a/", "leaves the folder"),
        ("a\\b", "backslash or a colon"),
        ("C:evil", "backslash or a colon"),
        ("nul\0", "control character"),
        ("line\nbreak", "control character"),
        ("\ud800", "broken code point"),
        ("", "is empty"),
        ("x" * 300, "leaves the folder or is not in its plain form"),
        ("manifest.json", "is the manifest itself"),
    ],
)
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, name: str, problem: str) -> None:
    assert problem in str(name_problem(name))
    artifact(tmp_path, files={name: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(CorruptArtifactError, match=problem):
        read_manifest(tmp_path)


def test_plain_names_are_fine() -> None:
    assert [name_problem(name) for name in ("a", "a/b.c", "..a", "ü ber", ".hidden")] == [None] * 5


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"sha256": "0" * 64}, r"files\.model\.onnx\.bytes is missing"),
        ({"sha256": "0" * 64, "bytes": -1}, r"bytes must be an integer from 0"),
        ({"sha256": "0" * 64, "bytes": 2**60}, r"bytes must be an integer from 0"),
        ({"sha256": "0" * 64, "bytes": True}, r"bytes must be an integer from 0"),
        ({"sha256": "0" * 64, "bytes": 1.0}, r"bytes must be an integer from 0"),
        ({"sha256": "0" * 63, "bytes": 1}, "64 lower-case hexadecimal"),
        ({"sha256": "Z" * 64, "bytes": 1}, "64 lower-case hexadecimal"),
        ({"sha256": 5, "bytes": 1}, "sha256 must be a string"),
        ({"sha256": "0" * 64, "bytes": 1, "mode": 7}, r"mode is not known"),
        ([], "must be an object"),
    ],
)
def test_entries_of_the_wrong_form_are_refused(tmp_path: Path, entry: object, problem: str) -> None:
    artifact(tmp_path, files={"model.onnx": entry})
    with pytest.raises(CorruptArtifactError, match=problem):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"schema": 2}, "schema must be 1"),
        ({"schema": True}, "schema must be 1"),
        ({"schema": "1"}, "schema must be 1"),
        ({"kind": "virus"}, "kind must be one of checkpoint"),
        ({"kind": 3}, "kind must be a string"),
        ({"files": []}, "files must be an object"),
        ({"plan": []}, "plan must be an object"),
        ({"content_key": None}, "content_key must be a string"),
    ],
)
def test_manifests_of_the_wrong_form_are_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CorruptArtifactError, match=problem):
        read_manifest(artifact(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not valid JSON"),
        (b'{"schema": 1', "not valid JSON"),
        (b'{"schema": 1, "schema": 1}', "'schema' is given twice"),
        (b'{"schema": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * (MAX_JSON_BYTES + 1), "is larger than"),
    ],
    ids=["empty", "truncated", "twice", "nan", "deep", "list", "bytes", "digits", "huge"],
)
def test_json_that_is_damaged_or_hostile_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=problem):
        read_manifest(tmp_path)


def test_changed_truncated_missing_and_linked_files_are_refused(tmp_path: Path) -> None:
    manifest = read_manifest(artifact(tmp_path))
    model, words = tmp_path / "model.onnx", tmp_path / "sub" / "words.txt"

    def refused(problem: str) -> None:
        with pytest.raises(CorruptArtifactError, match=problem):
            verify_files(tmp_path, manifest)

    model.write_bytes(b"grapH")
    refused(r"model\.onnx has changed")
    model.write_bytes(b"gra")
    refused(r"model\.onnx has 3 bytes where manifest\.json says 5")
    model.unlink()
    refused(r"model\.onnx is missing")
    os.mkfifo(model)
    refused(r"model\.onnx is missing")
    model.unlink()
    model.symlink_to(words)
    refused(r"model\.onnx is a symbolic link")
    model.unlink()
    model.write_bytes(b"graph")
    (tmp_path / "sub").rename(tmp_path / "real")
    (tmp_path / "sub").symlink_to(tmp_path / "real")
    refused(r"sub is a symbolic link")


def test_a_manifest_that_is_a_link_is_refused(tmp_path: Path) -> None:
    target = artifact(tmp_path / "real")
    (tmp_path / "manifest.json").symlink_to(target / "manifest.json")
    with pytest.raises(CorruptArtifactError, match="symbolic link"):
        read_manifest(tmp_path)


def test_what_is_run_must_be_listed(tmp_path: Path) -> None:
    manifest = read_manifest(artifact(tmp_path))
    require_listed(tmp_path, manifest, ["model.onnx"])
    with pytest.raises(CorruptArtifactError, match=r"does not list tokenizer\.json"):
        require_listed(tmp_path, manifest, ["tokenizer.json"])
    (tmp_path / "model.onnx.data").write_bytes(b"smuggled")
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx\.data is not listed"):
        require_listed(tmp_path, manifest, [])


def runtime_folder(folder: Path, value: object) -> Path:
    (folder / "runtime.json").write_text(json.dumps(value))
    return folder


def test_a_sound_runtime_is_read_whole(tmp_path: Path) -> None:
    config = read_runtime(runtime_folder(tmp_path, SOUND_RUNTIME))
    assert (config.tasks, config.kv_heads, config.eos_token_ids) == (("generate", "score"), (2, 1), (1,))
    assert config.score is not None
    assert (config.score.label_ids, config.bos_token_id, config.spinning) == ((12, 34), None, True)
    generator = SOUND_RUNTIME | {"tasks": ["generate"], "score": None, "bos_token_id": 0}
    assert read_runtime(runtime_folder(tmp_path, generator)).score is None


def test_how_prompts_run_may_be_left_out(tmp_path: Path) -> None:
    plain = read_runtime(runtime_folder(tmp_path, SOUND_RUNTIME))
    assert (plain.prefill_chunk, plain.own_prefill) == (0, False)
    split = SOUND_RUNTIME | {"prefill": {"chunk": 128, "own_graph": True}}
    config = read_runtime(runtime_folder(tmp_path, split))
    assert (config.prefill_chunk, config.own_prefill) == (128, True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 2}, "format must be 1"),
        ({"tasks": []}, "tasks must be a list"),
        ({"tasks": ["fly"]}, "tasks must be a list"),
        ({"tasks": ["score", "score"]}, "tasks must be a list without repetition"),
        ({"tasks": [["score"]]}, "tasks must be a list"),
        ({"tasks": ["generate"]}, 'score must be an object exactly when tasks has "score"'),
        ({"score": None}, 'score must be an object exactly when tasks has "score"'),
        ({"interface": "other"}, "interface must be one of shared, standard"),
        ({"layers": 0}, "layers must be an integer from 1"),
        ({"kv_heads": [2]}, "kv_heads must be a list of 2 positive integers"),
        ({"kv_heads": [2, 0]}, "kv_heads must be a list of 2 positive integers"),
        ({"kv_heads": 2}, "kv_heads must be a list"),
        ({"max_length": 2**40}, "max_length must be an integer"),
        ({"bos_token_id": 100}, "bos_token_id must be an integer from 0 to 99"),
        ({"eos_token_ids": [100]}, "eos_token_ids must be a list of token ids from 0 to 99"),
        ({"score": {"labels": [" no"], "label_ids": [1, 2]}}, r"score\.labels must be a list of two words"),
        ({"score": {"labels": [" no", " yes"], "label_ids": [1]}}, r"score\.label_ids must be a list"),
        (
            {"session": {"threads": -1, "spinning": True, "parallel_items": False}},
            r"session\.threads must be an integer from 0",
        ),
        (
            {"session": {"threads": 1, "spinning": 1, "parallel_items": False}},
            r"session\.spinning must be true or false",
        ),
        ({"session": {"threads": 1, "spinning": True, "parallel_items": False, "x": 1}}, r"session\.x is not known"),
        ({"colour": "red"}, "colour is not known"),
        ({"prefill": 128}, "prefill must be an object"),
        ({"prefill": {"chunk": -1, "own_graph": False}}, r"prefill\.chunk must be an integer from 0"),
        ({"prefill": {"chunk": 128}}, r"prefill\.own_graph is missing"),
        (
            {"prefill": {"chunk": 0, "own_graph": True, "step_rows": -1}},
            r"prefill\.step_rows must be an integer from 0",
        ),
        (
            {"prefill": {"chunk": 0, "own_graph": False, "step_rows": 4}},
            r"prefill\.step_rows must be 0 where own_graph",
        ),
        ({"prefill": {"chunk": 128, "own_graph": True, "x": 1}}, r"prefill\.x is not known"),
    ],
)
def test_runtimes_of_the_wrong_form_are_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CorruptArtifactError, match=problem):
        read_runtime(runtime_folder(tmp_path, SOUND_RUNTIME | changes))


@pytest.mark.parametrize("key", list(SOUND_RUNTIME))
def test_every_key_of_the_runtime_is_needed(tmp_path: Path, key: str) -> None:
    with pytest.raises(CorruptArtifactError, match=f"{key} is missing"):
        read_runtime(runtime_folder(tmp_path, {name: value for name, value in SOUND_RUNTIME.items() if name != key}))
