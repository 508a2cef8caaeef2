"""rounding.py: which method a form takes, each layer and form rounded once, columns of 8 bits as W8A8 has them."""

import numpy as np
import pytest

from slmdeploy.building.rounding import Rounding, method_for
from slmdeploy.building.w8a8 import quantize_columns
from slmdeploy.specs import Weights
from tests.building.test_gptq import Floats, correlated, weights


def test_4_bits_are_rounded_by_gptq_and_8_to_the_nearest_unless_a_method_is_named() -> None:
    assert [method_for(None, bits) for bits in (4, 8)] == ["gptq", "nearest"]
    assert [method_for("quantease", bits) for bits in (4, 8)] == ["quantease"] * 2


def test_a_layer_is_rounded_once_for_each_form_and_only_four_bits_ask_for_moments() -> None:
    asked = []

    def moments(value: str) -> Floats:
        asked.append(value)
        return np.eye(32, dtype=np.float32)

    rounding, weight = Rounding(moments), weights(32, 8)
    four, eight = (Weights(scheme="weight-only", bits=bits, block_size=32) for bits in (4, 8))
    first = rounding("layer", "x", weight, four)
    assert rounding("layer", "x", weight, four) is first
    assert rounding("layer", "x", weight, eight).values.shape == (8, 1, 32)
    assert asked == ["x"]


def test_columns_in_8_bits_are_nearer_where_it_counts_and_rounded_once() -> None:
    seen = correlated(512, 64)
    asked = []

    def moments(value: str):
        asked.append(value)
        return seen.T @ seen

    weight = np.ascontiguousarray(weights(24, 64).T)
    errors = {}
    for method in ("nearest", "gptq", "quantease"):
        rounding = Rounding(moments, method)
        values, scales = rounding.columns("layer", "x", weight)
        assert values.dtype == np.int8
        assert rounding.columns("layer", "x", weight)[0] is values or method == "nearest"
        errors[method] = np.linalg.norm(seen @ (values * scales - weight))
    assert errors["quantease"] < errors["gptq"] < errors["nearest"]
    assert asked == ["x", "x"]
    np.testing.assert_array_equal(Rounding(moments).columns("layer", "x", weight)[0], quantize_columns(weight)[0])


def test_blocks_of_8_bits_take_a_method_only_when_it_is_named() -> None:
    seen, weight = correlated(256, 64), np.ascontiguousarray(weights(8, 64).T)
    eight = Weights(scheme="weight-only", bits=8, block_size=32)
    alone = Rounding(lambda value: pytest.fail("no moments are needed"))("layer", "x", weight, eight)
    found = Rounding(lambda value: seen.T @ seen, "quantease")("layer", "x", weight, eight)
    assert not np.array_equal(alone.values, found.values)
