"""A checkpoint whose layers have sizes of their own equals the dense model with what was cut away set to zero."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slmdeploy.errors import UnsupportedModelError
from slmdeploy.exporting.export import export
from slmdeploy.runtime.model import load
from tests.exporting.checkpoints import TINY, write_checkpoint
from tests.exporting.families import CASES, write_case

KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
DIM, GROUPS, NEURONS = TINY["head_dim"], 1, 40
SHAPES = [dict(zip(KEYS, sizes, strict=True)) for sizes in ((4, 2, TINY["intermediate_size"]), (2, GROUPS, NEURONS))]


def cut(folder: Path) -> None:
    """Keep the first GQA group and the first neurons of layer 1."""
    tensors, layer = load_file(folder / "model.safetensors"), "model.layers.1."
    rows = {
        **{"self_attn.q_proj": 2 * DIM, "self_attn.k_proj": DIM, "self_attn.v_proj": DIM},
        **{"mlp.gate_proj": NEURONS, "mlp.up_proj": NEURONS},
    }
    for name, count in rows.items():
        tensors[f"{layer}{name}.weight"] = tensors[f"{layer}{name}.weight"][:count].contiguous()
    for name, count in (("self_attn.o_proj", 2 * DIM), ("mlp.down_proj", NEURONS)):
        tensors[f"{layer}{name}.weight"] = tensors[f"{layer}{name}.weight"][:, :count].contiguous()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_shapes": SHAPES}))


def test_layers_of_unequal_sizes_equal_the_masked_dense_model(tmp_path: Path) -> None:
    dense = write_checkpoint(tmp_path / "checkpoint")
    cut(tmp_path / "checkpoint")
    artifact = export(tmp_path / "checkpoint", out=tmp_path / "graph", tasks=("generate", "score"))
    assert max(rung["difference"] for rung in artifact.result["parity"]) < 1e-4
    with torch.no_grad():
        dense.model.layers[1].self_attn.o_proj.weight[:, 2 * DIM :] = 0
        dense.model.layers[1].mlp.down_proj.weight[:, NEURONS:] = 0
        expected = dense(torch.tensor([[5, 3, 200, 7]])).logits[0].numpy()
    model = load(tmp_path / "graph")
    assert model.runtime.kv_heads == (2, 1)
    assert np.allclose(model.logits([5, 3, 200, 7]), expected, atol=1e-4)


def test_a_family_with_fused_projections_has_layers_of_one_size(tmp_path: Path) -> None:
    write_case(CASES["phi3"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    shapes = [dict(zip(KEYS, (4, 4, 37), strict=True))] * 3
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_shapes": shapes}))
    with pytest.raises(UnsupportedModelError, match=r"layer_shapes = .* phi3 has its projections fused"):
        export(tmp_path, out=tmp_path / "graph")
