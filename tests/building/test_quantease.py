"""quantease.py: fewer errors than what it starts from, never more, with the same scales, in every layout."""

from itertools import pairwise

import numpy as np
import pytest

from slmdeploy.building import quantease
from slmdeploy.building.blockwise import pack, quantize_rows, unpack
from slmdeploy.building.gptq import compensated_rows, damped
from slmdeploy.building.quantease import descend
from tests.building.test_gptq import Floats, correlated, weights


def decoded(blocks, bits: int, width: int) -> Floats:
    rows, count = blocks.scales.shape
    codes = unpack(blocks.values, bits).reshape(rows, count, -1).astype(np.float32)
    middle = np.full((rows, count), 2 ** (bits - 1))
    points = middle if blocks.zero_points is None else unpack(blocks.zero_points, bits)[:, :count]
    return ((codes - points[..., None]) * blocks.scales[..., None]).reshape(rows, -1)[:, :width]


@pytest.mark.parametrize(
    ("bits", "width", "block", "symmetric"),
    [(4, 128, 32, True), (4, 150, 128, False), (4, 40, 64, False), (8, 96, 96, True)],
)
def test_outputs_are_nearer_than_by_gptq(bits: int, width: int, block: int, symmetric: bool) -> None:
    seen, unseen = np.split(correlated(2048, width), 2)
    matrix, moments = weights(48, width), seen.T @ seen
    start = compensated_rows(matrix, moments, bits=bits, block_size=block, symmetric=symmetric)
    found = descend(matrix, moments, start, bits=bits, block_size=block)
    before, after = (decoded(blocks, bits, width) - matrix for blocks in (start, found))
    assert np.linalg.norm(unseen @ after.T) < 0.97 * np.linalg.norm(unseen @ before.T)
    np.testing.assert_array_equal(found.scales, start.scales)
    np.testing.assert_array_equal(
        unpack(found.values, bits).reshape(48, -1)[:, width:], unpack(start.values, bits).reshape(48, -1)[:, width:]
    )


def test_a_sweep_never_raises_the_error_of_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, matrix = correlated(512, 160), weights(20, 160)
    moments = seen.T @ seen
    blocks, errors = quantize_rows(matrix, bits=4, block_size=32, symmetric=True), []
    monkeypatch.setattr(quantease, "SWEEPS", 1)
    for _ in range(5):
        left = decoded(blocks, 4, 160) - matrix
        errors.append(float(np.einsum("ij,jk,ik->", left, damped(moments), left)))
        blocks = descend(matrix, moments, blocks, bits=4, block_size=32)
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    assert errors[-1] < errors[0] / 2


def test_no_single_other_code_helps_where_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantease, "SWEEPS", 200)
    seen, matrix = correlated(256, 32), weights(3, 32)
    gram = damped(seen.T @ seen)
    start = quantize_rows(matrix, bits=4, block_size=32, symmetric=True)
    found = descend(matrix, seen.T @ seen, start, bits=4, block_size=32)
    codes, left = unpack(found.values, 4).reshape(3, -1).astype(int), decoded(found, 4, 32) - matrix
    slope = left @ gram
    for step in (-1, 1):
        moved = found.scales * step  # one block spans the row
        gain = 2 * moved * slope + moved**2 * np.diag(gram)
        allowed = (codes + step >= 0) & (codes + step <= 15)
        assert (gain[allowed] > -1e-3 * np.abs(gain).max()).all()


def test_codes_come_out_of_packing_as_they_went_in() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (3, 2, 7)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, 4), 4)[..., :7], codes)
    np.testing.assert_array_equal(unpack(codes, 8), codes)
