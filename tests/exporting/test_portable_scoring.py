"""The scoring graph of the portable dialect: standard operators, and the scores of each item alone."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from slmdeploy.building.gate import parity_gate
from slmdeploy.building.onnxruntime import open_folder
from slmdeploy.exporting.export import export
from slmdeploy.runtime.model import load
from tests.exporting.families import CASES, write_case

LIMIT = 1e-5


def exported(folder: Path, case: str, opset: int, **options: Any) -> Path:
    write_case(CASES[case], folder / "checkpoint")
    options = {"tasks": ("score",), "max_length": CASES[case].max_length, "parity": False} | options
    return export(folder / "checkpoint", out=folder / "graph", dialect="portable", opset=opset, **options).path


@pytest.mark.parametrize(("case", "opset"), [("llama-gqa", 21), ("llama-gqa", 23), ("gemma2", 24)])
def test_items_side_by_side_score_as_each_does_alone(tmp_path: Path, case: str, opset: int) -> None:
    graph = exported(tmp_path, case, opset)
    rungs, gate = parity_gate(open_folder(graph), LIMIT)
    assert gate["passed"], rungs
    assert any("items packed" in rung["name"] for rung in rungs)
    held = onnx.load(graph / "score.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in held.opset_import} == {"": opset}
    onnx.checker.check_model(graph / "score.onnx", full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize(
    "case", ["mistral-window", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt-neox", "stablelm-parallel", "olmo2"]
)
def test_every_kind_of_decoder_scores_so(tmp_path: Path, case: str, opset: int) -> None:
    _, gate = parity_gate(open_folder(exported(tmp_path, case, opset)), LIMIT)
    assert gate["passed"], gate


def test_both_dialects_give_the_same_scores_from_one_copy_of_the_weights(tmp_path: Path) -> None:
    graph = exported(tmp_path, "llama-gqa", 23)
    other = export(tmp_path / "checkpoint", out=tmp_path / "other", tasks=("score",), parity=False).path
    prefix, items = list(range(3, 40)), [[5], [6, 7, 8], list(range(9, 30))]
    found, exact = (load(path, threads=1).score_ids(prefix, items) for path in (graph, other))
    assert np.abs(found - exact).max() < 1e-5 * max(1.0, float(np.abs(exact).max()))
    assert (graph / "score.onnx").stat().st_size < (graph / "model.onnx.data").stat().st_size / 4
