"""adapters.py: merged weights against the formula in torch, what becomes of the other files, and every refusal."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slmdeploy.checkpoint import Weights
from slmdeploy.errors import CorruptArtifactError, InputError, ResourceError, UnsupportedModelError
from slmdeploy.exporting.adapters import ADAPTER, CONFIG, whole_checkpoint
from slmdeploy.exporting.export import export
from slmdeploy.runtime.model import load
from tests.exporting.checkpoints import TINY, write_checkpoint

RANK, ALPHA = 4, 12
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
VOCAB, HIDDEN = TINY["vocab_size"], TINY["hidden_size"]
SIZES = {QUERY: (64, HIDDEN), DOWN: (HIDDEN, 96), HEAD: (VOCAB, HIDDEN)}


def pair(module: str) -> dict[str, torch.Tensor]:
    """Random A [rank, in] and B [out, rank] under the names that peft gives them."""
    outs, ins = SIZES[module]
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": torch.randn(RANK, ins), f"{name}.lora_B.weight": 0.1 * torch.randn(outs, RANK)}


def write_adapter(folder: Path, base: Path | str | None, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """An adapter folder as peft writes it, with the fields that its defaults have."""
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None if base is None else str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "lora_dropout": 0.05,
        "alpha_pattern": {},
        "rank_pattern": {},
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "revision": None,
    }
    (folder / CONFIG).write_text(json.dumps(config | changes))
    save_file(tensors, folder / ADAPTER)
    return folder


def merged(adapter: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint that export reads, as they are stored."""
    with whole_checkpoint(adapter, beside=adapter.parent / "out", **options) as found:
        assert set(found.origins) == {"adapter", "base"}
        tensors = load_file(found.path / "model.safetensors")
        names, weights = set(tensors), Weights(found.path)
        assert names == set(weights)
        assert all(np.array_equal(weights.read(name), tensors[name].float().numpy()) for name in names)
    assert not found.path.exists()
    return tensors


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    write_checkpoint(folder, dtype=request.param)
    return folder


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    return tmp_path / "tied"


@pytest.mark.parametrize(("field", "scale"), [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / math.sqrt(RANK))])
def test_the_merge_is_w_plus_scale_b_a(base: Path, tmp_path: Path, field: dict[str, Any], scale: float) -> None:
    tensors = pair(QUERY) | pair(DOWN)
    found = merged(write_adapter(tmp_path / "adapter", base, tensors, **field))
    before = load_file(base / "model.safetensors")
    assert found.keys() == before.keys()
    for module in (QUERY, DOWN):
        down, up = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
        expected = before[f"{module}.weight"].double() + scale * (up.double() @ down.double())
        assert found[f"{module}.weight"].dtype == torch.float32
        assert (found[f"{module}.weight"] - expected).abs().max() < 1e-6
    for name in before.keys() - {f"{QUERY}.weight", f"{DOWN}.weight"}:
        assert torch.equal(found[name], before[name])
        assert found[name].dtype == before[name].dtype


def test_weights_stored_as_in_out_get_the_change_turned(base: Path, tmp_path: Path) -> None:
    outs, ins = SIZES[DOWN]
    name = f"base_model.model.{DOWN}"
    tensors = {f"{name}.lora_A.weight": torch.randn(RANK, outs), f"{name}.lora_B.weight": torch.randn(ins, RANK)}
    found = merged(write_adapter(tmp_path / "adapter", base, tensors, fan_in_fan_out=True))
    change = (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]).T * ALPHA / RANK
    before = load_file(base / "model.safetensors")[f"{DOWN}.weight"]
    assert (found[f"{DOWN}.weight"] - before.float() - change).abs().max() < 1e-5


@pytest.mark.parametrize(("trained", "saved"), [("model.", ""), ("", "model.")], ids=["base bare", "adapter bare"])
def test_a_base_saved_with_or_without_its_prefix(tmp_path: Path, base: Path, trained: str, saved: str) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((base / "config.json").read_bytes())
    before = {
        saved + name.removeprefix("model."): tensor
        for name, tensor in load_file(base / "model.safetensors").items()
        if name.startswith("model.")
    }
    save_file(before, bare / "model.safetensors")
    tensors = {name.replace(".model.model.", f".model.{trained}"): tensor for name, tensor in pair(QUERY).items()}
    found = merged(write_adapter(tmp_path / "adapter", bare, tensors))
    changed = [name for name in before if not torch.equal(found[name].float(), before[name].float())]
    assert changed == [f"{saved}{QUERY.removeprefix('model.')}.weight"]


def test_an_embedding_is_changed_by_a_matrix_per_token(base: Path, tmp_path: Path) -> None:
    name = f"base_model.model.{EMBEDDING}"
    tensors = {f"{name}.lora_embedding_A": torch.randn(RANK, VOCAB), f"{name}.lora_embedding_B": torch.randn(64, RANK)}
    found = merged(write_adapter(tmp_path / "adapter", base, tensors))
    change = (tensors[f"{name}.lora_embedding_B"] @ tensors[f"{name}.lora_embedding_A"]).T * ALPHA / RANK
    before = load_file(base / "model.safetensors")[f"{EMBEDDING}.weight"]
    assert (found[f"{EMBEDDING}.weight"] - before.float() - change).abs().max() < 1e-5


@pytest.mark.parametrize("changed", [EMBEDDING, HEAD])
def test_a_tied_embedding_that_is_changed_is_untied(tied: Path, tmp_path: Path, changed: str) -> None:
    new = torch.randn(VOCAB, HIDDEN)
    adapter = write_adapter(tmp_path / "adapter", tied, {f"base_model.model.{changed}.weight": new})
    found = merged(adapter)
    old = load_file(tied / "model.safetensors")[f"{EMBEDDING}.weight"]
    other = HEAD if changed == EMBEDDING else EMBEDDING
    assert torch.equal(found[f"{changed}.weight"], new)
    assert torch.equal(found[f"{other}.weight"], old)
    with whole_checkpoint(adapter, beside=tmp_path / "out") as source:
        assert json.loads((source.path / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_vocabulary_that_grew_is_in_the_config(base: Path, tmp_path: Path) -> None:
    grown = {f"base_model.model.{name}.weight": torch.randn(VOCAB + 3, HIDDEN) for name in (EMBEDDING, HEAD)}
    with whole_checkpoint(write_adapter(tmp_path / "adapter", base, grown), beside=tmp_path / "out") as source:
        assert json.loads((source.path / "config.json").read_text())["vocab_size"] == VOCAB + 3
        assert Weights(source.path).shape(f"{HEAD}.weight") == (VOCAB + 3, HIDDEN)


def test_the_tokenizer_of_the_adapter_goes_before_the_base(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, pair(QUERY))
    (adapter / "chat_template.jinja").write_text("adapter")
    with whole_checkpoint(adapter, beside=tmp_path / "out") as source:
        assert (source.path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert not (source.path / "chat_template.jinja").exists()  # it belongs to a tokenizer that is not there
    (adapter / "tokenizer.json").write_text("{}")
    with whole_checkpoint(adapter, beside=tmp_path / "out") as source:
        assert (source.path / "tokenizer.json").read_text() == "{}"
        assert (source.path / "chat_template.jinja").read_text() == "adapter"


def test_export_of_an_adapter_equals_export_of_the_merged_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", "somewhere/else", pair(QUERY) | pair(HEAD))
    artifact = export(adapter, base=tmp_path / "base", out=tmp_path / "graph")
    assert artifact.inputs.keys() == {"adapter", "base"}
    export(tmp_path / "base", out=tmp_path / "unchanged")
    with whole_checkpoint(adapter, base=tmp_path / "base", beside=tmp_path / "x") as source:
        export(source.path, out=tmp_path / "whole")
    ids = [3, 1, 4, 1, 5]
    logits, whole, unchanged = (load(tmp_path / name).logits(ids) for name in ("graph", "whole", "unchanged"))
    assert np.array_equal(logits, whole)
    assert np.abs(logits - unchanged).max() > 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "graph", "unchanged", "whole"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora = True is not plain LoRA; merge the adapter with peft's merge_and_unload"),
        ({"bias": "all"}, "bias = 'all' is not plain LoRA"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        ({"field_of_tomorrow": 1}, "field_of_tomorrow = 1 is not plain LoRA"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_field(
    base: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, pair(QUERY), **changes)
    with pytest.raises(UnsupportedModelError, match=said), whole_checkpoint(adapter, beside=tmp_path / "out"):
        pass


def test_a_dora_magnitude_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    tensors = pair(QUERY) | {f"base_model.model.{QUERY}.lora_magnitude_vector": torch.ones(64)}
    adapter = write_adapter(tmp_path / "adapter", base, tensors)
    with pytest.raises(UnsupportedModelError, match="lora_magnitude_vector, which is not plain LoRA"):
        export(adapter, out=tmp_path / "graph")


def test_a_base_that_cannot_be_used(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nameless = write_adapter(tmp_path / "nameless", None, pair(QUERY))
    with pytest.raises(InputError, match=r"names no base; give it with --base"):
        export(nameless, out=tmp_path / "graph")
    remote = write_adapter(tmp_path / "remote", "some/base", pair(QUERY), revision="v2")
    with pytest.raises(ResourceError, match=r"base cannot be used \(some/base at revision v2 is not .* --base"):
        export(remote, out=tmp_path / "graph")
    with pytest.raises(InputError, match="is an adapter itself"):
        export(remote, out=tmp_path / "graph", base=nameless)
    with pytest.raises(InputError, match=r"is no adapter .* leave the base out"):
        export(base, out=tmp_path / "graph", base=base)
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    with pytest.raises(InputError, match=r"bitsandbytes.*give another with --base"):
        export(remote, out=tmp_path / "graph", base=quantised)


def test_an_adapter_of_another_base(base: Path, tmp_path: Path) -> None:
    lost = {name.replace("layers.0", "layers.7"): tensor for name, tensor in pair(QUERY).items()}
    with pytest.raises(InputError, match=r"changes model\.layers\.7\.\S+, which .* does not have; give the base"):
        export(write_adapter(tmp_path / "lost", base, lost), out=tmp_path / "graph")
    name = f"base_model.model.{QUERY}"
    wide = {f"{name}.lora_A.weight": torch.randn(RANK, 65), f"{name}.lora_B.weight": torch.randn(64, RANK)}
    with pytest.raises(InputError, match=r"as \[64, 65\], but .* has it as \[64, 64\]; give the base"):
        export(write_adapter(tmp_path / "wide", base, wide), out=tmp_path / "graph")


def test_damaged_adapters(base: Path, tmp_path: Path) -> None:
    half = {name: tensor for name, tensor in pair(QUERY).items() if "lora_A" in name}
    with pytest.raises(CorruptArtifactError, match="without its other half"):
        export(write_adapter(tmp_path / "half", base, half), out=tmp_path / "graph")
    with pytest.raises(CorruptArtifactError, match="not of rank r = 5"):
        export(write_adapter(tmp_path / "rank", base, pair(QUERY), r=5), out=tmp_path / "graph")
    with pytest.raises(CorruptArtifactError, match="have to be numbers, r above 0"):
        export(write_adapter(tmp_path / "zero", base, pair(QUERY), r=0), out=tmp_path / "graph")
    nan = {name: torch.full_like(tensor, float("nan")) for name, tensor in pair(QUERY).items()}
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: .*lora_A.* NaN or infinite"):
        export(write_adapter(tmp_path / "nan", base, nan), out=tmp_path / "graph")
    pickled = write_adapter(tmp_path / "pickled", base, pair(QUERY))
    (pickled / ADAPTER).rename(pickled / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter pickled, which can run code .* save it with python -c"):
        export(pickled, out=tmp_path / "graph")
    (pickled / "model.safetensors").touch()
    with pytest.raises(InputError, match=r"holds both model\.safetensors and adapter_config\.json"):
        export(pickled, out=tmp_path / "graph")
