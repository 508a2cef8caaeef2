"""chunks.py: the fastest piece is measured and written down, a smaller one where it is as fast; or nothing is."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from slmdeploy.building import chunks
from slmdeploy.building.onnxruntime import open_folder
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import Model
from tests.graphs import write_tiny_graph


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({0: 2.0, 256: 1.5, 128: 1.0, 64: 1.1}, 128),
        ({0: 1.0, 256: 1.02, 128: 1.2, 64: 1.3}, 256),
        ({0: 1.0, 256: 1.1, 128: 1.2, 64: 1.3}, 0),
    ],
)
def test_the_fastest_piece_goes_into_runtime_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], chosen: int
) -> None:
    folder = write_tiny_graph(tmp_path / "build", max_length=300)
    asked = []

    def fake(model: Model, ids: list[int], chunk: int) -> float:
        asked.append((len(ids), chunk))
        return seconds[chunk]

    monkeypatch.setattr(chunks, "_seconds", fake)
    found = chunks.choose_chunk(open_folder(folder), folder)
    ms = {str(chunk or "whole"): value * 1e3 for chunk, value in seconds.items()}
    assert found is not None
    assert found["parity"]["passed"]
    assert {key: found[key] for key in ("chunk", "prompt_tokens", "ms")} == {
        "chunk": chosen,
        "prompt_tokens": 300,
        "ms": ms,
    }
    assert read_runtime(folder).prefill_chunk == chosen
    assert asked[:8] == [(300, 0), (300, 256), (300, 128), (300, 64)] * 2, "interleaved"


def test_what_is_timed_is_a_prompt_in_pieces(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "build", max_length=140)
    model, ids = open_folder(folder), np.arange(2, 142).tolist()
    whole = model.prefill(ids)
    assert chunks._seconds(model, ids, 64) > 0
    assert np.abs(model.prefill(ids) - whole).max() < 1e-5
    chosen = chunks.choose_chunk(model, folder)
    assert chosen is not None
    assert set(chosen["ms"]) == {"whole", "128", "64"}
    assert np.abs(open_folder(folder).prefill(ids) - whole).max() < 1e-5


def test_pieces_that_give_other_logits_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_graph(tmp_path / "build", max_length=140)
    monkeypatch.setattr(chunks, "_seconds", lambda model, ids, chunk: 1.0 if chunk else 2.0)
    right = chunks._prefilled
    monkeypatch.setattr(chunks, "_prefilled", lambda model, ids, chunk: right(model, ids, 0) + (0.5 if chunk else 0))
    found = chunks.choose_chunk(open_folder(folder), folder)
    assert found is not None
    assert not found["parity"]["passed"]
    assert found["chunk"] == read_runtime(folder).prefill_chunk == 0


def test_a_short_context_has_no_choice(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "build", max_length=64)
    before = (folder / "runtime.json").read_bytes()
    assert chunks.choose_chunk(open_folder(folder), folder) is None
    assert (folder / "runtime.json").read_bytes() == before


def test_a_rotation_that_depends_on_the_length_has_no_choice(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "build", max_length=140)
    assert chunks.may_be_cut(folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[0].name = "rope.turns"
    onnx.save(model, folder / "model.onnx")
    assert not chunks.may_be_cut(folder)
    assert chunks.choose_chunk(open_folder(folder), folder) is None
    assert json.loads((folder / "runtime.json").read_text()).get("prefill") is None
