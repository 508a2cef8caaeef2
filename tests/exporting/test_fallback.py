"""The fallback: what transformers can export deploys and says so, and what it cannot is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slmdeploy.artifacts import Artifact
from slmdeploy.building import build as building
from slmdeploy.building.build import build
from slmdeploy.building.onnxruntime import open_folder, read_model, write_folder
from slmdeploy.building.quantize import EMBEDDING, HEAD, parts, plan_for, quantize
from slmdeploy.errors import InputError, SlmdeployError, UnsupportedModelError
from slmdeploy.exporting import eager, stand_in
from slmdeploy.exporting.causal import CausalModel
from slmdeploy.exporting.export import export
from slmdeploy.exporting.stand_in import stand_in_config
from slmdeploy.packaging.package import package
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import load
from slmdeploy.specs import load_profile
from tests.exporting.conftest import Record
from tests.graphs import tiny_tokenizer

ENDS: dict[str, Any] = {"vocab_size": 272, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 96},
}
MHA, GPT = {"num_key_value_heads": 4}, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}

MATRIX: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-J": ("gptj", {**GPT, "rotary_dim": 8}),
    "OPT": ("opt", {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 48}),
    "BLOOM (ALiBi)": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": 96}),
    "Phi-1/2": ("phi", {**SIZES, "partial_rotary_factor": 0.5}),
    "Cohere Command-R": ("cohere", {**SIZES, "use_qk_norm": True}),
    "Cohere2 (sliding window)": ("cohere2", {**SIZES, "num_hidden_layers": 4, "sliding_window": 16}),
    "Falcon (multi-query)": ("falcon", FALCON),
    "Falcon (new architecture)": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "GLM": ("glm", {**SIZES, "head_dim": 16}),
    "GLM-4": ("glm4", {**SIZES, "head_dim": 16}),
    "OLMo 1 (clipped)": ("olmo", {**SIZES, "clip_qkv": 0.5}),
    "MPT (ALiBi)": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 96}),
    "Mixtral": ("mixtral", {**SIZES, **LOCAL_EXPERTS}),
    "Qwen2-MoE": ("qwen2_moe", {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "Qwen3-MoE": ("qwen3_moe", {**SIZES, **EXPERTS, "head_dim": 16}),
    "NanoChat": ("nanochat", SIZES),
    "Helium": ("helium", {**SIZES, "head_dim": 16}),
    "CodeGen": ("codegen", {**GPT, "rotary_dim": 8, "n_ctx": 96}),
    "GPT-Neo (local attention)": (
        "gpt_neo",
        {**SIZES, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    ),
    "GPT-BigCode (multi-query)": ("gpt_bigcode", GPT),
    "Granite-MoE": ("granitemoe", {**SIZES, **LOCAL_EXPERTS}),
    "EXAONE 4": ("exaone4", {**SIZES, "head_dim": 16, "sliding_window": 16}),
    "Apertus": ("apertus", SIZES),
    "Arcee": ("arcee", {**SIZES, "head_dim": 16}),
    "Nemotron": ("nemotron", SIZES),
    "Gemma 1": ("gemma", {**SIZES, "head_dim": 16}),
    "OLMoE": ("olmoe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss (sinks)": ("gpt_oss", {**SIZES, **LOCAL_EXPERTS, "head_dim": 16, "sliding_window": 16}),
    "ERNIE 4.5": ("ernie4_5", {**SIZES, "head_dim": 16}),
    "Seed-OSS": ("seed_oss", {**SIZES, "head_dim": 16}),
    "Hunyuan dense": ("hunyuan_v1_dense", {**SIZES, "head_dim": 16}),
    "DiffLlama": ("diffllama", {**SIZES, "head_dim": 16}),
    "BitNet": ("bitnet", SIZES),
    "XGLM": ("xglm", {**SIZES, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
    "BioGPT": ("biogpt", {**SIZES, **MHA}),
    "Phi-3.5-MoE": ("phimoe", {**SIZES, **LOCAL_EXPERTS}),
    "Persimmon": ("persimmon", {**SIZES, **MHA}),
    "VaultGemma (soft caps)": ("vaultgemma", {**SIZES, "head_dim": 16, "attn_logit_softcapping": 5.0}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mamba (no attention)": ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, "keeps something"),
    "RWKV (no attention)": ("rwkv", {"hidden_size": 64, "num_hidden_layers": 2}, "keeps something else than keys"),
    "Falcon (ALiBi, bfloat16)": ("falcon", {**FALCON, "alibi": True, "multi_query": False}, "does not run"),
    "DeepSeek-V3 (latent attention)": (
        "deepseek_v3",
        {
            **{**SIZES, **MHA, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
            **{"v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
            **{"moe_intermediate_size": 32, "first_k_dense_replace": 1},
        },
        "keys and values of one size",
    ),
}


def write_checkpoint(folder: Path, model_type: str, changes: dict[str, Any]) -> Path:
    """Save a random model of a family with its tokenizer; norms and biases are random too: a swapped one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **ENDS | changes)).float()
    for name, parameter in model.named_parameters():
        flat = parameter.dim() == 1
        torch.nn.init.normal_(parameter, mean=float("norm" in name and flat), std=0.3 if flat else 0.15)
    model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT: learned positions, biases, an embedding of another width than the layers, and a tied head."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "opt", *MATRIX["OPT"])


@pytest.fixture(scope="module")
def graph(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(checkpoint, out=tmp_path_factory.mktemp("graphs") / "graph", fallback=True)


def test_a_fallback_export_says_what_it_is_and_what_it_costs(graph: Artifact) -> None:
    result = graph.result
    assert (result["path"], graph.plan) == ("fallback", {"tasks": ["generate"], "fallback": True})
    assert result["exporter"].startswith("transformers.exporters 5.")
    assert len(result["parity"]) == 6
    assert all(rung["passed"] and rung["max_abs_difference"] < 1e-4 for rung in result["parity"])
    cost = result["cost"]
    assert all(cost[name] > 0 for name in ("prefill_ratio", "decode_ratio"))
    assert cost["stand_in"]["num_hidden_layers"] == 2


def test_its_graph_is_sound_and_of_standard_operators_of_the_standard_interface(graph: Artifact) -> None:
    onnx.checker.check_model(graph.path / "model.onnx", full_check=True)
    model = onnx.load(graph.path / "model.onnx", load_external_data=False)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 21)]
    assert read_runtime(graph.path).interface == "standard"
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "total"]
    assert shapes["past_key_values.1.value"] == ["batch", 4, "past", 16]


def test_it_generates_what_torch_does(checkpoint: Path, graph: Artifact) -> None:
    tokens = list(load(graph.path).generate_ids([0, 7, 31, 8], max_new_tokens=24, ignore_eos=True))
    assert tokens == list(CausalModel(checkpoint).generate_ids([0, 7, 31, 8], max_new_tokens=24, ignore_eos=True))


def test_every_linear_layer_is_named_after_its_module_and_can_be_quantised(graph: Artifact, tmp_path: Path) -> None:
    model, expected = read_model(graph.path), load(graph.path).logits([0, 7, 31, 8])
    names = list(parts(model))
    layers = [f"model.decoder.layers.{i}." for i in range(2)]
    linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
    projections = {"model.decoder.project_in", "model.decoder.project_out"}
    assert set(names) == {EMBEDDING, HEAD, *projections, *(layer + name for layer in layers for name in linear)}
    profile = load_profile("cpu-int8")
    quantize(model, plan_for(profile, model))
    write_folder(model, graph.path, tmp_path, precision="w8a8", session=profile.session)
    found = open_folder(tmp_path).logits([0, 7, 31, 8])
    assert 0 < abs(found - expected).max() < 0.1 * abs(expected).max()


def test_the_torch_side_scores_through_the_whole_head(checkpoint: Path) -> None:
    model = CausalModel(checkpoint)
    rows = [model.logits([0, 7, 31, *item])[-1] for item in ([5], [9, 8, 7])]
    labels = [tiny_tokenizer().token_to_id(word) for word in ("Ġno", "Ġyes")]
    assert abs(model.score_ids([0, 7, 31], [[5], [9, 8, 7]]) - [row[labels] for row in rows]).max() < 1e-5


def test_the_baseline_of_a_measurement_is_torch_in_every_family(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []
    monkeypatch.setattr(eager, "serve", lambda session, hello: served.append(session))
    eager.main([str(checkpoint), "--threads", "1"])
    assert isinstance(served[0], CausalModel)


def test_the_fast_path_names_the_fallback_where_it_refuses(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'OPTForCausalLM'.*; --fallback exports any decoder"):
        export(checkpoint, out=tmp_path / "graph")


def test_what_the_fallback_has_not_got_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the fallback cannot score"):
        export(checkpoint, out=tmp_path / "graph", tasks=("generate", "score"), fallback=True)
    with pytest.raises(InputError, match="leave dialect and opset out"):
        export(checkpoint, out=tmp_path / "graph", dialect="portable", fallback=True)
    with pytest.raises(InputError, match="made for 96 tokens"):
        export(checkpoint, out=tmp_path / "graph", max_length=97, fallback=True)


def changed(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other values in its config.json; None takes a field out."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    return folder


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 3}, r"has no tensor model\.decoder\.layers\.2\."),
        ({"auto_map": {"AutoModelForCausalLM": "own.Model"}}, "auto_map names code of its own"),
        ({"model_type": "unheard"}, "transformers cannot open it"),
    ],
)
def test_a_checkpoint_that_transformers_cannot_open_exactly_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        export(changed(checkpoint, tmp_path / "changed", **changes), out=tmp_path / "graph", fallback=True)


def test_weights_that_are_not_finite_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.model.decoder.layers[1].fc1.bias.data[3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match=r"model\.decoder\.layers\.1\.fc1\.bias has values that are NaN"):
        export(tmp_path / "broken", out=tmp_path / "graph", fallback=True)


def test_a_context_that_no_field_names_has_to_be_said(tmp_path: Path) -> None:
    model_type, sizes = MATRIX["BLOOM (ALiBi)"]
    endless = write_checkpoint(tmp_path / "bloom", model_type, {k: v for k, v in sizes.items() if k != "seq_length"})
    with pytest.raises(UnsupportedModelError, match="names no length of context; give --max-length"):
        export(endless, out=tmp_path / "graph", fallback=True)
    assert CausalModel(endless, max_length=40).max_length == 40


def test_a_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    model_type, sizes, problem = REFUSED["Mamba (no attention)"]
    write_checkpoint(tmp_path / "mamba", model_type, sizes)
    with pytest.raises(UnsupportedModelError, match=problem):
        export(tmp_path / "mamba", out=tmp_path / "graph", fallback=True)


def test_the_stand_in_has_the_sizes_and_nearly_the_parameters(graph: Artifact) -> None:
    config = read_runtime(graph.path)
    asked = stand_in_config(config, hidden=64, heads=4, parameters=200_000)
    layer = 2 * 64 * 16 * (4 + 4) + 3 * 64 * asked["intermediate_size"]
    assert 200_000 - 2 * 3 * 64 <= 2 * 272 * 64 + 2 * layer <= 200_000
    assert stand_in_config(config, hidden=64, heads=7, parameters=1)["intermediate_size"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int8", "cpu-int4"])
def test_a_fallback_is_built_and_packaged_like_any_graph(
    graph: Artifact, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {"prefill_ratio": 0.5, "decode_ratio": 0.5, "score_ratio": None}
    passed = {"passed": True, "value": 0.5, "limit": 1.0}
    # a toy is slower quantised: the speed gate has tests of its own
    monkeypatch.setattr(building, "speed_gate", lambda own, found: (speed, passed))
    artifact = build(graph.path, profile=load_profile(name), out=tmp_path / "build")
    assert artifact.result["quality"]["kl"] < 0.5
    shipped = package(tmp_path / "build", out=tmp_path / "package")
    assert load(shipped.path).generate("Hello", max_new_tokens=4).prompt_tokens > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", MATRIX)
def test_a_family_deploys_by_the_fallback(
    family: str, tmp_path: Path, record_check: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "measured_cost", lambda graph, **sizes: {})
    write_checkpoint(tmp_path / "checkpoint", *MATRIX[family])
    try:
        rungs = export(tmp_path / "checkpoint", out=tmp_path / "graph", fallback=True).result["parity"]
    except SlmdeployError as error:
        record_check(family, "fallback", None, False, str(error))
        raise
    worst = max(rung["difference"] for rung in rungs)
    record_check(family, "fallback", worst, worst <= 1e-4)
    assert worst <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_is_refused_in_one_sentence(family: str, tmp_path: Path, record_check: Record) -> None:
    model_type, sizes, problem = REFUSED[family]
    write_checkpoint(tmp_path / "checkpoint", model_type, sizes)
    with pytest.raises(UnsupportedModelError, match=problem) as refusal:
        export(tmp_path / "checkpoint", out=tmp_path / "graph", fallback=True)
    record_check(family, "fallback", None, False, f"refused: {str(refusal.value).replace(str(tmp_path), '')}")
    assert "\n" not in str(refusal.value)
