"""CPUs that this machine is not: builds run under qemu's emulation of AVX2 without VNNI, and of SSE4 alone.

Slow, and skipped where qemu-x86_64 (Debian: qemu-user) is not installed. qemu has no AVX-512, so AVX-512 without VNNI,
AVX-VNNI alone and AMX alone are not covered here.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.building.onnxruntime import open_folder, read_model, write_folder
from slmdeploy.building.quantize import plan_for, quantize
from slmdeploy.specs import SessionOptions, Weights, load_profile
from tests.building.small import Array, linear, normal, relative_error, write_graph
from tests.graphs import write_manifest

QEMU = shutil.which("qemu-x86_64")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed (qemu-user)")]
CPUS = ("Haswell", "Nehalem")
RUN_FOLDER = """
import sys, numpy
from slmdeploy.runtime.model import load
numpy.save(sys.argv[2], load(sys.argv[1], threads=1, verify=False).logits(range(3, 33)))
"""
RUN_GRAPH = """
import sys, numpy
from pathlib import Path
from slmdeploy.runtime.session import open_session
x = numpy.load(sys.argv[1] + ".npy")
numpy.save(sys.argv[2], open_session(Path(sys.argv[1]), threads=1, spinning=False).run(None, {"x": x})[0])
"""


def emulated(cpu: str, program: str, argument: Path, result: Path) -> Array:
    assert QEMU is not None
    command = [QEMU, "-cpu", cpu, sys.executable, "-c", program, str(argument), str(result)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    found: Array = np.load(result)
    return found


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int8", "cpu-int8-weight", "cpu-int4"])
def test_a_build_gives_the_logits_that_it_gives_here(tmp_path: Path, cpu: str, name: str) -> None:
    graph, profile = write_graph(tmp_path / "graph"), load_profile(name)
    model = read_model(graph)
    quantize(model, plan_for(profile, model))
    (tmp_path / "build").mkdir()
    write_folder(model, graph, tmp_path / "build", precision="x", session=SessionOptions())
    write_manifest(tmp_path / "build", kind="build")
    here = open_folder(tmp_path / "build").logits(range(3, 33))
    found = emulated(cpu, RUN_FOLDER, tmp_path / "build", tmp_path / "logits.npy")
    assert relative_error(found, here) < 0.02


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("scheme", ["w8a8", "weight-only"])
def test_the_largest_products_do_not_saturate(tmp_path: Path, cpu: str, scheme: str) -> None:
    """Pairs of 255 × 127 leave 16 bits, which AVX2 adds them in: without our session option these are off by 97 %."""
    weight = np.sign(normal(128, 32)).astype(np.float32)
    x = np.abs(normal(4, 128, seed=1)) + np.float32(3)
    model = linear(weight)
    quantize(model, {"layer0": Weights.model_validate({"scheme": scheme, "bits": 8})})
    ir.save(model, tmp_path / "graph.onnx")
    np.save(tmp_path / "graph.onnx.npy", x)
    found = emulated(cpu, RUN_GRAPH, tmp_path / "graph.onnx", tmp_path / "y.npy")
    assert relative_error(found, x @ weight) < 0.01
