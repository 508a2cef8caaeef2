"""Every decoder family can be pruned: transformers loads the result, and it computes what the masked original does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slmdeploy.compress.families import FAMILIES, family_of, shape_of
from slmdeploy.compress.frame import Frame
from slmdeploy.compress.loading import load_model
from slmdeploy.compress.prune import prune
from slmdeploy.compress.surgery import LAYER_SIZES, OverKept, config_shape
from slmdeploy.errors import InputError
from slmdeploy.exporting.export import export
from slmdeploy.exporting.families import FAMILIES as EXPORTED
from slmdeploy.runtime.model import load as load_graph
from tests.exporting.families import CASES, Case, write_case

IDS = torch.arange(2, 62)[None]
EVERY = sorted(CASES)
ONE_EACH = list({case.config: name for name, case in sorted(CASES.items(), reverse=True)}.values())
ROWS = {name: family_of(Path(name), CASES[name].make_config().to_dict()) for name in EVERY}
CHANNELS = [name for name in (*ONE_EACH, "llama-mqa-head-dim") if "hidden" not in ROWS[name].bound]
# Several query heads to a KV head: norms of heads, soft caps, biases, and projections fused into one.
QUERIES = {name: CASES[name] for name in ("qwen3", "gemma2", "starcoder2")}
QUERIES["phi3-gqa"] = Case("Phi-3, Phi-4-mini", "Phi3Config", {"sliding_window": 24})
UNEVEN = ["llama-gqa", "qwen3", "gemma3-softcap", "starcoder2", "stablelm", "olmo2"]


@torch.no_grad()
def logits_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits of a model on rows of tokens."""
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


@pytest.fixture(scope="module")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            write_case(CASES[name], made[name])
        return made[name]

    return make


def load(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    attention = "sdpa" if config.get("attn_logit_softcapping") is None else "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return model.eval()


def group_shares(folder: Path) -> dict[str, float]:
    """Half of the neurons, and half of the heads where the family has words for fewer."""
    config = json.loads((folder / "config.json").read_text())
    one = "kv_heads" in family_of(folder, config).bound or shape_of(config).kv_heads == 1
    return {"ratio": 0.5, "attention_ratio": 0.0 if one else 0.5}


@torch.no_grad()
def mask_groups(model: Any, layers: list[dict[str, Any]]) -> Any:
    """Zero what reads the removed groups, and nothing else."""
    frame, shape = Frame(model), config_shape(model.config)
    for index, told in enumerate(layers):
        sides = (
            (frame.family.attention_out, told["kv_heads"], shape.kv_heads, shape.group_width),
            (frame.family.mlp_out, told["neurons"], shape.neurons, 1),
        )
        for module, kept, count, width in sides:
            alive = torch.zeros(count).index_fill(0, torch.tensor(kept), 1).repeat_interleave(width)
            frame.set_weight(index, module, (frame.weight(index, module) * alive[:, None]).float())
    return model


def assert_equal_logits(first: Any, second: Any) -> None:
    expected, found = logits_of(first, IDS), logits_of(second, IDS)
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max().clamp_min(1)), rtol=0)


@pytest.mark.parametrize("name", EVERY)
def test_the_cut_model_computes_what_the_masked_original_does(
    tmp_path: Path, family_checkpoint: Callable[[str], Path], data: Path, name: str
) -> None:
    folder = family_checkpoint(name)
    shares = group_shares(folder)
    artifact = prune(
        folder, out=tmp_path / "out", data=data, method="minitron", tile=8, calibration_tokens=512, **shares
    )
    dense, loaded = load(folder), load(artifact.path)
    before, after = config_shape(dense.config), config_shape(loaded.config)
    assert after.neurons == {37: 16, 256: 128}[before.neurons]
    assert after.kv_heads == (before.kv_heads // 2 if shares["attention_ratio"] else before.kv_heads)
    assert (after.head_dim, after.queries_per_kv) == (before.head_dim, before.queries_per_kv)
    dense_logits = logits_of(dense, IDS)
    assert_equal_logits(mask_groups(dense, artifact.result["layers"]), loaded)
    assert (logits_of(loaded, IDS) - dense_logits).abs().max() > 1e-3  # something went


@pytest.mark.parametrize("name", QUERIES)
def test_single_query_heads_go(tmp_path: Path, data: Path, name: str) -> None:
    folder = tmp_path / "dense"
    write_case(QUERIES[name], folder)
    shares = {"ratio": 0.0, "attention_ratio": 0.0, "query_ratio": 0.5}
    artifact = prune(folder, out=tmp_path / "out", data=data, method="minitron", calibration_tokens=512, **shares)
    dense, loaded = load(folder), load(artifact.path)
    shape, frame = config_shape(dense.config), Frame(dense)
    assert config_shape(loaded.config).queries_per_kv == shape.queries_per_kv // 2
    for index, told in enumerate(artifact.result["queries"]):
        heads = torch.zeros(shape.kv_heads * shape.queries_per_kv).index_fill(0, torch.tensor(told["kept"]), 1)
        alive, module = heads.repeat_interleave(shape.head_dim), frame.family.attention_out
        frame.set_weight(index, module, (frame.weight(index, module) * alive[:, None]).float())
    assert_equal_logits(dense, loaded)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_layer_goes_and_osscar_fits_the_rest(
    tmp_path: Path, family_checkpoint: Callable[[str], Path], data: Path, name: str
) -> None:
    folder = family_checkpoint(name)
    artifact = prune(
        folder, out=tmp_path / "out", data=data, layer_ratio=0.3, tile=8, calibration_tokens=512, **group_shares(folder)
    )
    loaded = load(artifact.path)
    layers = config_shape(load(folder).config).layers - 1
    assert config_shape(loaded.config).layers == len(Frame(loaded).layers) == layers
    assert len(artifact.result["layers"]) == layers
    assert all(0 < layer["mlp_error"] < 1 for layer in artifact.result["layers"])
    # The cache is indexed by the new places.
    cached, plain = (loaded.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", CHANNELS)
def test_the_hidden_width_goes_with_norms_embeddings_and_head(
    tmp_path: Path, family_checkpoint: Callable[[str], Path], data: Path, name: str
) -> None:
    folder = family_checkpoint(name)
    artifact = prune(folder, out=tmp_path / "out", data=data, ratio=0.0, hidden_ratio=0.25, calibration_tokens=512)
    kept = artifact.result["kept_channels"]
    masked, loaded = load(folder), load(artifact.path)
    assert len(kept) == loaded.config.hidden_size == 48
    assert config_shape(loaded.config).head_dim == config_shape(masked.config).head_dim
    frame, index = Frame(masked), torch.tensor(kept)
    # The original with the removed channels silent where the stream begins, and norms that see the others alone.
    gone = [channel for channel in range(64) if channel not in kept]
    with torch.no_grad():
        getattr(frame.base, frame.family.embeddings[0]).weight[:, gone] = 0
    for layer in frame.layers:
        for norm in frame.family.norms:
            layer.set_submodule(norm, OverKept(layer.get_submodule(norm), index))
    setattr(frame.base, frame.family.final_norm, OverKept(getattr(frame.base, frame.family.final_norm), index))
    assert_equal_logits(masked, loaded)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "stablelm", "olmo2", "phi3-longrope"])
def test_what_a_family_has_no_words_for_is_refused(
    tmp_path: Path, family_checkpoint: Callable[[str], Path], data: Path, name: str
) -> None:
    folder = family_checkpoint(name)
    with pytest.raises(InputError, match=r"its heads cannot be pruned, since .*: set attention_ratio to 0"):
        prune(folder, out=tmp_path / "out", data=data, ratio=0.5, tile=8)
    if name != "olmo2":
        with pytest.raises(InputError, match=r"hidden width cannot be pruned, since .*: leave hidden_ratio at 0"):
            prune(folder, out=tmp_path / "out", data=data, ratio=0.0, hidden_ratio=0.5)


def test_both_tables_name_the_same_families_and_tensors() -> None:
    assert {row.model_type for row in EXPORTED.values()} == set(FAMILIES)
    for row in EXPORTED.values():
        family, names = FAMILIES[row.model_type], row.names
        assert (family.attention_out, family.mlp_out) == (names.attention_out, names.mlp_out)
        assert f"{family.base}.{family.stack}" == names.layers
        assert (f"{family.base}.{family.final_norm}", family.head) == (names.final_norm, names.head)
        assert f"{family.base}.{family.embeddings[0]}" == names.embedding
        assert set(family.norms) >= set(names.norms)
        assert set(names.mlp_in) <= set(family.linear)
        assert "kv_heads" in family.bound or set(names.qkv) <= set(family.linear)
        assert family.transposed == names.transposed


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_layers_are_exported_and_load_for_distillation(
    tmp_path: Path, family_checkpoint: Callable[[str], Path], data: Path, name: str
) -> None:
    folder = family_checkpoint(name)
    artifact = prune(
        folder,
        out=tmp_path / "out",
        data=data,
        method="minitron",
        allocation="global",
        tile=1,
        calibration_tokens=512,
        **group_shares(folder),
    )
    shapes = json.loads((artifact.path / "config.json").read_text())["layer_shapes"]
    told = artifact.result["layers"]
    assert [one["intermediate_size"] for one in shapes] == [len(layer["neurons"]) for layer in told]
    assert [one["num_key_value_heads"] for one in shapes] == [len(layer["kv_heads"]) for layer in told]
    assert len({tuple(one.values()) for one in shapes}) > 1
    masked = mask_groups(load(folder), told)
    loaded = load_model(artifact.path, torch.float32).eval()
    assert_equal_logits(masked, loaded)
    loaded.save_pretrained(tmp_path / "trained")  # as distillation does
    assert_equal_logits(loaded, load_model(tmp_path / "trained", torch.float32).eval())
    export(artifact.path, out=tmp_path / "graph")  # refuses where torch and the graph differ
    assert np.allclose(load_graph(tmp_path / "graph").logits(IDS[0].tolist()), logits_of(masked, IDS)[0], atol=2e-3)
    with pytest.raises(InputError, match="has been pruned unevenly before"):
        prune(artifact.path, out=tmp_path / "again", data=data, ratio=0.5)


def test_uneven_layers_need_a_family_with_projections_apart(
    tmp_path: Path, family_checkpoint: Callable[[str], Path], data: Path
) -> None:
    with pytest.raises(InputError, match=r"its layers keep one size, .*: use allocation uniform"):
        prune(family_checkpoint("phi3"), out=tmp_path / "out", data=data, ratio=0.5, tile=8, allocation="global")


@pytest.mark.parametrize(
    "shapes", [3, [], [{"intermediate_size": 4}] * 3, [dict.fromkeys(LAYER_SIZES, 0)] * 3], ids=str
)
def test_damaged_layer_shapes_are_refused(
    tmp_path: Path, family_checkpoint: Callable[[str], Path], shapes: Any
) -> None:
    broken = shutil.copytree(family_checkpoint("qwen3"), tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"layer_shapes": shapes}))
    with pytest.raises(InputError, match="layer_shapes is not what prune writes"):
        load_model(broken, torch.float32)
