"""What is refused before a build for TensorRT begins, and scorers, whose build is one graph for one task."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.artifacts import Artifact
from slmdeploy.building.build import build
from slmdeploy.building.contract import breaches
from slmdeploy.building.tensorrt_checks import check_graph
from slmdeploy.errors import InputError
from slmdeploy.exporting.export import export
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import load
from slmdeploy.specs import Gate, Profile, SessionOptions, load_profile
from tests.building.portable_encoders import write_portable_encoder
from tests.building.small import relative_error
from tests.exporting.families import CASES, write_case

OPEN = Gate(max_kl=10.0, min_top1=0.0, max_ppl_ratio=10.0)
PREFIX, ITEMS = list(range(3, 20)), [[5, 6], list(range(30, 50)), [7]]


def profile(**changes: Any) -> Profile:
    session = SessionOptions(threads=1, spinning=False)
    return load_profile("tensorrt-fp8").model_copy(update={"session": session, "gate": OPEN} | changes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_case(CASES["llama-gqa"], folder)
    return folder


def exported(checkpoint: Path, out: Path, *tasks: str) -> Path:
    return export(checkpoint, out=out, tasks=tasks, dialect="portable", opset=23, parity=False).path


@pytest.fixture(scope="module")
def pair(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    """A scorer's graph and its build."""
    folder = tmp_path_factory.mktemp("scorer")
    (folder / "data").mkdir()
    letters = np.random.default_rng(0).integers(97, 123, (8, 60)).astype(np.uint8)
    records = [json.dumps({"prompt": row[:20].tobytes().decode(), "completion": "b"}) for row in letters]
    for split, part in (("train", records[:4]), ("valid", records[4:])):
        (folder / "data" / f"generate.{split}.jsonl").write_text("\n".join(part) + "\n")
    graph = exported(checkpoint, folder / "graph", "score")
    return graph, build(graph, profile=profile(), data=folder / "data", out=folder / "build")


def test_a_scorers_build_is_one_valid_graph_whose_scores_are_near(pair: tuple[Path, Artifact]) -> None:
    graph, built = pair
    assert breaches(ir.load(built.path / "score.onnx")) == []
    assert not (built.path / "model.onnx").exists()
    exact, found = (load(path, threads=1).score_ids(PREFIX, ITEMS) for path in (graph, built.path))
    assert 0 < relative_error(found, exact) < 0.2
    runtime = read_runtime(built.path)
    assert (runtime.cache, runtime.numerics_only, runtime.tasks) == ("float16", True, ("score",))


def test_its_layers_are_fp8_and_its_head_of_label_rows_is_not(pair: tuple[Path, Artifact]) -> None:
    result = pair[1].result
    assert len(result["parts"]) == 3 * 4
    (kept,) = result["kept"]
    assert kept["part"] == "lm_head"
    assert any("items packed" in rung["name"] for rung in result["parity"])
    assert result["verification"]["contract"] == "checked: 12 FP8 products"


def test_a_graph_of_both_tasks_and_smoothing_of_a_scorer_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    both = exported(checkpoint, tmp_path / "both", "generate", "score")
    with pytest.raises(InputError, match=r"generate and score, and a plan is for one: export it with --task"):
        check_graph(both, profile())
    scorer = exported(checkpoint, tmp_path / "scorer", "score")
    smooth = profile().fp8.model_copy(update={"smooth": True})
    with pytest.raises(InputError, match=r"fp8\.smooth is for the task generate"):
        check_graph(scorer, profile(fp8=smooth))
    with pytest.raises(InputError, match="is a scorer's, which does not run through ONNX Runtime's TensorRT providers"):
        check_graph(scorer, load_profile("tensorrt-fp8-ort"))


def test_an_encoder_does_not_run_through_the_providers(tmp_path: Path) -> None:
    graph = write_portable_encoder(tmp_path / "graph")
    check_graph(graph, profile())
    with pytest.raises(InputError, match="is an encoder's, which does not run through ONNX Runtime's"):
        check_graph(graph, load_profile("tensorrt-fp8-ort"))
