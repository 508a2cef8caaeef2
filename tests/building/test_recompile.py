"""The verb `recompile`: a plan that does not fit is made anew of the shipped graph, and what has no plan is refused."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from slmdeploy.artifacts import Artifact, open_artifact
from slmdeploy.building import recompile as recompiling
from slmdeploy.building.build import build
from slmdeploy.building.recompile import recompile
from slmdeploy.errors import CorruptArtifactError, InputError, OutputExistsError
from slmdeploy.exporting.export import export
from slmdeploy.runtime.cuda_device import Gpu
from slmdeploy.runtime.tensorrt_plan import PLAN, RECIPE, Machine, Phase, Recipe, mismatch, read_recipe
from slmdeploy.specs import Gate, SessionOptions, load_profile, load_target, named_workload
from tests.exporting.families import CASES, write_case

OPEN = Gate(max_kl=10.0, min_top1=0.0, max_ppl_ratio=10.0)
OLD = "1.0.0"


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that was left to be compiled: TensorRT needs its GPU, which is not here."""
    folder = tmp_path_factory.mktemp("uncompiled")
    write_case(CASES["llama-gqa"], folder / "checkpoint")
    graph = export(
        folder / "checkpoint", out=folder / "graph", tasks=("generate",), dialect="portable", opset=23, parity=False
    )
    profile = load_profile("tensorrt-fp16")
    profile = profile.model_copy(update={"session": SessionOptions(threads=1, spinning=False), "gate": OPEN})
    workload = named_workload("generate-48-16")
    return build(graph.path, profile=profile, workload=workload, out=folder / "build").path


@pytest.fixture
def outdated(uncompiled: Path, tmp_path: Path) -> Path:
    """The same for TensorRT for RTX, with the plan of an older version in it."""
    folder = tmp_path / "outdated"
    folder.mkdir()
    for file in uncompiled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    phases = (Phase("prefill", {"input_ids": ((1, 1), (1, 48), (1, 192))}),)
    recipe = Recipe("tensorrt_rtx", OLD, ("8.9",), None, "0" * 64, phases, None, 1 << 30, None, ())
    (folder / RECIPE).write_text(json.dumps(recipe.to_json()))
    (folder / PLAN).write_bytes(b"a plan of another version")
    return signed(folder, {"module": "tensorrt_rtx", "workspace_bytes": 1 << 30})


def signed(folder: Path, compiler: dict[str, object]) -> Path:
    """The folder with a manifest that has the hashes of its files, and this compiler in its profile."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["plan"]["profile"]["compiler"] = compiler
    files = [file for file in sorted(folder.iterdir()) if file.name != "manifest.json"]
    manifest["files"] = {
        file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
        for file in files
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_a_plan_of_another_version_is_made_anew_and_the_old_build_stays(outdated: Path, tmp_path: Path) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    before, here = content(outdated), Machine(rtx.__version__, "8.9", 13000)
    assert "was compiled by TensorRT for RTX 1.0.0" in (mismatch(read_recipe(outdated), here) or "")
    made = recompile(outdated, out=tmp_path / "new")
    recipe = read_recipe(made.path)
    assert mismatch(recipe, here) is None
    assert [phase.name for phase in recipe.phases] == ["prefill", "decode"]
    assert recipe.phases[0].shapes["input_ids"] == ((1, 1), (1, 48), (1, 192))
    assert (made.path / PLAN).stat().st_size > 10_000
    after = content(made.path)
    assert content(outdated) == before
    assert all(after[name] == before[name] for name in before if name not in (PLAN, RECIPE, "manifest.json"))
    _says_what_was_done(made, outdated, rtx.__version__)
    with pytest.raises(OutputExistsError):
        recompile(outdated, out=tmp_path / "new")


def _says_what_was_done(made: Artifact, old: Path, version: str) -> None:
    result = made.result
    assert result["gates"] == open_artifact(old).result["gates"]
    assert result["compiled"]["fused_attentions"] == 6
    ladder = result["verification"]
    assert ladder["summary"] == (
        f"compiled (TensorRT for RTX {version}), executed on CPU (numerics), not executed on GPU"
    )
    assert ladder["compiled"].startswith(f"TensorRT for RTX {version}, ahead of time, without a GPU, for 8.9")
    assert made.inputs["build"]["content_key"] == open_artifact(old).content_key


def test_what_for_is_the_target_else_the_gpu_here_else_what_the_old_plan_was_for(
    outdated: Path, uncompiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompiling, "find_gpu", lambda: None)
    old = open_artifact(outdated)
    assert recompiling._capabilities(old, None) == ("8.9",)
    with pytest.raises(InputError, match="has no plan yet and there is no GPU here: name what to compile for"):
        recompiling._capabilities(open_artifact(uncompiled), None)
    monkeypatch.setattr(recompiling, "find_gpu", lambda: Gpu("12.0", 13000))
    assert recompiling._capabilities(old, None) == ("12.0",)
    assert recompiling._capabilities(old, load_target("nvidia-ampere-sm86")) == ("8.6",)
    with pytest.raises(InputError, match="is no NVIDIA GPU"):
        recompiling._capabilities(old, load_target("x86-64-avx2"))


def test_a_compute_capability_that_the_compiler_has_not_is_refused_and_nothing_is_written(
    outdated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(__version__="1.7.1", ComputeCapability=SimpleNamespace(SM89=89))
    monkeypatch.setattr(recompiling, "load", lambda name: module)
    with pytest.raises(InputError, match=r"does not compile for compute capability 9\.0"):
        recompile(outdated, out=tmp_path / "new", target=load_target("nvidia-hopper-sm90"))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("compiler", "error", "message"),
    [
        (None, InputError, "is no build for TensorRT's compiler"),
        ({"module": "tensorrt", "through": "onnxruntime"}, InputError, "is compiled by ONNX Runtime when it is opened"),
        ({"module": "os"}, CorruptArtifactError, "the plan in its manifest cannot be read"),
    ],
)
def test_what_has_no_graph_for_a_compiler_is_refused(
    outdated: Path, tmp_path: Path, compiler: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        recompile(signed(outdated, compiler), out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_changed_graph_is_not_compiled(outdated: Path, tmp_path: Path) -> None:
    with (outdated / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptArtifactError):
        recompile(outdated, out=tmp_path / "new")
