"""spec.py: what is read, what is refused by name, and which tensors must be there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from slmdeploy.checkpoint import Weights
from slmdeploy.errors import InputError, UnsupportedModelError
from slmdeploy.exporting.spec import DecoderSpec, LayerSpec, Rope, check_tensors, read_spec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 33,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SMOLLM2: dict[str, Any] = {  # what the published 135M checkpoint says, besides sizes
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.40.1",
    "use_cache": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec_of(folder: Path, **changes: Any) -> DecoderSpec:
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return read_spec(folder)


def test_absent_fields_take_the_defaults_of_transformers(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    assert spec.layers == (LayerSpec(heads=4, kv_heads=4, intermediate=33),) * 2
    assert (spec.head_dim, spec.max_length, spec.norm_eps) == (16, 2048, 1e-6)
    assert spec.rope == Rope(10000.0, "default", ())
    assert (spec.attention_bias, spec.mlp_bias, spec.tied) == (False, False, False)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))


def test_a_published_config_of_an_older_transformers_is_understood(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, **SMOLLM2)
    assert spec.rope == Rope(100000.0, "default", ())
    assert spec.tied
    assert spec.norm_eps == 1e-5


def test_pinned_head_dim_several_end_tokens_and_llama3_scaling(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, head_dim=32, num_key_value_heads=2, eos_token_id=[7, 9], rope_parameters=LLAMA3_ROPE)
    assert (spec.head_dim, spec.layers[0].kv_heads, spec.eos_token_ids) == (32, 2, (7, 9))
    assert spec.rope.kind == "llama3"
    assert dict(spec.rope.parameters)["original_max_position_embeddings"] == 8192


def test_an_unknown_field_without_a_value_is_no_obstacle(tmp_path: Path) -> None:
    assert spec_of(tmp_path, sliding_window=None, sparse_frobnication=None).hidden == 64


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, r"architectures = \['MambaForCausalLM'\]"),
        ({"architectures": None}, "architectures = None"),
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"per_layer_config": {"0": {"intermediate_size": 9}}}, "per_layer_config"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters.rope_type = 'yarn'"),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": None}}, "rope_parameters.factor = None"),
        ({"rope_parameters": {"rope_type": "default", "beta_fast": 32}}, "rope_parameters.beta_fast = 32"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor = -1"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
        ({"rope_scaling": 2.0}, "rope_scaling = 2.0"),
        ({"rope_theta": "big"}, "rope_theta = 'big'"),
        ({"hidden_size": "64"}, "hidden_size = '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"head_dim": 24}, "head_dim = 24"),
        ({"mlp_bias": 1}, "mlp_bias = 1"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"config.json: {named}") as caught:
        spec_of(tmp_path, **changes)
    assert str(tmp_path) in str(caught.value)


def test_a_size_that_is_not_given_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != "vocab_size"}))
    with pytest.raises(UnsupportedModelError, match="does not say vocab_size"):
        read_spec(tmp_path)


def test_a_missing_config_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json is missing"):
        read_spec(tmp_path)


def weights_of(folder: Path, spec: DecoderSpec, **changes: Any) -> Weights:
    """Zeros of the spec's shapes; a change is an array instead, or None to leave the tensor out."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in spec.tensor_shapes().items()} | changes
    save_file({name: array for name, array in tensors.items() if array is not None}, folder / "model.safetensors")
    return Weights(folder)


def test_exactly_the_expected_tensors_pass(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, attention_bias=True, mlp_bias=True)
    check_tensors(spec, weights_of(tmp_path, spec))
    assert "model.layers.1.mlp.down_proj.bias" in spec.tensor_shapes()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "has no tensor model.layers.1.mlp.up_proj.weight"),
        ("model.norm.weight", np.zeros(63, np.float32), r"model.norm.weight has shape \[63\], .* asks for \[64\]"),
        ("model.layers.0.self_attn.q_norm.weight", np.zeros(16, np.float32), "holds model.layers.0.self_attn.q_norm"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, name: str, array: Any, message: str) -> None:
    spec = spec_of(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        check_tensors(spec, weights_of(tmp_path, spec, **{name: array}))


def test_redundant_tensors_pass_when_they_say_nothing_new(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, tie_word_embeddings=True)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    check_tensors(spec, weights_of(tmp_path, spec, **{"lm_head.weight": np.zeros((50, 64), np.float32)}, **frequencies))
    with pytest.raises(UnsupportedModelError, match=r"holds lm_head\.weight"):
        check_tensors(spec, weights_of(tmp_path, spec, **{"lm_head.weight": np.ones((50, 64), np.float32)}))
