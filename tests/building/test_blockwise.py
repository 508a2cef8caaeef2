"""blockwise.py: codes against numpy, layouts against ONNX Runtime, and the search against plain rounding."""

import numpy as np
import pytest
from numpy.typing import NDArray

from slmdeploy.building.blockwise import Blocks, quantize_rows
from slmdeploy.building.quantize import quantize
from slmdeploy.specs import Weights
from tests.building.small import Array, embedding, linear, normal, relative_error, run

LIMITS = {8: 0.01, 4: 0.11}


def form(bits: int, block: int, symmetric: bool = True) -> Weights:
    return Weights.model_validate({"scheme": "weight-only", "bits": bits, "block_size": block, "symmetric": symmetric})


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.float32]:
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return packed[..., :count].astype(np.float32)


def dequantise(blocks: Blocks, bits: int, block: int, columns: int) -> NDArray[np.float32]:
    rows, count = blocks.scales.shape
    codes = unpack(blocks.values, bits, block)
    middle: Array = np.full((rows, count), 2 ** (bits - 1), np.float32)
    if blocks.zero_points is not None:
        middle = unpack(blocks.zero_points, bits, count)
    return ((codes - middle[..., None]) * blocks.scales[..., None]).reshape(rows, -1)[:, :columns]


def round_to_nearest(matrix: Array, block: int) -> Array:
    """Plain symmetric 4-bit rounding with the scale from each block's largest magnitude."""
    grouped = matrix.reshape(matrix.shape[0], -1, block)
    scales = np.abs(grouped).max(axis=-1, keepdims=True) / 7
    return (np.clip(np.rint(grouped / scales), -8, 7) * scales).reshape(matrix.shape)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_scales_and_zero_points_give_the_matrix_back(bits: int, symmetric: bool) -> None:
    matrix = normal(5, 96) + np.float32(0.3)
    blocks = quantize_rows(matrix, bits=bits, block_size=32, symmetric=symmetric)
    assert blocks.values.shape == (5, 3, 32 * bits // 8)
    assert blocks.scales.shape == (5, 3)
    assert (blocks.zero_points is None) == symmetric
    assert relative_error(dequantise(blocks, bits, 32, 96), matrix) < LIMITS[bits]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("width", "block"), [(128, 32), (96, 128), (100, 32), (36, 16)])
def test_the_operator_reads_the_layout_as_we_write_it(bits: int, symmetric: bool, width: int, block: int) -> None:
    x, weight = normal(3, width, seed=1), normal(width, 24)
    model = linear(weight)
    quantize(model, {"layer0": form(bits, block, symmetric)})
    blocks = quantize_rows(np.ascontiguousarray(weight.T), bits=bits, block_size=block, symmetric=symmetric)
    exact = x @ dequantise(blocks, bits, block, width).T
    (found,) = run(model, x)
    assert relative_error(found, exact) < 0.02  # the operator quantises its input to 8 bit
    assert relative_error(found, x @ weight) < LIMITS[bits] + 0.02


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("width", "block"), [(128, 32), (64, 128), (96, 64)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_quantised_embedding_gives_the_rows_of_the_table(
    bits: int, width: int, block: int, symmetric: bool
) -> None:
    table, ids = normal(20, width), np.array([3, 0, 19, 3])
    model = embedding(table)
    quantize(model, {"model.embed_tokens": form(bits, block, symmetric)})
    blocks = quantize_rows(table, bits=bits, block_size=block, symmetric=symmetric)
    (found,) = run(model, ids)
    np.testing.assert_allclose(found, dequantise(blocks, bits, block, width)[ids], rtol=1e-6)
    assert relative_error(found, table[ids]) < LIMITS[bits] + 0.02


def test_the_search_is_never_worse_than_plain_rounding_and_better_on_the_whole() -> None:
    matrix = normal(64, 128) ** 3
    searched = dequantise(quantize_rows(matrix, bits=4, block_size=32, symmetric=True), 4, 32, 128)
    errors = [((found - matrix) ** 2).reshape(64, 4, 32).sum(-1) for found in (searched, round_to_nearest(matrix, 32))]
    assert (errors[0] <= errors[1] * 1.0001).all()
    assert errors[0].sum() < 0.8 * errors[1].sum()


def test_a_block_with_an_outlier_does_not_hurt_the_others() -> None:
    matrix = normal(4, 128)
    matrix[1, 40] = 1e4
    back = dequantise(quantize_rows(matrix, bits=4, block_size=32, symmetric=True), 4, 32, 128)
    kept = np.delete(np.arange(128), np.s_[32:64])
    assert relative_error(back[:, kept], matrix[:, kept]) < LIMITS[4]
    assert back[1, 40] == pytest.approx(1e4, rel=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_of_zeros_and_of_one_value_are_exact(bits: int, symmetric: bool) -> None:
    matrix = np.zeros((3, 64), np.float32)
    matrix[1], matrix[2, :32] = 0.7, -2.5
    back = dequantise(quantize_rows(matrix, bits=bits, block_size=32, symmetric=symmetric), bits, 32, 64)
    np.testing.assert_allclose(back, matrix, rtol=1e-6)


def test_padding_adds_nothing_to_the_product() -> None:
    x, weight = normal(2, 33, seed=4), normal(33, 8) + np.float32(5)
    model = linear(weight)
    quantize(model, {"layer0": form(8, 32, symmetric=False)})
    assert relative_error(run(model, x)[0], x @ weight) < 0.02


def test_a_row_is_not_changed_by_its_neighbours() -> None:
    x, model = normal(5, 64), linear(normal(64, 32))
    x[3] *= 1000
    quantize(model, {"layer0": form(8, 32)})
    (together,) = run(model, x)
    alone = np.concatenate([run(model, row[None])[0] for row in x])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())
