"""Builds of the engine tensorrt: checked, executed for their numbers, honest about what was not done, and refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from slmdeploy.artifacts import Artifact
from slmdeploy.building import fp8_build
from slmdeploy.building.build import build
from slmdeploy.building.contract import breaches
from slmdeploy.building.onnxruntime import read_model
from slmdeploy.building.rotation import rotate
from slmdeploy.errors import GateError, InputError
from slmdeploy.exporting.export import export
from slmdeploy.packaging.package import package
from slmdeploy.profiling.candidates import find
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import load
from slmdeploy.specs import Gate, Profile, SessionOptions, Target, load_profile, load_target, named_workload
from slmdeploy.verification import verify
from tests.building.small import relative_error, write_graph
from tests.exporting.families import CASES, write_case

OPEN = Gate(max_kl=10.0, min_top1=0.0, max_ppl_ratio=10.0)
IDS = list(range(3, 40))


def with_gate(gate: Gate) -> Profile:
    session = SessionOptions(threads=1, spinning=False)
    return load_profile("tensorrt-fp8").model_copy(update={"session": session, "gate": gate})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_case(CASES["llama-gqa"], folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few records: less than the graph would write by itself, so that a build takes a second."""
    folder = tmp_path_factory.mktemp("data")
    letters = np.random.default_rng(0).integers(97, 123, (8, 60)).astype(np.uint8)
    records = [
        json.dumps({"prompt": row[:20].tobytes().decode(), "completion": row.tobytes().decode()}) for row in letters
    ]
    for split, part in (("train", records[:4]), ("valid", records[4:])):
        (folder / f"generate.{split}.jsonl").write_text("\n".join(part) + "\n")
    return folder


@pytest.fixture(scope="module")
def graphs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The decoder in each opset."""
    folder = tmp_path_factory.mktemp("graphs")
    return {
        opset: export(checkpoint, out=folder / f"{opset}", tasks=("generate",), dialect="portable", opset=opset).path
        for opset in (21, 23, 24)
    }


@pytest.fixture(scope="module")
def graph(graphs: dict[int, Path]) -> Path:
    return graphs[21]


@pytest.fixture(scope="module", params=[21, 23, 24])
def pair(
    request: pytest.FixtureRequest, graphs: dict[int, Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Artifact]:
    """A graph and its build."""
    source = graphs[request.param]
    return source, build(source, profile=with_gate(OPEN), data=data, out=tmp_path_factory.mktemp("built") / "build")


@pytest.fixture
def built(pair: tuple[Path, Artifact]) -> Artifact:
    return pair[1]


def test_a_build_holds_a_valid_fp8_graph_with_both_sides_of_every_layer(built: Artifact) -> None:
    model = ir.load(built.path / "model.onnx")
    assert breaches(model) == []
    products = {node.name for node in model.graph if node.op_type == "MatMul" and _reads_fp8(node)}
    assert products == set(built.result["parts"])
    assert {str(name).rpartition(".")[2] for name in products} == {
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
        "lm_head",
    }
    assert set(built.result["parts"].values()) == {"fp8"}


def _reads_fp8(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs if value is not None]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def test_its_numbers_are_near_the_graph_and_its_cache_is_right(pair: tuple[Path, Artifact]) -> None:
    graph, built = pair
    assert built.result["passed"]
    assert 0 < built.result["quality"]["kl"] < 0.05
    assert {"kl", "top1_agreement", "ppl_ratio", "parity"} == set(built.result["gates"])
    exact, found = (load(path, threads=1).logits(IDS) for path in (graph, built.path))
    assert 0 < relative_error(found, exact) < 0.15
    assert read_runtime(built.path).numerics_only
    assert not read_runtime(graph).numerics_only


def test_it_says_how_far_it_was_proved_and_so_does_verify(built: Artifact) -> None:
    ladder = verify(built.path)["verification"]
    assert ladder == built.result["verification"]
    assert ladder["summary"] == "contract checked, not compiled, executed on CPU (numerics), not executed on GPU"
    assert ladder["compiled"].startswith("no: TensorRT cannot be used here")
    assert ladder["compiled"].endswith("pip install tensorrt")
    assert ladder["executed_on_gpu"] == "no"
    assert built.result["compiled"] is None
    assert "onnxruntime" in ladder["executed_on_cpu"]
    assert built.result["speed"] is None


def test_its_speed_is_not_measured_and_it_is_not_packaged(built: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its speed on this CPU would say nothing"):
        find([built.path], None)
    with pytest.raises(InputError, match="a graph for a compiler"):
        package(built.path, out=tmp_path / "package")


def test_a_head_and_layers_that_cost_too_much_stay_as_they_were(
    graph: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_build, "_SCREENING_TOKENS", 64)
    strict = with_gate(Gate(max_kl=1e-9, min_top1=1.0, max_ppl_ratio=1.0))
    result = build(graph, profile=strict, data=data, out=tmp_path / "build").result
    kept = {entry["part"]: entry for entry in result["kept"]}
    assert "alone is beyond" in kept["lm_head"]["reason"]
    layers = len(result["parts"]) + len(kept) - 1
    assert len(kept) - 1 == layers // 4
    assert not set(kept) & set(result["parts"])
    assert all(entry["form"] == "as exported" for entry in kept.values())
    assert not result["passed"]


def test_a_narrow_layer_is_left_out_and_named(
    graph: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrowed = "model.layers.0.attn.o_proj"
    weight = next(node.inputs[1] for node in ir.load(graph / "model.onnx").graph if node.name == narrowed)
    assert weight is not None
    monkeypatch.setattr(fp8_build, "too_narrow", lambda value: value.name == weight.name)
    result = build(graph, profile=with_gate(OPEN), data=data, out=tmp_path / "build").result
    assert narrowed not in result["parts"]
    assert [(entry["part"], entry["kl_alone"]) for entry in result["kept"]] == [(narrowed, None)]
    assert "under 16" in result["kept"][0]["reason"]


def test_a_graph_that_breaks_the_contract_is_never_written(
    graph: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_build, "activation_scale", lambda counts, rule: np.float32(np.nan))
    with pytest.raises(GateError, match="not a finite number above 0, so calibrate again"):
        build(graph, profile=with_gate(OPEN), data=data, out=tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_another_dialect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"of the shared interface.*--dialect portable"):
        build(write_graph(tmp_path / "ort"), profile=with_gate(OPEN), out=tmp_path / "build")


def test_a_target_without_fp8_or_without_tensorrt_is_refused(tmp_path: Path) -> None:
    graph, out = write_graph(tmp_path / "graph"), tmp_path / "build"
    ampere: Target = load_target("nvidia-ampere-sm80")
    with pytest.raises(InputError, match=r"needs compute capability 8\.9 for FP8.*'nvidia-ampere-sm80' has 8\.0"):
        build(graph, profile=with_gate(OPEN), target=ampere, out=out)
    with pytest.raises(InputError, match="needs the engine tensorrt"):
        build(graph, profile=with_gate(OPEN), target=load_target("x86-64-avx2"), out=out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"scheme": "w8a8", "bits": 8}}, "scheme = 'fp8' goes with engine = 'tensorrt', or fp32"),
        ({"weights": {"scheme": "fp32"}, "fp8": {}}, "scheme = 'fp32' has none: leave it out"),
        ({"engine": "onnxruntime", "weights": {"scheme": "fp32"}, "compute": "fp16"}, "does not take compute"),
        ({"compiler": {"module": "tensorrt", "levle": 3}}, "levle"),
        ({"engine": "onnxruntime"}, "scheme = 'fp8' goes with engine = 'tensorrt'"),
        ({"weights": {"scheme": "fp8", "bits": 4}}, "bits = 4 does not go with scheme = 'fp8'"),
        ({"head": {"bits": 8}}, "engine = 'tensorrt' does not take head"),
        ({"fp8": {"activation_scale": "entropy"}}, "activation_scale"),
    ],
)
def test_profiles_that_say_what_the_engine_has_not(change: dict[str, Any], message: str) -> None:
    fields = {"name": "p", "summary": "s", "engine": "tensorrt", "weights": {"scheme": "fp8", "bits": 8}}
    assert Profile.model_validate(fields).fp8.activation_scale == "max"
    with pytest.raises(ValidationError, match=message):
        Profile.model_validate(fields | change)


def with_options(**fp8: bool) -> Profile:
    shipped = with_gate(OPEN)
    return shipped.model_copy(update={"fp8": shipped.fp8.model_copy(update=fp8)})


def test_attention_in_fp8_has_both_products_on_both_sides(graph: Path, data: Path, tmp_path: Path) -> None:
    built = build(graph, profile=with_options(attention=True), data=data, out=tmp_path / "build")
    model = ir.load(built.path / "model.onnx")
    assert breaches(model) == []
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert all(_reads_fp8(node) for node in products)
    assert len(products) == len(built.result["parts"]) + 2 * read_runtime(graph).layers
    exact, found = (load(path, threads=1).logits(IDS) for path in (graph, built.path))
    assert 0 < relative_error(found, exact) < 0.3


def test_attention_as_an_operator_cannot_be_quantised(graphs: dict[int, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attention as one operator.*--opset 21, or set attention = false"):
        build(graphs[23], profile=with_options(attention=True), out=tmp_path / "build")


def test_smoothing_keeps_what_the_graph_computes_before_it_is_quantised(
    graph: Path, data: Path, tmp_path: Path
) -> None:
    smooth = build(graph, profile=with_options(smooth=True), data=data, out=tmp_path / "build")
    assert smooth.result["passed"]
    exact, found = (load(path, threads=1).logits(IDS) for path in (graph, smooth.path))
    assert 0 < relative_error(found, exact) < 0.2


@pytest.mark.parametrize("opset", [23, 24])
def test_turning_keeps_what_the_graph_computes_before_it_is_quantised(
    graphs: dict[int, Path], data: Path, tmp_path: Path, opset: int
) -> None:
    turned = read_model(graphs[opset])
    found = rotate(turned)
    layers = read_runtime(graphs[opset]).layers
    assert (found["reads"] >= 2 * layers, found["writes"], found["attentions"]) == (True, 2 * layers, 0)
    profile = with_options(rotate=True, smooth=opset == 23)
    built = build(graphs[opset], profile=profile, data=data, out=tmp_path / "build")
    assert built.result["passed"]
    exact, quantised = (load(path, threads=1).logits(IDS) for path in (graphs[opset], built.path))
    assert 0 < relative_error(quantised, exact) < 0.2


def test_norms_that_are_written_out_cannot_be_turned(graph: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the graph cannot be rotated"):
        build(graph, profile=with_options(rotate=True), data=data, out=tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_float16_alone_is_nearer_than_fp8_and_its_cache_is_float16(graph: Path, data: Path, tmp_path: Path) -> None:
    half = with_gate(OPEN).model_copy(
        update={"weights": load_profile("tensorrt-fp16").weights, "name": "tensorrt-fp16"}
    )
    built = build(graph, profile=half, data=data, out=tmp_path / "build")
    assert built.result["parts"] == {}
    assert built.result["quality"]["kl"] < 1e-4
    assert built.result["verification"]["contract"] == "none: the graph has no FP8"
    runtime = read_runtime(built.path)
    assert (runtime.cache, runtime.precision) == ("float16", "fp16")


def test_data_without_a_token_and_a_workload_for_another_engine_are_refused(graph: Path, tmp_path: Path) -> None:
    empty = tmp_path / "data"
    empty.mkdir()
    for split in ("train", "valid"):
        (empty / f"generate.{split}.jsonl").write_text("")
    with pytest.raises(InputError, match=r"data"):
        build(graph, profile=with_gate(OPEN), data=empty, out=tmp_path / "build")
    with pytest.raises(InputError, match="compiles nothing for a workload: leave --workload out"):
        build(graph, profile=load_profile("cpu-fp32"), workload=named_workload("generate-8-4"), out=tmp_path / "build")
    assert not (tmp_path / "build").exists()
