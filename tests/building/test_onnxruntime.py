"""onnxruntime.py: requirements met and not, bytes stored once, and graphs that cannot be read or run."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.building import onnxruntime as engine
from slmdeploy.building.quantize import quantize
from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.specs import Profile, Target, Weights
from tests.building.small import constant, linear, normal, write_graph

VNNI = Profile.model_validate(
    {
        "name": "vnni",
        "summary": "s",
        "engine": "onnxruntime",
        "weights": {"scheme": "w8a8", "bits": 8},
        "requires": {"isa": ["avx2", "avx512_vnni"]},
    }
)
CPUINFO = "processor : 0\nmodel name : some cpu\nflags : fpu {flags}\n\nprocessor : 1\nflags : fpu\n"


def target(**fields: Any) -> Target:
    return Target.model_validate({"name": "t", "summary": "s", "kind": "cpu", "engines": ["onnxruntime"]} | fields)


def test_a_target_that_has_it_all_is_accepted_and_another_is_told_what_it_lacks() -> None:
    engine.check_requirements(VNNI, target(isa=["avx2", "avx512f", "avx512_vnni"]))
    with pytest.raises(InputError, match="'vnni' needs avx512_vnni, which target 't' does not have"):
        engine.check_requirements(VNNI, target(isa=["avx2"]))


def test_a_target_without_the_engine_is_refused() -> None:
    with pytest.raises(InputError, match="needs the engine onnxruntime"):
        engine.check_requirements(VNNI, target(isa=["avx2", "avx512_vnni"], engines=["tensorrt"]))


@pytest.mark.parametrize(
    ("isa", "message"),
    [
        (frozenset({"avx2"}), "needs avx512_vnni, which this machine"),
        (None, "does not tell its instruction set: name a target"),
    ],
)
def test_without_a_target_this_machine_counts(
    monkeypatch: pytest.MonkeyPatch, isa: frozenset[str] | None, message: str
) -> None:
    monkeypatch.setattr(engine, "local_isa", lambda: isa)
    with pytest.raises(InputError, match=message):
        engine.check_requirements(VNNI, None)
    engine.check_requirements(VNNI.model_copy(update={"requires": type(VNNI.requires)()}), None)


def test_the_instruction_set_is_read_from_cpuinfo(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert engine.local_isa(file) is None
    file.write_text(CPUINFO.format(flags="avx2 avx512_vnni"))
    assert engine.local_isa(file) == {"fpu", "avx2", "avx512_vnni"}
    file.write_text("processor : 0\nFeatures : fp asimddp\n")
    assert engine.local_isa(file) == {"fp", "asimddp"}
    file.write_text("processor : 0\n")
    assert engine.local_isa(file) is None


def test_equal_contents_are_stored_once_and_small_ones_inline(tmp_path: Path) -> None:
    weight = normal(32, 32)
    model = linear(weight, weight.copy(), normal(32, 32, seed=1))
    model.graph.register_initializer(constant("small", np.ones(3, np.float32)))
    engine.write_models({"model.onnx": model}, tmp_path)
    assert (tmp_path / engine.DATA).stat().st_size == 2 * weight.nbytes
    back = engine.read_model(tmp_path)
    for name, seed in (("layer0.weight", 0), ("layer1.weight", 0), ("layer2.weight", 1)):
        value = back.graph.initializers[name].const_value
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), normal(32, 32, seed=seed))


def test_a_tied_embedding_and_head_quantised_alike_share_their_bytes(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph", tied=True, layers=1, tasks=("generate",))
    form = Weights(scheme="weight-only", bits=8, block_size=32)
    sizes = {}
    for name, plan in (("both", ("model.embed_tokens", "lm_head")), ("head", ("lm_head",))):
        model = engine.read_model(graph)
        quantize(model, dict.fromkeys(plan, form))
        (tmp_path / name).mkdir()
        engine.write_models({"model.onnx": model}, tmp_path / name)
        sizes[name] = (tmp_path / name / engine.DATA).stat().st_size
    assert sizes["head"] - sizes["both"] == 272 * 64 * 4  # the fp32 table goes, and its 8-bit form costs nothing


def test_a_graph_that_is_no_onnx_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / engine.MODEL).write_bytes(b"\xff not a graph")
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx cannot be read"):
        engine.read_model(tmp_path)


def test_a_graph_whose_data_is_too_short_is_corrupt(tmp_path: Path) -> None:
    engine.write_models({"model.onnx": linear(normal(32, 32))}, tmp_path)
    (tmp_path / engine.DATA).write_bytes(b"short")
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx cannot be read"):
        engine.read_model(tmp_path)


def test_a_graph_that_the_engine_refuses_does_not_open(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph", layers=1, tasks=("generate",))
    model = engine.read_model(graph)
    next(node for node in model.graph if node.name == "lm_head").op_type = "NoSuchOperator"
    ir.save(model, graph / engine.MODEL)
    with pytest.raises(CorruptArtifactError, match="does not load"):
        engine.open_folder(graph)
