"""Rows of builds for GPU compilers: the roofline's arithmetic, what rows say of themselves, and refusals."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from slmdeploy.building.fp8 import half_scale, quantize_linears
from slmdeploy.building.half import to_half
from slmdeploy.building.onnxruntime import copy_companions, read_model, write_models, write_runtime
from slmdeploy.building.quantize import EMBEDDING, parts
from slmdeploy.errors import InputError
from slmdeploy.exporting.export import export
from slmdeploy.profiling import compiled_estimate
from slmdeploy.profiling.estimate import estimate
from slmdeploy.profiling.facts import read_facts
from slmdeploy.profiling.runs import request_of
from slmdeploy.selection import read_rows
from slmdeploy.specs import Fp8, Target, load_target
from slmdeploy.specs.workloads import named_workload
from tests.exporting.families import CASES, write_case
from tests.graphs import write_manifest

WORKLOAD = named_workload("generate-16-5")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with FP8 linear layers and a float16 cache; no plan, which nothing here would read."""
    folder = tmp_path_factory.mktemp("fp8")
    write_case(CASES["llama-gqa"], folder / "checkpoint")
    graph = export(
        folder / "checkpoint", out=folder / "graph", tasks=("generate",), dialect="portable", opset=23, parity=False
    ).path
    model = read_model(graph)
    layers = {name: node for name, node in parts(model).items() if name != EMBEDDING}
    scales = {str(node.inputs[0].name): np.float32(1) for node in layers.values() if node.inputs[0] is not None}
    quantize_linears(model.graph, layers, scales, Fp8(), half_scale)
    to_half(model)
    out = folder / "build"
    out.mkdir()
    copy_companions(graph, out)
    write_runtime(graph, out, cache="float16", numerics_only=True)
    write_models({"model.onnx": model}, out)
    write_manifest(out)
    return out


def fp8_bytes(build: Path) -> int:
    weights = ir.load(build / "model.onnx").graph.initializers.values()
    return sum(value.const_value.size for value in weights if value.dtype == ir.DataType.FLOAT8E4M3FN and
               value.const_value is not None and len(value.const_value.shape) == 2)  # fmt: skip


def test_a_step_takes_the_bytes_of_weights_and_keys_over_half_the_bandwidth(build: Path) -> None:
    facts, target = read_facts(build, "fp8"), load_target("nvidia-ada-sm89")
    assert facts.compiled
    assert facts.kv_bytes_per_token == 2 * 2 * 3 * 2 * 16
    assert facts.graphs["steps"].weight_bytes == fp8_bytes(build)
    request = request_of(WORKLOAD, facts, 1)
    _, later = compiled_estimate.request_seconds(request, facts, target)
    keys = sum(run.times * run.keys for run in request.later) * facts.kv_bytes_per_token
    moved = 4 * fp8_bytes(build) + keys
    assert later == pytest.approx(moved / 864e9 / compiled_estimate.REACHED)


def test_long_prompts_are_bound_by_the_peak_of_fp8(build: Path) -> None:
    facts, ada = read_facts(build, "fp8"), load_target("nvidia-ada-sm89")
    request = request_of(named_workload("generate-150-2"), facts, 1)
    slow = ada.model_copy(update={"peak_ops": ada.peak_ops | {"fp8": ada.peak_ops["fp8"] / 1e6}})
    (before, _), (after, _) = (compiled_estimate.request_seconds(request, facts, one) for one in (ada, slow))
    assert after > 100 * before


def test_a_row_says_that_nothing_was_measured_and_select_reads_it(build: Path, tmp_path: Path) -> None:
    out = estimate([build], target=load_target("nvidia-ada-sm89"), workloads=[WORKLOAD], out=tmp_path / "e.json")
    (row,) = json.loads(out.read_text())["rows"]
    assert row["source"] == "estimated"
    assert "assumed to reach half" in row["basis"]
    assert "nothing of it was measured" in row["basis"]
    low, high = row["intervals"]["tpot_ms_p50"]
    assert (low, high) == pytest.approx((row["metrics"]["tpot_ms_p50"] / 2, row["metrics"]["tpot_ms_p50"] * 2))
    (read,) = read_rows(out)
    assert read.source == "estimated"


def test_a_target_without_fp8_figures_is_refused(build: Path, tmp_path: Path) -> None:
    ampere: Target = load_target("nvidia-ampere-sm80")
    with pytest.raises(InputError, match=r"'nvidia-ampere-sm80' states no peak_ops\.fp8, so nothing is estimated"):
        estimate([build], target=ampere, workloads=[WORKLOAD], out=tmp_path / "e.json")
