"""Whole layers: which of them go, that the rest computes what the dense model does without them, what is refused."""

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from slmdeploy.artifacts import Artifact, open_artifact
from slmdeploy.cli import app
from slmdeploy.compress import loading, pruning
from slmdeploy.compress.depth import Removal, block_influence, remove_layers
from slmdeploy.compress.frame import Bypass, Rows
from slmdeploy.compress.prune import kept_counts, prune
from slmdeploy.compress.surgery import shorten
from slmdeploy.errors import GateError, InputError
from slmdeploy.specs import PrunePlan
from tests.compress.conftest import max_difference

IDS = torch.arange(2, 42)[None]
QUIET = 2


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def scale(model: Any, layer: int, factor: float) -> None:
    """Make what a layer adds to the residual stream ``factor`` as large; with 0 the layer is the identity."""
    for linear in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
        for parameter in linear.parameters():
            parameter *= factor


def without(dense: Any, layers: list[int]) -> Any:
    """The dense model with layers replaced by the identity, by a way that shares nothing with depth.py."""
    dense = copy.deepcopy(dense)
    for layer in layers:
        scale(dense, layer, 0.0)
    return dense


def unpadded(rows: int = 3, length: int = 40) -> Rows:
    ids = torch.randint(2, 300, (rows, length), generator=torch.Generator().manual_seed(5))
    return Rows(ids, torch.arange(length).expand(rows, length), torch.ones(rows, length, dtype=torch.bool))


def padded(rows: Rows, room: int) -> Rows:
    """The same rows as data.py pads them: token 0, positions that start again."""
    count = len(rows.input_ids)
    return Rows(
        torch.cat([rows.input_ids, torch.zeros(count, room, dtype=torch.int64)], 1),
        torch.cat([rows.position_ids, torch.arange(room).expand(count, room)], 1),
        torch.cat([rows.valid, torch.zeros(count, room, dtype=torch.bool)], 1),
    )


@pytest.fixture(scope="module")
def deep(checkpoint: Callable[..., Path]) -> Path:
    """Four layers, of which layer 2 does next to nothing; tests only read it."""
    folder = checkpoint(num_hidden_layers=4)
    model = load(folder)
    scale(model, QUIET, 1e-3)
    model.save_pretrained(folder)
    return folder


def run(checkpoint: Path, data: Path, out: Path, **changes: Any) -> Artifact:
    settings: dict[str, Any] = {"ratio": 0.0, "layer_ratio": 0.25, "calibration_tokens": 1024, **changes}
    return prune(checkpoint, out=out, data=data, **settings)


def test_influence_is_one_minus_the_mean_cosine_of_what_goes_in_and_out(deep: Path) -> None:
    model, rows = load(deep), unpadded()
    with torch.no_grad():
        streams = load(deep)(rows.input_ids, output_hidden_states=True).hidden_states
    found = block_influence(model, rows)
    assert list(found) == [0, 1, 2, 3]
    for layer in range(3):  # what transformers calls the last hidden state has gone through the norm
        before, after = streams[layer].double(), streams[layer + 1].double()
        cosines = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert found[layer] == pytest.approx(1 - cosines.mean().item(), abs=1e-6)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_padding_does_not_count(deep: Path) -> None:
    model, rows = load(deep), unpadded()
    with_room = padded(rows, 20)
    expected = block_influence(model, rows)
    assert block_influence(model, with_room) == pytest.approx(expected, abs=1e-6)
    counted = replace(with_room, valid=torch.ones_like(with_room.valid))
    assert block_influence(model, counted) != pytest.approx(expected, abs=1e-3)


def test_calibration_rows_know_their_padding(deep: Path, data: Path) -> None:
    config = loading.load_config(deep)
    rows = pruning.calibration_rows(deep, config, data, 1024, 0, (" no", " yes"))
    lengths = rows.valid.sum(1).tolist()
    assert min(lengths) < rows.valid.shape[1]  # some row has room left
    for ids, positions, valid, length in zip(rows.input_ids, rows.position_ids, rows.valid, lengths, strict=True):
        assert valid[:length].all()
        assert not ids[length:].any()
        assert positions[length:].tolist() == list(range(len(ids) - length))
        assert length == len(ids) or ids[:length][-1] != 0


def test_the_planted_layer_has_the_least_influence_and_goes_first(deep: Path) -> None:
    model, rows = load(deep), unpadded()
    dense = block_influence(model, rows)
    assert min(dense, key=dense.__getitem__) == QUIET
    assert dense[QUIET] < 1e-3
    removed = remove_layers(model, 1, rows, method="osscar")
    assert removed == [Removal(QUIET, dense[QUIET])]
    assert [isinstance(layer, Bypass) for layer in model.model.layers] == [False, False, True, False]


def test_influence_is_measured_again_after_each_removal(checkpoint: Callable[..., Path]) -> None:
    dense, rows = load(checkpoint(num_hidden_layers=4)), unpadded()
    scale(dense, 0, 0.1)  # an early layer goes first, so that the later ones are given something else
    before = block_influence(dense, rows)
    first, second = remove_layers(copy.deepcopy(dense), 2, rows, method="magnitude")
    shortened = block_influence(without(dense, [first.layer]), rows)
    del shortened[first.layer]
    assert first == Removal(0, min(before.values()))
    assert second.layer == min(shortened, key=shortened.__getitem__)
    assert second.influence == pytest.approx(shortened[second.layer], abs=1e-6)
    assert second.influence != pytest.approx(before[second.layer], abs=1e-4)


def test_random_layers_are_those_of_the_seed(deep: Path) -> None:
    rows = unpadded()
    drawn = [remove_layers(load(deep), 2, rows, method="random", seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({frozenset(removal.layer for removal in removed) for removed in drawn}) > 1
    first = drawn[0][0]
    assert first.influence == pytest.approx(block_influence(load(deep), rows)[first.layer])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"layer_types": ["full_attention"] * 4},
    ],
    ids=str,
)
def test_layers_alone_leave_the_dense_model_without_them(
    tmp_path: Path, checkpoint: Callable[..., Path], data: Path, changes: dict[str, Any]
) -> None:
    folder = checkpoint(num_hidden_layers=4, **changes)
    artifact = run(folder, data, tmp_path / "out", layer_ratio=0.5)
    dense, loaded = load(folder), load(artifact.path)
    removed = [removal["layer"] for removal in artifact.result["removed_layers"]]
    assert len(set(removed)) == 2
    assert max_difference(without(dense, removed), loaded, IDS) < 1e-4
    assert max_difference(dense, loaded, IDS) > 1e-2  # something went
    assert artifact.result["cut_max_difference"] < 1e-4
    assert (loaded.config.num_hidden_layers, len(loaded.model.layers)) == (2, 2)
    assert loaded.config.tie_word_embeddings == dense.config.tie_word_embeddings
    assert [layer.self_attn.layer_idx for layer in loaded.model.layers] == [0, 1]
    # Nothing that stays is touched.
    kept = [layer for layer in range(4) if layer not in removed]
    for place, layer in enumerate(kept):
        for name, tensor in dense.model.layers[layer].state_dict().items():
            assert torch.equal(loaded.model.layers[place].state_dict()[name], tensor)
    assert torch.equal(loaded.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert artifact.result["kept_per_layer"] == {"kv_heads": 4, "neurons": 64}
    assert artifact.result["layers"] == []
    # The cache is indexed by the new places.
    cached, plain = (loaded.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("method", ["osscar", "magnitude", "random"])
def test_layers_and_widths_go_together(tmp_path: Path, deep: Path, data: Path, method: Any) -> None:
    artifact = run(deep, data, tmp_path / "out", ratio=0.5, method=method, seed=1)
    (removed,) = artifact.result["removed_layers"]
    if method != "random":
        assert removed["layer"] == QUIET
        assert 0 <= removed["influence"] < 1e-3
    config = load(artifact.path).config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size) == (3, 2, 32)
    assert [len(layer["neurons"]) for layer in artifact.result["layers"]] == [32] * 3
    assert artifact.result["parameters"]["after"] == load(artifact.path).num_parameters()
    assert artifact.result["parameters"]["before"] == load(deep).num_parameters()


def test_widths_are_chosen_behind_the_removed_layers(tmp_path: Path, deep: Path, data: Path) -> None:
    both = run(deep, data, tmp_path / "both", ratio=0.5)
    run(deep, data, tmp_path / "short")
    after = run(tmp_path / "short", data, tmp_path / "after", ratio=0.5, layer_ratio=0.0)
    assert both.manifest["files"] == after.manifest["files"]
    assert after.result["removed_layers"] == []


def test_groups_can_go_while_neurons_stay(tmp_path: Path, deep: Path, data: Path) -> None:
    config = load(run(deep, data, tmp_path / "out", attention_ratio=0.5).path).config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.intermediate_size) == (3, 2, 64)


def test_the_dtype_stays_and_the_same_plan_gives_the_same_bytes(
    tmp_path: Path, checkpoint: Callable[..., Path], data: Path
) -> None:
    folder = checkpoint(dtype=torch.bfloat16, num_hidden_layers=3)
    made = [run(folder, data, tmp_path / name, layer_ratio=0.3) for name in ("a", "b")]
    assert AutoModelForCausalLM.from_pretrained(made[0].path).dtype == torch.bfloat16
    assert made[0].manifest["files"] == made[1].manifest["files"]


def test_lists_with_an_entry_per_layer_are_cut_and_no_others(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]  # a Llama reads none of it
    model = load(checkpoint(num_hidden_layers=4, layer_types=kinds, eos_token_id=[1, 2, 3, 4]))
    shorter = shorten(model, [0, 1, 3])
    shorter.save_pretrained(tmp_path / "short")
    config = load(tmp_path / "short").config
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert config.eos_token_id == [1, 2, 3, 4]
    assert (model.config.num_hidden_layers, model.config.layer_types) == (4, kinds)


def test_a_shortening_that_changes_the_model_is_refused(
    tmp_path: Path, deep: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning.surgery, "shorten", lambda model, kept: shorten(load(deep), [0, 1, 2]))
    with pytest.raises(GateError, match="changed its logits"):
        run(deep, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layer_ratio", "kept"), [(0.0, 4), (0.1, 4), (0.2, 3), (0.25, 3), (0.35, 3), (0.4, 2), (0.75, 1), (0.87, 1)]
)
def test_the_number_of_layers_is_rounded(deep: Path, layer_ratio: float, kept: int) -> None:
    counts = kept_counts(deep, ratio=0.5, attention_ratio=None, layer_ratio=layer_ratio, tile=16)
    assert counts == (kept, 32, 2, 32)


def test_without_a_ratio_a_width_that_is_no_multiple_of_the_tile_stays(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(intermediate_size=40, num_hidden_layers=2)
    assert kept_counts(folder, ratio=0.0, attention_ratio=None, layer_ratio=0.5, tile=16) == (1, 32, 4, 40)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_ratio": -0.1}, "layer_ratio = -0.1 is not a share to remove: give 0 to below 1"),
        ({"layer_ratio": 1.0}, "layer_ratio = 1.0 is not a share"),
        ({"layer_ratio": float("nan")}, "layer_ratio = nan is not a share"),
        ({"layer_ratio": 0.9}, "layer_ratio = 0.9 leaves none of its 4 layers: lower it"),
        ({"layer_ratio": 0.1}, "layer_ratio = 0.1 removes none of its 4 layers, and nothing else goes"),
        ({"layer_ratio": 0.0}, "ratio = 0.0 is not a share to remove: .* or 0 with .* layer_ratio or hidden_ratio"),
        ({"ratio": 1.0}, "ratio = 1.0 is not a share"),
    ],
)
def test_unfit_numbers_are_refused(tmp_path: Path, deep: Path, data: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(deep, data, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_data_with_nothing_to_predict_is_refused(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": "the fox", "completion": ""}) + "\n")
    with pytest.raises(InputError, match="no record that fits into 64 tokens with one to predict: raise length"):
        run(checkpoint(eos_token_id=None), empty, tmp_path / "out", layer_ratio=0.5)


def test_the_command_line_and_the_recipe_take_it(tmp_path: Path, deep: Path, data: Path) -> None:
    arguments = ["prune", deep, "-o", tmp_path / "out", "--data", data, "--ratio", 0, "--layer-ratio", 0.5]
    done = CliRunner().invoke(app, [*map(str, arguments), "--calibration-tokens", "512"])
    assert done.exit_code == 0, done.output
    artifact = open_artifact(tmp_path / "out", "checkpoint")
    assert artifact.manifest["plan"]["layer_ratio"] == 0.5
    assert len(artifact.result["removed_layers"]) == 2
    settings = PrunePlan(ratio=0.5).settings  # pipeline.py hands all of them on
    assert set(settings) <= set(inspect.signature(prune).parameters)
