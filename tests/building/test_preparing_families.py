"""Every family's graph takes factors without a change, and is turned without one or refused by a sentence."""

from pathlib import Path

import numpy as np
import pytest

from slmdeploy.building.folding import places
from slmdeploy.building.onnxruntime import open_folder, read_model
from slmdeploy.building.preparing import write_prepared
from slmdeploy.building.rotation import rotate
from slmdeploy.errors import InputError
from slmdeploy.exporting.export import export
from tests.building.small import relative_error
from tests.exporting.families import CASES, write_case

QUICK = ("llama-gqa", "qwen2", "gemma2", "gpt2")
REFUSED = {
    **dict.fromkeys(("gemma2", "gemma3", "gemma3-softcap"), "SkipSimplifiedLayerNormalization"),
    **dict.fromkeys(("olmo2", "olmo2-gqa"), "MatMul"),
    **dict.fromkeys(("gpt2", "gpt2-untied-relu"), "Add"),
    **dict.fromkeys(
        ("stablelm", "stablelm-parallel", "gpt-neox", "gpt-neox-serial", "starcoder2", "starcoder2-mqa"),
        "LayerNormalization",
    ),
}
"""Norms behind a branch, positions that are added, and norms that take a mean."""
IDS = [0, 5, 9, 33, 100, 7, 8, 200]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_family_stays_what_it_is(tmp_path: Path, name: str) -> None:
    write_case(CASES[name], tmp_path / "checkpoint")
    graph = tmp_path / "graph"
    export(tmp_path / "checkpoint", out=graph, parity=False)
    expected = open_folder(graph).logits(IDS)
    model, random = read_model(graph), np.random.default_rng(0)
    found = places(model.graph)
    for place in found:
        place.divide(np.exp2(random.integers(-4, 5, place.size)).astype(np.float32))
    assert found
    write_prepared(model, graph, tmp_path / "scaled")
    assert relative_error(open_folder(tmp_path / "scaled").logits(IDS), expected) < 1e-6
    turned = read_model(graph)
    if name in REFUSED:
        with pytest.raises(InputError, match=f"cannot be rotated: {REFUSED[name]} "):
            rotate(turned)
        return
    assert rotate(turned)["reads"] > 3
    write_prepared(turned, graph, tmp_path / "turned")
    assert relative_error(open_folder(tmp_path / "turned").logits(IDS), expected) < 1e-4
