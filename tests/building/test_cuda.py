"""Builds for ONNX Runtime's CUDA provider: made and judged here, refused where the provider is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from pydantic import ValidationError

from slmdeploy.artifacts import Artifact
from slmdeploy.building.build import build
from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.exporting.export import export
from slmdeploy.profiling.facts import read_facts
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.cuda_cache import DeviceKvCache
from slmdeploy.runtime.model import load
from slmdeploy.specs import Gate, Profile, SessionOptions, load_profile, load_target
from tests.exporting.families import CASES, write_case

OPEN = Gate(max_kl=10.0, min_top1=0.0, max_ppl_ratio=10.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_case(CASES["llama-gqa"], folder)
    return folder


@pytest.fixture(scope="module")
def graph(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graph") / "graph"
    return export(checkpoint, out=out, tasks=("generate",), parity=False).path


@pytest.fixture(scope="module", params=["cuda-fp16", "cuda-int4"])
def built(request: pytest.FixtureRequest, graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    session = SessionOptions(threads=1, spinning=False)
    profile = load_profile(request.param).model_copy(update={"session": session, "gate": OPEN})
    folder = tmp_path_factory.mktemp("built")
    letters = np.random.default_rng(0).integers(97, 123, (4, 60)).astype(np.uint8)
    lines = [
        json.dumps({"prompt": row[:20].tobytes().decode(), "completion": row.tobytes().decode()}) for row in letters
    ]
    data = folder / "data"
    data.mkdir()
    for split, part in (("train", lines[:2]), ("valid", lines[2:])):
        (data / f"generate.{split}.jsonl").write_text("\n".join(part) + "\n")
    target = load_target("nvidia-hopper-sm90")
    return build(graph, profile=profile, target=target, data=data, out=folder / "build")


def test_the_graph_is_float16_with_the_operators_of_the_provider(built: Artifact) -> None:
    model = ir.load(built.path / "model.onnx")
    operators = {node.op_type for node in model.graph}
    four_bits = built.plan["profile"]["name"] == "cuda-int4"
    assert "GroupQueryAttention" in operators
    assert ("MatMulNBits" in operators) == four_bits
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    assert past.dtype == ir.DataType.FLOAT16
    assert not (built.path / "standard.onnx").exists()
    runtime = read_runtime(built.path)
    assert (runtime.provider, runtime.cache) == ("cuda", "float16")
    assert runtime.precision == ("int4 block 32" if four_bits else "fp16")


def test_it_was_judged_by_its_numbers_and_says_that_no_gpu_ran_it(built: Artifact) -> None:
    result = built.result
    assert result["passed"]
    assert result["speed"] is None
    assert result["verification"]["summary"] == "executed on CPU (numerics), not executed on GPU"
    if not result["parts"]:
        assert 0 < result["quality"]["kl"] < 1e-4


def test_without_the_provider_it_is_refused_in_a_sentence(built: Artifact) -> None:
    with pytest.raises(InputError, match=r"runs on an NVIDIA GPU.*no CUDA provider: install onnxruntime-gpu instead"):
        load(built.path).logits([1, 2, 3])


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_not_replaced_by_the_cpu(built: Artifact, monkeypatch: Any) -> None:
    # An onnxruntime-gpu without CUDA's libraries lists the provider and then leaves everything to the CPU.
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: listed)
    with pytest.raises(InputError, match="CUDA provider does not start here"):
        load(built.path).logits([1, 2, 3])


def test_its_estimate_is_that_of_a_compiled_build(built: Artifact) -> None:
    facts = read_facts(built.path, "cuda")
    assert facts.compiled
    assert facts.cache_number_bytes == 2


def test_another_dialect_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    portable = export(checkpoint, out=tmp_path / "g", tasks=("generate",), dialect="portable", parity=False).path
    with pytest.raises(InputError, match="--dialect ort --task generate"):
        build(portable, profile=load_profile("cuda-fp16"), out=tmp_path / "build")
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("change", [{"compute": "fp32"}, {"weights": {"scheme": "w8a8", "bits": 8}}, {"smooth": True}])
def test_profiles_that_say_what_the_engine_has_not(change: dict[str, Any]) -> None:
    fields = {"name": "p", "summary": "s", "engine": "cuda", "compute": "fp16", "weights": {"scheme": "fp32"}}
    assert Profile.model_validate(fields).compute == "fp16"
    with pytest.raises(ValidationError, match="engine = 'cuda'"):
        Profile.model_validate(fields | change)


def test_an_unknown_provider_is_refused(graph: Path, tmp_path: Path) -> None:
    runtime = json.loads((graph / "runtime.json").read_text())
    (tmp_path / "runtime.json").write_text(json.dumps(runtime | {"provider": "rocm"}))
    with pytest.raises(CorruptArtifactError, match="provider must be one of cpu, cuda"):
        read_runtime(tmp_path)


def test_a_cache_on_the_device_refuses_more_than_the_context(graph: Path) -> None:
    config = read_runtime(graph)
    cache = DeviceKvCache(config)
    with pytest.raises(InputError, match=f"holds {config.max_length}"):
        cache.reserve(config.max_length + 1)
    assert cache.size_bytes == 0
