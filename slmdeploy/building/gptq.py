"""Rounding that knows what a layer reads: GPTQ, for weights of 4 bits in blocks.

Plain rounding minimises the error of the weights; what counts is the error of the layer's outputs. Columns are rounded
one after the other, and the error of each is taken up by those still to come, as far as the inputs of the calibration
text let them stand in for it (Frantar et al., arXiv 2210.17323). Scales and zero points of a block are searched as
blockwise.py does, on the weights as they are when the block's turn comes. Columns keep their order: MatMulNBits has no
index of groups. Knows arrays only; where the second moments of the inputs come from is calibration.py's business.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from slmdeploy.building.blockwise import Blocks, Bytes, Floats, fit_scales, join, pack, quantize_rows, round_codes
from slmdeploy.specs import Weights

_DAMPING = (0.01, 0.1, 1.0)
"""Shares of the mean moment that are added to all of them, the next where the smaller one leaves no inverse."""
_STRIPE_ROWS = 512


class Rounding:
    """Rounds the linear layers of one graph, each layer and form once: trials of a build ask again and again.

    ``moments`` gives the second moments of what a layer reads, float32 [K, K], by the name of that value.
    """

    def __init__(self, moments: Callable[[str], Floats]) -> None:
        self._moments = moments
        self._done: dict[tuple[str, Weights], Blocks] = {}

    def __call__(self, layer: str, reads: str, weight: Floats, form: Weights) -> Blocks:
        """The blocks of ``weight`` [K, N] of the layer of this name, which reads the value ``reads``."""
        if (layer, form) not in self._done:
            rows = np.ascontiguousarray(weight.T)
            bits, size, symmetric = form.bits, form.block_size, form.symmetric
            if bits == 4:
                found = compensated_rows(rows, self._moments(reads), bits=bits, block_size=size, symmetric=symmetric)
            else:
                found = quantize_rows(rows, bits=bits, block_size=size, symmetric=symmetric)
            self._done[layer, form] = found
        return self._done[layer, form]


def compensated_rows(matrix: Floats, moments: Floats, *, bits: int, block_size: int, symmetric: bool) -> Blocks:
    """Quantise ``matrix`` [rows, K] in blocks along K, given the sum of x xᵀ over the inputs x, ``moments`` [K, K]."""
    spread = _spread(moments)
    stripes = [matrix[start : start + _STRIPE_ROWS] for start in range(0, len(matrix), _STRIPE_ROWS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return join(list(pool.map(lambda stripe: _stripe(stripe, spread, bits, block_size, symmetric), stripes)))


def _spread(moments: Floats) -> Floats:
    """Upper triangular [K, K]: row j over its diagonal says what the error of column j asks of the columns behind it.

    The Cholesky factor of the inverse of the damped moments. Inputs that were never other than zero ask for nothing.
    """
    wide = moments.astype(np.float64)
    diagonal = np.diag_indices(len(wide))
    mean = float(wide[diagonal].mean()) or 1.0
    wide[diagonal] = np.where(wide[diagonal] == 0, mean, wide[diagonal])
    for damping in _DAMPING:
        damped = wide.copy()
        damped[diagonal] += damping * mean
        try:
            return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T, np.float32)
        except np.linalg.LinAlgError:
            continue
    return np.eye(len(wide), dtype=np.float32)


def _stripe(matrix: Floats, spread: Floats, bits: int, block_size: int, symmetric: bool) -> Blocks:
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    left = matrix.astype(np.float32)  # what is still to be rounded, errors so far taken up
    codes = np.zeros((rows, blocks, block_size), np.uint8)
    scales, offsets = np.ones((2, rows, blocks), np.float32)
    for block in range(blocks):
        start, end = block * block_size, min((block + 1) * block_size, columns)
        scales[:, block], offsets[:, block] = _scales_of(left[:, start:end], bits, block_size, symmetric)
        found, errors = _round_block(left[:, start:end], spread[start:end, start:end], scales[:, block],
                                     offsets[:, block], bits)  # fmt: skip
        codes[:, block, : end - start] = found
        codes[:, block, end - start :] = offsets[:, block, None]  # padding stands for zero
        left[:, end:] -= errors @ spread[start:end, end:]
    return Blocks(pack(codes, bits), scales, None if symmetric else pack(offsets.astype(np.uint8), bits))


def _scales_of(block: Floats, bits: int, block_size: int, symmetric: bool) -> tuple[Floats, Floats]:
    """Scale and offset of each row of one block [rows, up to block_size]."""
    padded = np.zeros((len(block), 1, block_size), np.float32)
    padded[:, 0, : block.shape[1]] = block
    scales, offsets = fit_scales(padded, bits, symmetric)
    return scales[:, 0], offsets[:, 0]


def _round_block(
    block: Floats, spread: Floats, scales: Floats, offsets: Floats, bits: int
) -> tuple[Bytes, npt.NDArray[np.float32]]:
    """Codes of one block [rows, width] and the error of each column over its diagonal; changes ``block``."""
    codes, errors = np.zeros(block.shape, np.uint8), np.zeros(block.shape, np.float32)
    for column in range(block.shape[1]):
        values = block[:, column]
        found = round_codes(values, scales, offsets, bits)
        codes[:, column] = found
        errors[:, column] = (values - (found - offsets) * scales) / spread[column, column]
        block[:, column + 1 :] -= errors[:, column, None] * spread[column, column + 1 :]
    return codes, errors
