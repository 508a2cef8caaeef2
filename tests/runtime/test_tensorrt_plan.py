"""plan.json: what is read back, which machines a plan runs on, and hostile files."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.runtime import tensorrt_api, tensorrt_session
from slmdeploy.runtime.cuda_device import Gpu
from slmdeploy.runtime.tensorrt_plan import PLAN, RECIPE, Machine, Phase, Recipe, mismatch, read_recipe
from slmdeploy.runtime.tensorrt_session import PlanSession, not_here, runs_here, unavailable

MADE = Recipe(
    module="tensorrt_rtx",
    version="1.7.1",
    compute_capabilities=("8.9", "12.0"),
    driver=None,
    graph_sha256="0" * 64,
    phases=(Phase("prefill", {"input_ids": ((1, 1), (1, 8), (1, 32))}),),
    capacity=None,
    workspace_bytes=1 << 30,
    level=None,
    options=(),
)
HERE = Machine("1.7.1", "8.9", 13000)


def written(folder: Path, **changes: Any) -> Path:
    content = MADE.to_json() | changes
    (folder / RECIPE).write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path)) == MADE


@pytest.mark.parametrize(
    ("recipe", "here", "reason"),
    [
        ({}, {}, None),
        ({}, {"compute_capability": "12.0"}, None),
        ({}, {"version": "1.8.0"}, "was compiled by TensorRT for RTX 1.7.1, and TensorRT for RTX 1.8.0 is installed"),
        ({}, {"compute_capability": "8.6"}, "for compute capability 8.9 or 12.0, and the GPU here has 8.6"),
        ({"driver": 13010}, {}, "with a driver of CUDA 13.1, and the one here is of 13.0"),
        ({"driver": 12080}, {}, None),
        ({"options": ("version-compatible",)}, {"version": "1.8.0"}, None),
        ({"options": ("hardware-compatible",)}, {"compute_capability": "9.0"}, None),
        ({"options": ("hardware-compatible",)}, {"compute_capability": "7.5"}, "the GPU here has 7.5"),
    ],
)
def test_a_plan_of_another_machine_is_recognised(
    recipe: dict[str, Any], here: dict[str, Any], reason: str | None
) -> None:
    found = mismatch(replace(MADE, **recipe), replace(HERE, **here))
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format must be an integer from 1 to 1"),
        ("module", "os", "module must be one of tensorrt, tensorrt_rtx"),
        ("compute_capabilities", [], "compute_capabilities must be a list"),
        ("compute_capabilities", ["8.x"], "compute_capabilities must be a list of numbers such as 8.9"),
        ("driver", -1, "driver must be an integer"),
        ("phases", [], "phases must be a list"),
        ("phases", [{"name": "p", "shapes": {"x": [[1], [2]]}}], "must be a list of three shapes"),
        ("phases", [{"name": "p", "shapes": {"x": [[1], [2], [-3]]}}], "must be a list of three shapes"),
        ("phases", [{"name": "p", "shapes": {}, "run": "rm"}], "the key phases.0.run is not known"),
        ("version", "absent", "the key version is missing"),
        ("command", "rm", "the key command is not known"),
    ],
)
def test_a_hostile_recipe_is_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(CorruptArtifactError, match=message):
        read_recipe(written(tmp_path, **{key: value}))


def test_a_plan_without_its_compiler_is_refused_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(tensorrt_api, "import_module", absent)
    folder = written(tmp_path, module="tensorrt")
    assert "pip install tensorrt" in (unavailable(folder) or "")
    with pytest.raises(InputError, match="cannot be run here: TensorRT cannot be used here"):
        PlanSession(folder)


def test_a_gpu_that_the_plan_is_not_for_is_refused_and_no_gpu_runs_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path)
    assert not runs_here(folder)  # there is no plan
    assert "was not compiled" in (not_here(folder) or "")
    (folder / PLAN).write_bytes(b"plan")
    monkeypatch.setattr(tensorrt_session, "find_gpu", lambda: None)
    assert not runs_here(folder)
    monkeypatch.setattr(tensorrt_session, "find_gpu", lambda: Gpu("8.6", 13000))
    monkeypatch.setattr(tensorrt_session, "load", lambda name: SimpleNamespace(__version__="1.7.1"))
    with pytest.raises(InputError, match=r"its plan was compiled for compute capability .* and the GPU here has 8\.6"):
        runs_here(folder)
    monkeypatch.setattr(tensorrt_session, "find_gpu", lambda: Gpu("8.9", 13000))
    assert runs_here(folder)
    assert not_here(folder) is None
