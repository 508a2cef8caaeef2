"""benchmarks/layer_bits.py: the costliest layers are raised first, nothing is made twice, the docs show the results."""

import json

import pytest

from benchmarks import layer_bits, rounding
from slmdeploy.building.quantize import EMBEDDING, HEAD

LAYERS = [f"model.layers.{number}.mlp.down_proj" for number in range(24)]
COSTLY = LAYERS[20]
COSTS = {name: float(number) for number, name in enumerate(LAYERS)} | {COSTLY: 1000.0, EMBEDDING: 1.0, HEAD: 1.0}


def fake(plan, tokens: int) -> dict[str, float]:
    """A graph in which one layer costs more in 4 bits than all others together."""
    kl = sum(COSTS[name] for name, form in plan.items() if form.bits == 4)
    return {"kl": kl, "top1": float(tokens), "ppl_ratio": 1.0}


@pytest.fixture
def cells() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    assert list(layer_bits.cells(LAYERS, found, fake)) == list(found)
    return found


def test_raising_begins_with_the_costliest_layer(cells) -> None:
    whole = cells[f"{layer_bits.LINEAR} | 4"]["kl"]
    assert cells[f"{layer_bits.SENSITIVE} | 3"]["kl"] == whole - 1000 - 23 - 22
    assert cells[f"{layer_bits.ORDER} | 3"]["kl"] == whole - 0 - 1 - 2
    assert cells[f"{layer_bits.ORDER} | 24"]["kl"] == cells[f"{layer_bits.LINEAR} | 8"]["kl"] == 0
    assert len({cells[f"{layer_bits.DRAWN} {draw} | 12"]["kl"] for draw in range(layer_bits.DRAWS)}) > 1


def test_layers_are_screened_on_fewer_tokens_and_tables_are_tried_alone(cells) -> None:
    assert cells[f"layer | {COSTLY}"] == {"kl": 1000.0, "top1": 1024.0, "ppl_ratio": 1.0}
    assert cells["head | 4"]["kl"] == cells["embedding | 4"]["kl"] == 1
    assert {EMBEDDING, HEAD} == set(layer_bits.ALONE.values())


def test_what_is_there_is_not_made_again(cells) -> None:
    del cells["head | 8"]
    assert list(layer_bits.cells(LAYERS, cells, fake)) == ["head | 8"]


def test_the_tables_in_the_docs_are_those_of_the_results(cells) -> None:
    assert f"`{COSTLY.removeprefix('model.layers.')}` 1000.00000" in layer_bits.tables({"cells": cells})
    found = json.loads(layer_bits.RESULTS.read_text(encoding="utf-8"))
    assert layer_bits.tables(found) in rounding.PAGE.read_text(encoding="utf-8")
