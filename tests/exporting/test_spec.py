"""spec.py: what is read, what is refused by name, and which tensors must be there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from slmdeploy.checkpoint import Weights
from slmdeploy.errors import InputError, UnsupportedModelError
from slmdeploy.exporting.reading import read_spec
from slmdeploy.exporting.spec import DecoderSpec, LayerSpec, Rope, check_tensors, located

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
    assert (spec.head_dim, spec.max_length, spec.norm.eps) == (16, 2048, 1e-6)
    assert spec.ropes == (Rope(10000.0, "default", 16),)
    assert (spec.qkv_bias, spec.output_bias, spec.mlp_bias, spec.tied) == (False,) * 4
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))


def test_a_published_config_of_an_older_transformers_is_understood(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, **SMOLLM2)
    assert spec.ropes == (Rope(100000.0, "default", 16),)
    assert spec.tied
    assert spec.norm.eps == 1e-5


def test_pinned_head_dim_several_end_tokens_and_llama3_scaling(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, head_dim=32, num_key_value_heads=2, eos_token_id=[7, 9], rope_parameters=LLAMA3_ROPE)
    assert (spec.head_dim, spec.layers[0].kv_heads, spec.eos_token_ids) == (32, 2, (7, 9))
    assert (spec.ropes[0].kind, spec.ropes[0].original) == ("llama3", 8192)
    assert dict(spec.ropes[0].parameters)["factor"] == 8.0


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
        ({"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"rope_parameters": {"rope_type": "axial", "factor": 2.0}}, "rope_parameters.rope_type = 'axial'"),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": None}}, "rope_parameters.factor = None"),
        ({"rope_parameters": {"rope_type": "default", "beta_fast": 32}}, "rope_parameters.beta_fast = 32"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor = -1"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
        ({"rope_scaling": 2.0}, "rope_scaling = 2.0"),
        ({"rope_theta": "big"}, "rope_theta = 'big'"),
        ({"hidden_size": "64"}, "hidden_size = '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"head_dim": 0}, "head_dim = 0"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_shapes": [{"num_attention_heads": 4}]}, "layer_shapes"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}}, "rope_parameters.partial_rotary"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "rope_parameters.long",
        ),
        ({"mlp_bias": 1}, "mlp_bias = 1"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"config.json: {named}") as caught:
        spec_of(tmp_path, **changes)
    assert str(tmp_path) in str(caught.value)


PUBLISHED: dict[str, dict[str, Any]] = {  # what published checkpoints say besides sizes, as their config.json has it
    "distilgpt2": {
        **{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4},
        **{"_num_labels": 1, "activation_function": "gelu_new", "attn_pdrop": 0.1, "n_ctx": 1024, "n_positions": 1024},
        **{
            "id2label": {"0": "LABEL_0"},
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {},
        },
    },
    "pythia-70m": {
        **{"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu", "rotary_pct": 0.25},
        **{
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "layer_norm_eps": 1e-05,
            "tie_word_embeddings": False,
        },
    },
    "Phi-3-mini-4k": {
        **{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0},
        **{"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "original_max_position_embeddings": 4096},
        **{"max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047, "rope_theta": 10000.0},
    },
    "gemma-2-2b": {
        **{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "cache_implementation": "hybrid"},
        **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256},
    },
    "Qwen2.5-0.5B": {
        **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_window_layers": 24, "use_mrope": False},
        **{"use_sliding_window": False, "sliding_window": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": True},
    },
    "starcoder2-3b": {
        **{"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "mlp_type": "default"},
        **{"norm_type": "layer_norm", "norm_epsilon": 1e-05, "use_bias": True, "hidden_act": "gelu_pytorch_tanh"},
        **{"residual_dropout": 0.1, "embedding_dropout": 0.1, "sliding_window": 4096, "rope_theta": 999999.4420358813},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_published_checkpoints_say_is_understood(tmp_path: Path, name: str) -> None:
    sizes = {key: value for key, value in LLAMA.items() if "gpt" not in name or not key.startswith("num")}
    (tmp_path / "config.json").write_text(json.dumps(sizes | PUBLISHED[name]))
    assert read_spec(tmp_path).hidden == 64


GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 3, "head_dim": 16}


def test_gemma3_as_its_first_checkpoints_describe_it(tmp_path: Path) -> None:
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    spec = spec_of(tmp_path, **GEMMA3, **old, sliding_window=512, sliding_window_pattern=3)
    assert [(layer.window, layer.rope) for layer in spec.layers] == [(512, 1), (512, 1), (None, 0)]
    assert [(rope.theta, rope.kind) for rope in spec.ropes] == [(1e6, "linear"), (1e4, "default")]
    assert (spec.embedding_multiplier, spec.norm.offset, spec.attention_scale) == (8.0, 1.0, 1 / 16)


def test_windows_start_where_qwen2_says(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 9, "max_window_layers": 1}
    assert [layer.window for layer in spec_of(tmp_path, **qwen).layers] == [None, None]
    assert [layer.window for layer in spec_of(tmp_path, **qwen, use_sliding_window=True).layers] == [None, 9]


def test_layers_of_a_pruned_model_have_their_own_shapes(tmp_path: Path) -> None:
    keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    shapes = [dict(zip(keys, sizes, strict=True)) for sizes in ((4, 2, 33), (2, 1, 20))]
    spec = spec_of(tmp_path, layer_shapes=shapes)
    assert spec.layers == (LayerSpec(4, 2, 33), LayerSpec(2, 1, 20))
    assert spec.tensor_shapes()["model.layers.1.self_attn.q_proj.weight"] == (32, 64)


@pytest.mark.parametrize(("asked", "reach"), [(2049, 2048), (0, 2048)])
def test_a_context_that_the_model_was_not_made_for_is_refused(tmp_path: Path, asked: int, reach: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(InputError, match=rf"max_length = {asked}: .* allows 1 to {reach} tokens"):
        read_spec(tmp_path, asked)
    assert read_spec(tmp_path, 99).max_length == 99


def test_scaling_allows_a_longer_context(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}))
    spec = read_spec(tmp_path, 4096)
    assert (spec.max_length, spec.scaled_context) == (4096, True)
    assert not read_spec(tmp_path).scaled_context


def test_a_checkpoint_without_the_models_prefix_is_found(tmp_path: Path) -> None:
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50, "n_embd": 64, "n_layer": 1}
    (tmp_path / "config.json").write_text(json.dumps(gpt2 | {"n_head": 4, "n_positions": 32}))
    spec = read_spec(tmp_path)
    shapes = spec.tensor_shapes()
    tensors = {name.removeprefix("transformer."): np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tensors["h.0.attn.bias"] = np.zeros((1, 1, 32, 32), np.float32)  # the causal mask, which old versions saved
    save_file(tensors, tmp_path / "model.safetensors")
    found = located(spec, Weights(tmp_path))
    assert found.names.layers == "h"
    check_tensors(found, Weights(tmp_path))


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
