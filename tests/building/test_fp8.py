"""fp8.py: codes are those of ONNX Runtime bit for bit, layers those of ml_dtypes; rules for scales on known numbers."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from slmdeploy.building.fp8 import (
    E4M3,
    LARGEST,
    activation_scale,
    decode,
    encode,
    fp8_product,
    half_scale,
    quantize_linears,
    weight_scale,
)
from slmdeploy.building.quantize import parts
from slmdeploy.specs import Fp8
from tests.building.small import Array, constant, linear, model_of, normal, relative_error

TENSOR, CHANNEL = Fp8(per_channel=False), Fp8(per_channel=True)


def run_as_written(model: ir.Model, x: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    content = ir.to_proto(model).SerializeToString()
    outputs: list[Array] = onnxruntime.InferenceSession(content, options).run(None, {"x": x})
    return outputs


def counted(values: Array) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.bincount(values.astype(np.float16).view(np.uint16).ravel(), minlength=1 << 16)


def all_halves() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Every float16 number that is one, and what is beyond FP8 on either side."""
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32)
    return halves[np.isfinite(halves)]


@pytest.mark.parametrize("scale", [1.0, 0.01, 3.7])
def test_codes_are_those_of_onnx_bit_for_bit(scale: float) -> None:
    x = all_halves()
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows"]))
    step, zero = constant("scale", np.asarray(scale, np.float32)), constant("zero", np.zeros((), E4M3))
    codes = ir.node("QuantizeLinear", [source, step, zero], name="q")
    back = ir.node("DequantizeLinear", [codes.outputs[0], step], name="dq")
    back.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    (found,) = run_as_written(model_of([codes, back], source, [step, zero]), x)
    np.testing.assert_array_equal(found, decode(encode(x, np.float32(scale)), np.float32(scale)))


def test_codes_saturate_and_never_become_no_number() -> None:
    codes = encode(np.array([1e9, -1e9, 448, 464, 0], np.float32), np.float32(1))
    np.testing.assert_array_equal(codes.astype(np.float32), [448, -448, 448, 448, 0])
    assert codes.dtype == ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize("form", [TENSOR, CHANNEL])
def test_a_layer_computes_what_ml_dtypes_does(form: Fp8) -> None:
    """x and W are small integers over powers of two, so every sum is exact in whatever order it is taken."""
    draw = np.random.default_rng(3)
    x = draw.integers(-8, 9, (5, 64)).astype(np.float32)
    weight = draw.integers(-8, 9, (64, 32)).astype(np.float32)
    weight[0] = 7 * np.float32(64)
    model = linear(weight)
    quantize_linears(model.graph, parts(model), {"x": np.float32(0.5)}, form)
    (found,) = run_as_written(model, x)
    scale = weight_scale(weight, form)
    assert scale.shape == ((32,) if form.per_channel else ())
    np.testing.assert_array_equal(scale, np.ones_like(scale))
    exact = (
        (x / np.float32(0.5)).astype(E4M3).astype(np.float32) * np.float32(0.5) @ weight.astype(E4M3).astype(np.float32)
    )
    np.testing.assert_array_equal(found, exact)


def test_layers_share_what_they_read_and_keep_their_names() -> None:
    weights, x = (normal(64, 32), normal(64, 48, seed=2)), normal(5, 64, seed=1)
    model = linear(*weights)
    quantize_linears(model.graph, parts(model), {"x": activation_scale(counted(x), "max")}, CHANNEL)
    operators = [node.op_type for node in model.graph]
    assert (operators.count("QuantizeLinear"), operators.count("DequantizeLinear")) == (1, 3)
    assert [node.name for node in model.graph if node.op_type == "MatMul"] == ["layer0", "layer1"]
    stored = {value.const_value.dtype for name, value in model.graph.initializers.items() if "weight_fp8" in name}  # type: ignore[union-attr]
    assert stored == {ir.DataType.FLOAT8E4M3FN}
    assert not any(name.endswith(".weight") for name in model.graph.initializers)
    for found, weight in zip(run_as_written(model, x), weights, strict=True):
        assert relative_error(found, x @ weight) < 0.05


def test_a_weight_scale_puts_the_largest_at_the_end_of_the_format() -> None:
    weight = normal(64, 32)
    weight[:, 3] = 0
    per_channel = weight_scale(weight, CHANNEL)
    assert per_channel[3] == 1
    np.testing.assert_allclose(np.delete(per_channel, 3) * LARGEST, np.delete(np.abs(weight).max(axis=0), 3), rtol=1e-6)
    assert weight_scale(weight, TENSOR) * LARGEST == pytest.approx(np.abs(weight).max(), rel=1e-6)
    assert np.isfinite(decode(encode(weight * np.float32(1e-42), s := weight_scale(weight * 0, TENSOR)), s)).all()


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_scale_of_least_error_is_never_worse(per_channel: bool) -> None:
    weight = normal(64, 32) ** 3
    largest, best = (
        weight_scale(weight, Fp8.model_validate({"weight_scale": rule, "per_channel": per_channel}))
        for rule in ("amax", "mse")
    )
    errors = [
        np.square(decode(encode(weight, scale), scale) - weight).sum(axis=0 if per_channel else None)
        for scale in (largest, best)
    ]
    assert (errors[1] <= errors[0]).all()
    assert not per_channel or (errors[1] < errors[0]).any()


def test_rules_for_activations_differ_by_how_much_a_rare_outlier_counts() -> None:
    counts = counted(normal(4000)) * 100_000 + counted(np.full(1, 500, np.float32))
    largest, percentile, best = (activation_scale(counts, rule) for rule in ("max", "percentile", "mse"))
    assert largest * LARGEST == pytest.approx(500)
    assert 3 < percentile * LARGEST < 5
    assert percentile < best <= largest
    assert activation_scale(counted(np.zeros(5, np.float32)), "mse") > 0
    for rule in ("max", "percentile", "mse"):
        assert activation_scale(counted(np.full(7, -2, np.float32)), rule) * LARGEST == pytest.approx(2, rel=1)


def test_scales_beside_float16_are_float16_and_never_too_small_for_it() -> None:
    scales = np.array([1e-9, 0.0123456, 3.0, 1e9], np.float32)
    found = half_scale(scales)
    assert found.dtype == np.float32
    assert np.array_equal(found, found.astype(np.float16).astype(np.float32))
    assert found[0] == np.finfo(np.float16).tiny
    assert found[1] == pytest.approx(0.0123456, rel=1e-3)
    assert found[3] == np.finfo(np.float16).max


def test_a_product_in_fp8_is_near_the_product_and_not_it() -> None:
    random = np.random.default_rng(0)
    rows, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((8, 64), (64, 32)))
    exact, found = rows @ weight, fp8_product(rows, weight)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.06
