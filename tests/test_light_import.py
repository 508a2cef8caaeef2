"""The command line and the device side start without torch, each proven in a process of its own.

tests/test_imports.py reads what modules say; this runs them, so that it also sees what other packages import.
"""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "accelerate", "onnx", "onnx_ir", "onnxscript", "jinja2")

PROBE = """
import importlib, json, sys
for name in sys.argv[2].split(","):
    importlib.import_module(name)
print(json.dumps([name for name in sys.argv[1].split(",") if name in sys.modules]))
"""


def loaded(watched: tuple[str, ...], *modules: str) -> list[str]:
    """Which of ``watched`` are in sys.modules of a fresh process after it has imported ``modules``."""
    command = [sys.executable, "-c", PROBE, ",".join(watched), ",".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_line_starts_with_neither_torch_nor_an_engine() -> None:
    assert loaded((*HEAVY, "onnxruntime", "numpy", "tokenizers"), "slmdeploy", "slmdeploy.cli") == []


@pytest.mark.parametrize(
    "modules",
    [
        ("slmdeploy.runtime.model",),
        ("slmdeploy.packaging.package", "slmdeploy.selection", "slmdeploy.artifacts", "slmdeploy.specs"),
        ("slmdeploy.profiling", "slmdeploy.profiling.hardware", "slmdeploy.profiling.worker"),
        ("slmdeploy.specs",),
    ],
)
def test_the_device_side_imports_neither_torch_nor_a_graph_library(modules: tuple[str, ...]) -> None:
    assert loaded(HEAVY, *modules) == []


def test_building_needs_graph_libraries_and_no_torch() -> None:
    assert "torch" not in loaded(HEAVY, "slmdeploy.building.build")


def test_the_probe_sees_what_is_imported() -> None:
    assert loaded(("json", "tomllib"), "tomllib") == ["json", "tomllib"]
