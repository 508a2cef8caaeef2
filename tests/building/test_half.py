"""A graph in float16: what changes type, what stays float32 between casts, and that it still computes the same."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from slmdeploy.building.half import to_half
from slmdeploy.exporting.export import export
from tests.building.small import constant, model_of, normal, relative_error, run
from tests.exporting.families import CASES, write_case

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def decoder(folder: Path, case: str, opset: int) -> ir.Model:
    write_case(CASES[case], folder / "checkpoint")
    options: dict[str, Any] = {"tasks": ("generate",), "dialect": "portable", "opset": opset, "parity": False}
    graph = export(folder / "checkpoint", out=folder / "graph", max_length=CASES[case].max_length, **options)
    model = ir.load(graph.path / "model.onnx")
    ir.external_data.load_to_model(model)
    return model


def types(model: ir.Model, operator: str) -> set[ir.DataType]:
    """Types of the floating outputs of all nodes of an operator."""
    outputs = [value.dtype for node in model.graph if node.op_type == operator for value in node.outputs]
    return {dtype for dtype in outputs if dtype in (HALF, FLOAT)}


@pytest.mark.parametrize("opset", [21, 23])
def test_linear_layers_attention_and_cache_are_float16_and_logits_are_not(tmp_path: Path, opset: int) -> None:
    model = decoder(tmp_path, "llama-gqa", opset)
    to_half(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert types(model, "MatMul") == {HALF}
    assert types(model, "Softmax" if opset == 21 else "Attention") == {HALF}
    found = {value.name: value.dtype for value in [*model.graph.inputs, *model.graph.outputs]}
    assert found["logits"] == FLOAT
    assert {dtype for name, dtype in found.items() if name and name.startswith(("past", "present"))} == {HALF}
    assert found["input_ids"] == ir.DataType.INT64
    weights = {value.dtype for name, value in model.graph.initializers.items() if "proj.weight" in name}
    assert weights == {HALF}


def test_the_mean_of_squares_of_a_norm_stays_float32(tmp_path: Path) -> None:
    model = decoder(tmp_path, "llama-gqa", 21)
    to_half(model)
    assert types(model, "ReduceMean") == types(model, "Sqrt") == {FLOAT}


def test_angles_that_the_graph_computes_stay_float32(tmp_path: Path) -> None:
    model = decoder(tmp_path, "llama-dynamic", 21)
    to_half(model)
    assert types(model, "Cos") == types(model, "Sin") == types(model, "Pow") == {FLOAT}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_numbers_are_those_of_float16_and_a_constant_beyond_it_becomes_its_largest() -> None:
    weight = normal(32, 16)
    weight[0, 0] = 1e6
    source = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["rows", 32]))
    stored = constant("weight", weight)
    node = ir.node("MatMul", [source, stored], name="layer")
    node.outputs[0].name, node.outputs[0].type = "y0", ir.TensorType(FLOAT)
    model = model_of([node], source, [stored])
    to_half(model)
    x = normal(4, 32)
    x[:, 0] = 0
    (found,) = run(model, x)
    assert found.dtype == np.float32
    assert 0 < relative_error(found, x @ weight) < 2e-3
    kept = next(value for name, value in model.graph.initializers.items() if name == "weight.half")
    assert kept.const_value is not None
    assert kept.const_value.numpy().max() == np.finfo(np.float16).max
