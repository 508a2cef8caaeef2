"""Builds of a recipe for GPUs that are not here: refused beforehand, made and estimated once, labelled, and resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from slmdeploy import pipeline
from slmdeploy.artifacts import open_artifact
from slmdeploy.elsewhere import build_elsewhere, wanted
from slmdeploy.errors import InputError
from slmdeploy.profiling import profile as profiling
from slmdeploy.profiling.measure import Effort
from slmdeploy.progress import SILENT
from slmdeploy.specs import Candidates, load_target, named_workload
from tests.exporting.families import CASES, write_case
from tests.worlds import RECIPE, tiny_project

HERE = load_target("x86-64-avx2")
CPU, GPU = ["cpu-int8"], "nvidia-hopper-sm90"


def candidates(target: str, *profiles: str, local: list[str] = CPU) -> Candidates:
    asked = [{"target": target, "profiles": list(profiles)}]
    return Candidates.model_validate({"profiles": local, "elsewhere": asked})


def test_what_is_asked_for_is_loaded() -> None:
    (one,) = wanted(candidates(GPU, "cuda-fp16", "tensorrt-fp8"), HERE)
    assert (one.target.name, [profile.name for profile in one.profiles]) == (GPU, ["cuda-fp16", "tensorrt-fp8"])
    assert wanted(Candidates(profiles=("cpu-int8",)), HERE) == ()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (candidates(HERE.name, "cuda-fp16"), "which is this machine: list it in profiles"),
        (candidates(GPU, "cpu-int4"), r"'cpu-int4' of the engine onnxruntime, whose builds run on a CPU"),
        (candidates(GPU, "cuda-fp16", local=["cuda-fp16"]), "is in candidates.profiles and in candidates.elsewhere"),
        (candidates("arm64-dotprod", "cuda-fp16"), "needs the engine cuda, which target 'arm64-dotprod' does not have"),
        (candidates("nvidia-hoper", "cuda-fp16"), "nvidia-hopper-sm90"),
        (candidates(GPU, "cuda-fp17"), "cuda-fp16"),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_work(asked: Candidates, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wanted(asked, HERE)


def test_a_target_that_the_compiler_has_not_is_refused_before_any_work() -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError, match=r"does not compile for compute capability 9\.0"):
        wanted(candidates(GPU, "tensorrt-rtx-fp8"), HERE)
    with pytest.raises(InputError, match=r"needs compute capability 8\.9 for FP8"):
        wanted(candidates("nvidia-ampere-sm86", "tensorrt-fp8"), HERE)


def test_a_target_stands_in_one_table() -> None:
    twice = [{"target": GPU, "profiles": ["cuda-fp16"]}] * 2
    with pytest.raises(ValidationError, match=f"elsewhere has the target '{GPU}' twice"):
        Candidates.model_validate({"profiles": CPU, "elsewhere": twice})


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    write_case(CASES["llama-gqa"], folder)
    letters = np.random.default_rng(0).integers(97, 123, (4, 60)).astype(np.uint8)
    for split, rows in (("train", letters[:2]), ("valid", letters[2:])):
        lines = [json.dumps({"prompt": "a", "completion": row.tobytes().decode()}) for row in rows]
        (folder / f"generate.{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run_once(student: Path, folder: Path, asked: Candidates) -> tuple[list[Path], list[pipeline.Step]]:
    steps = pipeline._Steps(pipeline.Outcome("r", folder), lambda text: None)
    files = build_elsewhere(
        wanted(asked, HERE),
        student,
        folder,
        tasks=("generate", "score"),
        workloads=[named_workload("score-64-4x8"), named_workload("generate-48-16")],
        data=student,
        steps=steps,
        progress=SILENT,
    )
    return files, steps.outcome.steps


def test_each_engine_has_its_graph_each_target_its_estimates_and_a_second_run_does_nothing(
    student: Path, tmp_path: Path
) -> None:
    asked = candidates(GPU, "cuda-fp16", "tensorrt-fp16")
    (file,), steps = run_once(student, tmp_path, asked)
    assert [step.name for step in steps] == [
        "export ort",
        "export portable",
        f"build cuda-fp16 for {GPU}",
        f"build tensorrt-fp16 for {GPU}",
        f"estimate {GPU} elsewhere",
    ]
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    assert [(row["build"], row["target"], row["source"]) for row in rows] == [
        ("cuda-fp16", GPU, "estimated"),
        ("tensorrt-fp16", GPU, "estimated"),
    ]
    assert all(set(row["workloads"]) == {"generate-48-16"} for row in rows)
    plan = open_artifact(tmp_path / "elsewhere" / GPU / "tensorrt-fp16").plan
    assert (plan["target"], plan["workload"]["name"]) == (GPU, "generate-48-16")
    again, repeated = run_once(student, tmp_path, asked)
    assert again == [file]
    assert all(step.reused for step in repeated)


@pytest.mark.slow
def test_a_plan_is_compiled_for_a_gpu_that_is_not_here_and_again_where_it_was_lost(
    student: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    asked = candidates("nvidia-ada-sm89", "tensorrt-rtx-fp8")
    run_once(student, tmp_path, asked)
    place = tmp_path / "elsewhere" / "nvidia-ada-sm89" / "tensorrt-rtx-fp8"
    assert open_artifact(place).result["compiled"]["compute_capabilities"] == ["8.9"]
    shutil.rmtree(place)
    _, steps = run_once(student, tmp_path, asked)
    made = [step.name for step in steps if not step.reused]
    assert made == ["build tensorrt-rtx-fp8 for nvidia-ada-sm89"]


@pytest.mark.slow
def test_a_recipe_takes_builds_for_another_gpu_into_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    effort = Effort(rounds=2, seconds=0.05, limit_s=0.1)
    real = profiling.profile
    monkeypatch.setattr(profiling, "profile", lambda *given, **options: real(*given, effort=effort, **options))
    (tmp_path / "project").mkdir()
    recipe = tiny_project(tmp_path / "project")
    table = f'[[candidates.elsewhere]]\ntarget = "{GPU}"\nprofiles = ["tensorrt-fp16", "cuda-fp16"]\n'
    recipe.write_text(RECIPE + table)
    outcome = pipeline.run(recipe, tmp_path / "run")
    assert outcome.selection is not None
    pairs = {(one.build, one.target, one.source) for one in outcome.selection.candidates}
    assert {("tensorrt-fp16", GPU, "estimated"), ("cuda-fp16", GPU, "estimated")} <= pairs
    assert "tensorrt-fp16" in Path(str(outcome.report)).read_text(encoding="utf-8")
    # Two bytes a weight are the smallest of these; what was chosen for elsewhere is not packaged.
    assert outcome.selection.chosen in ("tensorrt-fp16", "cuda-fp16")
    assert outcome.package is None
    assert made(pipeline.run(recipe, tmp_path / "run")) == []
    recipe.write_text(RECIPE)
    assert made(pipeline.run(recipe, tmp_path / "run")) == ["select", "package", "report"]


def made(outcome: pipeline.Outcome) -> list[str]:
    return [step.name for step in outcome.steps if not step.reused]
