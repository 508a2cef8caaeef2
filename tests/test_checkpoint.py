"""checkpoint.py: resolving names, reading safetensors of every dtype, and missing, damaged or hostile files."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from slmdeploy.checkpoint import (
    INDEX,
    SINGLE,
    Weights,
    chat_templates,
    label_token_ids,
    read_config,
    require_exact_weights,
    resolve_checkpoint,
    tokenizer_file,
)
from slmdeploy.errors import CorruptArtifactError, InputError, ResourceError, UnsupportedModelError
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


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, repository: str = "some/model") -> Path:
    """A repository in the layout of the Hugging Face cache, downloaded by someone else before; its snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    for ref in ("main", "v1.0"):
        (folder / "refs" / ref).write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT])
def test_an_id_in_the_cache_needs_no_network(tmp_path: Path, revision: str | None) -> None:
    snapshot = cached(tmp_path / "cache")
    assert resolve_checkpoint("some/model", revision=revision, cache_dir=tmp_path / "cache") == snapshot


def test_what_is_not_in_the_cache_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cached(tmp_path / "cache")
    with pytest.raises(
        ResourceError, match=r"nobody/nothing is not a folder here .*cache.*HF_HUB_OFFLINE is set; unset"
    ):
        resolve_checkpoint("nobody/nothing", cache_dir=tmp_path / "cache")
    with pytest.raises(ResourceError, match=r"some/model at revision v2 is not .* HF_HUB_OFFLINE is set"):
        resolve_checkpoint("some/model", revision="v2", cache_dir=tmp_path / "cache")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder, which has no revision 'v1'"):
        resolve_checkpoint(tmp_path, revision="v1")


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the hub's client without the request and response that it would carry."""
    return kind.__new__(kind, "as the hub says it")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (hub_error(hub.GatedRepoError), InputError, "is gated on Hugging Face; accept its terms"),
        (hub_error(hub.RepositoryNotFoundError), InputError, "neither a folder here nor a public Hugging Face model"),
        (hub_error(hub.RevisionNotFoundError), InputError, "has no revision 'v3'; give a branch, a tag or a commit"),
        (hub_error(hub.HfHubHTTPError), ResourceError, "could not be downloaded; connect to download it"),
        (ConnectionError(), ResourceError, "could not be downloaded; connect to download it"),
    ],
)
def test_every_refusal_of_the_hub_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], said: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    with pytest.raises(kind, match=said):
        resolve_checkpoint("some/model", revision="v3")


def test_only_what_cannot_run_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **arguments: Any) -> str:
        asked.update(arguments, repository=repository)
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_checkpoint("some/model", revision="v3", cache_dir=tmp_path) == tmp_path
    assert (asked["repository"], asked["revision"], asked["cache_dir"]) == ("some/model", "v3", tmp_path)
    offered = [
        *("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "merges.txt"),
        *("1_Pooling/config.json", "2_Dense/model.safetensors", "additional_chat_templates/rag.jinja"),
        *("modeling_custom.py", "pytorch_model.bin", "model.gguf", "onnx/model.onnx", "README.md"),
        *("consolidated.safetensors", "original/model.safetensors"),
    ]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(offered, **patterns)) == offered[:8]


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
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match="holds GGUF weights only; give the safetensors checkpoint"):
        Weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"pickled weights only.* save them as safetensors with python -c .*save_pre"):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    broken = TENSOR.clone()
    broken[1, 2] = value
    save_file({"good": TENSOR.to(dtype), "broken": broken.to(dtype)}, tmp_path / SINGLE)
    weights = Weights(tmp_path)
    weights.read("good")
    with pytest.raises(InputError, match=r"model\.safetensors: broken has 1 of 6 values that are NaN or infinite"):
        weights.read("broken")


def test_large_weights_whose_sum_overflows_are_weights(tmp_path: Path) -> None:
    save_file({"large": torch.full((4,), 3e38)}, tmp_path / SINGLE)
    assert np.all(Weights(tmp_path).read("large") == np.float32(3e38))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"compression_config": {"format": "pack-quantized"}}, "pack-quantized"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "NVFP4"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "unnamed method"),
        ({"quantization_config": "?"}, "unnamed method"),
    ],
)
def test_quantised_checkpoints_are_refused_with_what_to_do(tmp_path: Path, config: object, method: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = rf"quantised already \({method}\), and only float32, float16 and bfloat16 .* `slmdeploy build` quantises"
    with pytest.raises(UnsupportedModelError, match=said):
        require_exact_weights(tmp_path)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_checkpoint_that_is_not_quantised_passes(tmp_path: Path, config: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    require_exact_weights(tmp_path)


def test_a_tokenizer_of_another_form_is_told_how_to_convert(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json is missing; .* with python -c .*AutoTokenizer.*save_pretr"):
        tokenizer_file(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(InputError, match=r"write it with pip install sentencepiece && python -c .*AutoTokenizer"):
        tokenizer_file(tmp_path)


def test_further_chat_templates_are_found(tmp_path: Path) -> None:
    assert chat_templates(tmp_path) == []
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("tool_use.jinja", "rag.jinja", "notes.txt"):
        (tmp_path / "additional_chat_templates" / name).touch()
    names = [f"additional_chat_templates/{name}.jinja" for name in ("rag", "tool_use")]
    assert chat_templates(tmp_path) == names


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
