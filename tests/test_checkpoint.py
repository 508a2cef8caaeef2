"""checkpoint.py: resolving names, reading safetensors of every dtype, and missing, damaged or hostile files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from slmdeploy.checkpoint import (
    INDEX,
    SINGLE,
    Weights,
    label_token_ids,
    read_config,
    resolve_checkpoint,
    tokenizer_file,
)
from slmdeploy.errors import CorruptArtifactError, InputError, ResourceError
from tests.graphs import tiny_tokenizer

TENSOR = torch.tensor([[1.5, -2.0, 3.0e-3], [65504.0, 0.0, -0.1]])


def raw_safetensors(path: Path, header: object, data: bytes = b"") -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_checkpoint(tmp_path) == tmp_path
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


def test_what_is_neither_folder_nor_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(InputError, match="is a file; give the checkpoint folder"):
        resolve_checkpoint(file)
    for name in ("no-such-model", "../teacher", tmp_path / "none", "a/b/c", "a/../b"):
        with pytest.raises(InputError, match="does not exist; give a checkpoint folder or a Hugging Face id"):
            resolve_checkpoint(name)


def test_an_id_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResourceError, match=r"nobody/nothing is not a folder here, .* connect to the network"):
        resolve_checkpoint("nobody/nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_float_is_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.zeros(3, dtype=dtype), "b": TENSOR.to(dtype)}, tmp_path / SINGLE)
    weights = Weights(tmp_path)
    assert sorted(weights) == ["a", "b"]
    assert "b" in weights
    assert "c" not in weights
    assert weights.shape("b") == (2, 3)
    array = weights.read("b")
    assert array.dtype == np.float32
    assert np.array_equal(array, TENSOR.to(dtype).float().numpy())


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    save_file({"a": TENSOR}, tmp_path / "one.safetensors")
    save_file({"b": TENSOR * 2}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert np.array_equal(Weights(tmp_path).read("b"), 2 * TENSOR.numpy())
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"two\.safetensors is missing although"):
        Weights(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/one.safetensors", ".."])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptArtifactError, match="which is not in the checkpoint folder"):
        Weights(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CorruptArtifactError, match="has no weight_map"):
        Weights(tmp_path)


def test_pickles_are_refused_and_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        Weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="holds pickled weights only"):
        Weights(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 20, -1])
def test_a_truncated_file_is_refused_before_it_is_read(tmp_path: Path, keep: int) -> None:
    save_file({"a": TENSOR}, tmp_path / SINGLE)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:keep])
    with pytest.raises(CorruptArtifactError, match="truncated"):
        Weights(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 400]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": "2", "data_offsets": None},
        {"dtype": "F32"},
        None,
    ],
)
def test_a_hostile_header_entry_is_refused(tmp_path: Path, entry: object) -> None:
    raw_safetensors(tmp_path / SINGLE, {"a": entry}, bytes(8))
    with pytest.raises(CorruptArtifactError, match=r"a (does not fit|is damaged)"):
        Weights(tmp_path)


def test_a_header_that_is_no_object_is_refused(tmp_path: Path) -> None:
    raw_safetensors(tmp_path / SINGLE, [1, 2])
    with pytest.raises(CorruptArtifactError, match="damaged safetensors header"):
        Weights(tmp_path)
    (tmp_path / SINGLE).write_bytes((4).to_bytes(8, "little") + b"\xff{}}" + bytes(8))
    with pytest.raises(CorruptArtifactError, match="damaged safetensors header"):
        Weights(tmp_path)


def test_a_dtype_that_is_no_weight_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.int64)}, tmp_path / SINGLE)
    with pytest.raises(InputError, match="a has dtype I64; save it as F32, F16 or BF16"):
        Weights(tmp_path).read("a")


def test_config_json_must_be_an_object(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json is missing"):
        read_config(tmp_path)
    for content in ("{", "[1]", "\ud800".encode("utf-8", "surrogatepass")):
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(CorruptArtifactError, match=r"config\.json"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_config(tmp_path) == {"a": 1}


def test_labels_are_single_different_tokens(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        label_token_ids(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_file(tmp_path).is_file()
    assert label_token_ids(tmp_path) == (tokenizer.token_to_id("Ġno"), tokenizer.token_to_id("Ġyes"))
    with pytest.raises(InputError, match="label ' never' is 5 tokens"):
        label_token_ids(tmp_path, (" no", " never"))
    with pytest.raises(InputError, match="are the same token"):
        label_token_ids(tmp_path, (" no", " no"))
