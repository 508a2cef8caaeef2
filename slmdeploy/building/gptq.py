"""Rounding that knows what a layer reads: GPTQ, for weights in blocks.

Plain rounding minimises the error of the weights; what counts is the error of the layer's outputs. Columns are rounded
one after the other, and the error of each is taken up by those still to come, as far as the inputs of the calibration
text let them stand in for it (Frantar et al., arXiv 2210.17323). Scales and zero points of a block span the weights as
they are when the block's turn comes: beside what the errors give back, searching for better ones gained nothing that
could be measured. Columns keep their order: MatMulNBits has no index of groups. Knows arrays only; where the second
moments of the inputs come from is calibration.py's business.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from slmdeploy.building.blockwise import Blocks, Bytes, Floats, join, pack, plain_scales, round_codes

_DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean moment that are added to all of them, the next where the smaller one leaves no inverse."""
_STRIPE_ROWS = 1024
_DIRECT = 64
_TOGETHER = 16
"""Columns whose errors reach those behind them in one product."""


def compensated_rows(matrix: Floats, moments: Floats, *, bits: int, block_size: int, symmetric: bool) -> Blocks:
    """Quantise ``matrix`` [rows, K] in blocks along K, given the sum of x xᵀ over the inputs x, ``moments`` [K, K]."""
    spread = _spread(moments)
    stripes = [matrix[start : start + _STRIPE_ROWS] for start in range(0, len(matrix), _STRIPE_ROWS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return join(list(pool.map(lambda stripe: _stripe(stripe, spread, bits, block_size, symmetric), stripes)))


def _spread(moments: Floats) -> Floats:
    """Upper triangular U [K, K]: row j over its diagonal says what the error of column j asks of those behind it.

    Uᵀ U is the inverse of the damped moments: they are M Mᵀ, M upper triangular and found by Cholesky from behind, and
    U is the inverse of M. Inputs that were never other than zero ask for nothing. The damping keeps the condition of M
    below sqrt(100 K), so that float32 does for its inverse where it does not for the factor.
    """
    for share in _DAMPING:
        try:
            factor = np.linalg.cholesky(damped(moments, share)[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            continue
        return _inverse(factor.astype(np.float32))
    return np.eye(len(moments), dtype=np.float32)


def damped(moments: Floats, share: float = _DAMPING[0]) -> npt.NDArray[np.float64]:
    """``moments`` [K, K] with this share of their mean added to the diagonal, whose zeros count as the mean."""
    wide = moments.astype(np.float64)
    diagonal = np.diag_indices(len(wide))
    mean = float(wide[diagonal].mean()) or 1.0
    wide[diagonal] = np.where(wide[diagonal] == 0, mean, wide[diagonal]) + share * mean
    return wide


def _inverse(upper: Floats) -> Floats:
    """The inverse of an upper triangular matrix by halves, so that nearly all of it is products of matrices."""
    size = len(upper)
    if size <= _DIRECT:
        return np.triu(np.linalg.inv(upper))
    half = size // 2
    first, last = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found = np.zeros_like(upper)
    found[:half, :half], found[half:, half:] = first, last
    found[:half, half:] = -first @ upper[:half, half:] @ last
    return found


def _stripe(matrix: Floats, spread: Floats, bits: int, block_size: int, symmetric: bool) -> Blocks:
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    left = np.ascontiguousarray(matrix.T)  # [K, rows]: what is still to be rounded, errors so far taken up
    codes = np.zeros((blocks, block_size, rows), np.uint8)
    scales, offsets = np.ones((2, rows, blocks), np.float32)
    for block in range(blocks):
        start, end = block * block_size, min((block + 1) * block_size, columns)
        found = plain_scales(_padded(left[start:end], block_size), bits, symmetric)
        scales[:, block], offsets[:, block] = found[0][:, 0], found[1][:, 0]
        codes[block] = offsets[:, block]  # padding stands for zero
        errors = np.empty((end - start, rows), np.float32)
        for first in range(start, end, _TOGETHER):
            last = min(first + _TOGETHER, end)
            few = slice(first - start, last - start)
            errors[few] = _round(left[first:last], spread[first:last, first:last], found, bits, codes[block, few])
            left[last:end] -= spread[first:last, last:end].T @ errors[few]
        left[end:] -= spread[start:end, end:].T @ errors
    values = np.ascontiguousarray(codes.transpose(2, 0, 1))
    return Blocks(pack(values, bits), scales, None if symmetric else pack(offsets.astype(np.uint8), bits))


def _padded(block: Floats, block_size: int) -> Floats:
    """[rows, 1, block_size] from one block's columns [up to block_size, rows]."""
    padded = np.zeros((block.shape[1], 1, block_size), np.float32)
    padded[:, 0, : len(block)] = block.T
    return padded


def _round(left: Floats, spread: Floats, found: tuple[Floats, Floats], bits: int, codes: Bytes) -> Floats:
    """Round columns [few, rows] into ``codes``; the error of each over its diagonal, [few, rows]. Changes ``left``."""
    scales, offsets = found[0][:, 0], found[1][:, 0]
    errors = np.empty_like(left)
    for column, values in enumerate(left):
        rounded = round_codes(values, scales, offsets, bits)
        codes[column] = rounded
        errors[column] = (values - (rounded - offsets) * scales) / spread[column, column]
        left[column + 1 :] -= spread[column, column + 1 :, None] * errors[column]
    return errors
