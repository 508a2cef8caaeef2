"""Builds for ONNX Runtime's TensorRT providers: made and judged here, compiled where they are opened."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from pydantic import ValidationError

from slmdeploy.artifacts import Artifact
from slmdeploy.building import fp8_build
from slmdeploy.building.build import build
from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.exporting.export import export
from slmdeploy.profiling.facts import read_facts
from slmdeploy.runtime import standard
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import load
from slmdeploy.runtime.provider_options import FILE, read_options
from slmdeploy.runtime.session import open_session
from slmdeploy.runtime.standard import StandardDecoder
from slmdeploy.runtime.static import StaticDecoder
from slmdeploy.specs import Compiler, Gate, SessionOptions, load_profile, named_workload
from slmdeploy.verification import verify
from tests.exporting.families import CASES, write_case

OPEN = Gate(max_kl=10.0, min_top1=0.0, max_ppl_ratio=10.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_case(CASES["llama-gqa"], folder)
    return folder


def exported(checkpoint: Path, out: Path, opset: int) -> Path:
    made = export(checkpoint, out=out, tasks=("generate",), dialect="portable", opset=opset, parity=False)
    return made.path


@pytest.fixture(scope="module")
def graph(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(checkpoint, tmp_path_factory.mktemp("graph") / "graph", 23)


@pytest.fixture(scope="module", params=["tensorrt-fp16-ort", "tensorrt-rtx-fp8-ort"])
def built(request: pytest.FixtureRequest, graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    session = SessionOptions(threads=1, spinning=False)
    profile = load_profile(request.param).model_copy(update={"session": session, "gate": OPEN})
    folder = tmp_path_factory.mktemp("built")
    letters = np.random.default_rng(0).integers(97, 123, (4, 60)).astype(np.uint8)
    for split, rows in (("train", letters[:2]), ("valid", letters[2:])):
        lines = [json.dumps({"prompt": "a", "completion": row.tobytes().decode()}) for row in rows]
        (folder / f"generate.{split}.jsonl").write_text("\n".join(lines) + "\n")
    workload = named_workload("generate-48-16")
    return build(graph, profile=profile, data=folder, workload=workload, out=folder / "build")


def test_the_folder_names_the_provider_and_what_it_is_to_compile(built: Artifact) -> None:
    rtx = built.plan["profile"]["name"] == "tensorrt-rtx-fp8-ort"
    runtime, options = read_runtime(built.path), read_options(built.path)
    assert (runtime.provider, runtime.numerics_only) == ("tensorrt_rtx" if rtx else "tensorrt", False)
    assert [phase.name for phase in options.phases] == ["prefill", "decode"]
    assert options.phases[0].shapes["input_ids"] == ((1, 1), (1, 48), (1, 192))
    assert FILE in built.manifest["files"]
    assert "model.plan" not in built.manifest["files"]


def test_the_ladder_says_that_nothing_was_compiled_or_run_on_a_gpu(built: Artifact) -> None:
    assert built.result["passed"]
    ladder = verify(built.path)["verification"]
    assert ladder["summary"].endswith("not compiled, executed on CPU (numerics), not executed on GPU")
    assert "provider compiles it when it is opened" in ladder["compiled"]
    assert read_facts(built.path, "b").compiled


def test_without_the_provider_it_is_refused_and_nothing_is_cached(
    built: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLMDEPLOY_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"runs on an NVIDIA GPU and this ONNX Runtime has no TensorRT.* provider"):
        load(built.path).logits([1, 2, 3])
    assert not list(tmp_path.iterdir())


def test_prompts_and_steps_have_sessions_and_engines_of_their_own(
    built: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the provider's place: what is compiled for each phase, and that the numbers are those of one."""
    given: list[dict[str, Any]] = []

    def on_the_cpu(path: Path, *, provider: str, settings: Any = None, **options: Any) -> ort.InferenceSession:
        given.append({"provider": provider, "settings": settings} | options)
        return open_session(path, **options)

    config = read_runtime(built.path)
    exact = StandardDecoder(built.path, replace(config, provider="cpu", numerics_only=True), 1)
    monkeypatch.setenv("SLMDEPLOY_CACHE", str(tmp_path))
    for name, value in {"open_session": on_the_cpu, "require": lambda *given: None, "DEVICE": "cpu"}.items():
        monkeypatch.setattr(standard, name, value)
    decoder = StandardDecoder(built.path, config, 1)
    ids = np.arange(3, 12)
    np.testing.assert_array_equal(decoder.prefill(ids), exact.prefill(ids))
    for token in (5, 9):
        np.testing.assert_array_equal(decoder.step(token), exact.step(token))
    rows = [ids[:4], ids]
    np.testing.assert_allclose(decoder.batch(rows), exact.batch(rows), atol=0.05)
    prompts, steps = (one["settings"] for one in given)
    kind = "nv" if config.provider == "tensorrt_rtx" else "trt"
    assert [one["provider"] for one in given] == [config.provider] * 2
    assert all(one["as_written"] for one in given)
    assert prompts[f"{kind}_profile_max_shapes"].startswith("input_ids:1x192,")
    assert steps[f"{kind}_profile_max_shapes"].startswith("input_ids:1x1,attention_mask:1x192,")
    assert len(list((tmp_path / "engines").iterdir())) == 2


def test_a_static_cache_is_refused_before_the_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = exported(checkpoint, tmp_path / "graph", 24)
    monkeypatch.setattr(fp8_build, "Reference", None)  # what the work begins with
    with pytest.raises(InputError, match=r"has a static cache.*export it with --opset 23"):
        build(static, profile=load_profile("tensorrt-fp16-ort"), out=tmp_path / "build")
    with pytest.raises(InputError, match="has a static cache, which runs on a CPU alone"):
        StaticDecoder(static, replace(read_runtime(static), provider="cuda"), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interface": "shared", "provider": "tensorrt"}, '"cpu" or "cuda" where the interface is not "standard"'),
        ({"provider": "rocm"}, "provider must be one of cpu, cuda, tensorrt, tensorrt_rtx"),
    ],
)
def test_a_runtime_json_that_asks_for_what_no_provider_does(
    graph: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    runtime = json.loads((graph / "runtime.json").read_text())
    (tmp_path / "runtime.json").write_text(json.dumps(runtime | change))
    with pytest.raises(CorruptArtifactError, match=message):
        read_runtime(tmp_path)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"module": "tensorrt", "timing_cache": "t"}, "timing_cache"),
        ({"module": "tensorrt", "options": ["weight-streaming"]}, "options"),
        ({"module": "tensorrt_rtx", "level": 3}, "level"),
    ],
)
def test_what_a_provider_has_no_option_for_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=f"through = 'onnxruntime' with module = .* does not take {named}"):
        Compiler.model_validate(fields | {"through": "onnxruntime"})
    assert Compiler.model_validate({"module": "tensorrt", "through": "onnxruntime", "level": 3}).level == 3
