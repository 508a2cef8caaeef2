"""FP8 builds of encoders: a valid graph, its numbers on the CPU, what is left as it was, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.artifacts import Artifact
from slmdeploy.building.build import build
from slmdeploy.building.contract import breaches
from slmdeploy.building.fp8_encoder import KEPT
from slmdeploy.errors import InputError
from slmdeploy.packaging.package import package
from slmdeploy.profiling.candidates import find
from slmdeploy.runtime.encoder_config import read_encoder
from slmdeploy.runtime.encoder_model import load_encoder
from slmdeploy.specs import Gate, Profile, SessionOptions, load_profile
from slmdeploy.verification import verify
from tests.building.portable_encoders import write_portable_encoder
from tests.runtime.encoder_graphs import write_encoder_graph

TEXTS = ["a b c", "d", "c c a b d a"]
LAYERS = {"layer.q0_k1_v0", "layer.dense", "layer.up", "layer.down"}


def profile(name: str = "tensorrt-fp8", **changes: Any) -> Profile:
    return load_profile(name).model_copy(update={"session": SessionOptions(threads=1, spinning=False)} | changes)


@pytest.fixture(scope="module", params=[21, 23])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    """A graph and its build."""
    folder = tmp_path_factory.mktemp("encoder")
    graph = write_portable_encoder(folder / "graph", request.param)
    return graph, build(graph, profile=profile(), out=folder / "build")


def test_every_linear_layer_is_fp8_on_both_sides_and_the_vectors_are_near(pair: tuple[Path, Artifact]) -> None:
    graph, built = pair
    model = ir.load(built.path / "model.onnx")
    assert breaches(model) == []
    assert set(built.result["parts"]) == LAYERS
    assert built.result["passed"]
    exact, found = (load_encoder(path).embed(TEXTS) for path in (graph, built.path))
    assert 0 < np.abs(found - exact).max() < 0.1 * np.abs(exact).max()
    assert read_encoder(built.path).numerics_only
    assert not read_encoder(graph).numerics_only


def test_attention_is_float16_and_the_pooling_is_not(pair: tuple[Path, Artifact]) -> None:
    model = ir.load(pair[1].path / "model.onnx")
    types = {node.op_type: node.outputs[0].dtype for node in model.graph}
    assert types["Attention" if "Attention" in types else "Softmax"] == ir.DataType.FLOAT16
    assert types["ReduceSum"] == types["Div"] == ir.DataType.FLOAT
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.FLOAT}


def test_the_ladder_says_how_far_and_speed_is_not_measured(pair: tuple[Path, Artifact], tmp_path: Path) -> None:
    built = pair[1]
    ladder = verify(built.path)["verification"]
    assert ladder["summary"] == "contract checked, not compiled, executed on CPU (numerics), not executed on GPU"
    assert ladder["contract"] == "checked: 4 FP8 products"
    with pytest.raises(InputError, match="its speed on this CPU would say nothing"):
        find([built.path], None)
    with pytest.raises(InputError, match="a graph for a compiler"):
        package(built.path, out=tmp_path / "package")


def test_layers_that_cost_too_much_stay_as_they_were(tmp_path: Path) -> None:
    graph = write_portable_encoder(tmp_path / "graph")
    result = build(graph, profile=profile(gate=Gate(min_cosine=1.0)), out=tmp_path / "build").result
    assert not result["passed"]
    (kept,) = result["kept"]
    assert kept["form"] == KEPT
    assert kept["loss_alone"] > 0
    assert {kept["part"], *result["parts"]} == LAYERS


def test_float16_alone_is_nearer(tmp_path: Path) -> None:
    graph = write_portable_encoder(tmp_path / "graph")
    result = build(graph, profile=profile("tensorrt-fp16"), out=tmp_path / "build").result
    assert result["passed"]
    assert result["parts"] == {}
    assert result["quality"]["min_cosine"] > 0.99999
    assert result["verification"]["contract"] == "none: the graph has no FP8"


@pytest.mark.parametrize("option", ["smooth", "attention"])
def test_options_of_decoders_are_refused(tmp_path: Path, option: str) -> None:
    graph = write_portable_encoder(tmp_path / "graph")
    shipped = load_profile("tensorrt-fp8")
    with pytest.raises(InputError, match=rf"fp8\.{option} is for decoders"):
        build(graph, profile=profile(fp8=shipped.fp8.model_copy(update={option: True})), out=tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_a_graph_of_an_old_opset_is_refused(tmp_path: Path) -> None:
    graph = write_encoder_graph(tmp_path / "graph")
    with pytest.raises(InputError, match=r"of an old opset.*--dialect portable"):
        build(graph, profile=profile(), out=tmp_path / "build")
