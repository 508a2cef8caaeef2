"""QuantEase: rounded weights improved one column at a time until no single change of code helps a layer's outputs.

With the scales settled, what is left is which code each weight takes. Given all others, the best value of column j is
w_j + (sum over k of (w_k - q_k) S_kj, k other than j) / S_jj, and the best code is the one nearest to that (Behdin et
al., arXiv 2309.01885). Going through the columns again and again, the squared error of the outputs never grows. It
starts from what GPTQ found, whose columns never knew the errors of those behind them. Knows arrays only.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from slmdeploy.building.blockwise import Blocks, Floats, join, pack, round_codes, unpack
from slmdeploy.building.gptq import damped

SWEEPS = 15
"""Sweeps over all columns at most; fewer where one changes nothing."""
_STRIPE_ROWS = 1024
_BLOCK = 128
"""Columns whose gradient is computed anew, in one product."""
_TOGETHER = 16
"""Columns whose changes reach the rest of a block in one product."""


def descend(matrix: Floats, moments: Floats, start: Blocks, *, bits: int, block_size: int) -> Blocks:
    """Better codes for ``matrix`` [rows, K] than those of ``start``, with the same scales and zero points.

    ``moments`` is the sum of x xᵀ over the inputs x, [K, K]; its diagonal is damped as GPTQ's is.
    """
    gram = damped(moments).astype(np.float32)
    stripes = [slice(first, first + _STRIPE_ROWS) for first in range(0, len(matrix), _STRIPE_ROWS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda rows: _Stripe(matrix[rows], gram, _rows(start, rows), bits, block_size).best(), stripes)
        return join(list(done))


def _rows(blocks: Blocks, rows: slice) -> Blocks:
    points = None if blocks.zero_points is None else blocks.zero_points[rows]
    return Blocks(blocks.values[rows], blocks.scales[rows], points)


class _Stripe:
    """Some rows of a matrix and their codes, all turned: [K, rows], a column of the matrix being contiguous."""

    def __init__(self, matrix: Floats, gram: Floats, start: Blocks, bits: int, block_size: int) -> None:
        rows, columns = matrix.shape
        self._gram, self._start, self._bits, self._size = gram, start, bits, block_size
        blocks = start.scales.shape[1]
        codes = unpack(start.values, bits).reshape(rows, -1)
        self._padded = codes.copy()
        self._codes = np.ascontiguousarray(codes[:, :columns].T).astype(np.float32)
        middle = np.full((rows, blocks), 2 ** (bits - 1), np.float32)
        points = middle if start.zero_points is None else unpack(start.zero_points, bits)[:, :blocks]
        self._scales = np.ascontiguousarray(start.scales.T)
        self._offsets = np.ascontiguousarray(points.T).astype(np.float32)
        owner = np.arange(columns) // block_size
        self._values = (self._codes - self._offsets[owner]) * self._scales[owner]
        self._errors = matrix.T - self._values

    def best(self) -> Blocks:
        """The blocks when no column changes any more, or after all sweeps."""
        columns = len(self._codes)
        for _ in range(SWEEPS):
            changed = [self._improve(first, min(first + _BLOCK, columns)) for first in range(0, columns, _BLOCK)]
            if not any(changed):
                break
        self._padded[:, :columns] = self._codes.T.astype(np.uint8)
        values = pack(self._padded.reshape(len(self._padded), -1, self._size), self._bits)
        return Blocks(values, self._start.scales, self._start.zero_points)

    def _improve(self, first: int, last: int) -> bool:
        """One visit to these columns; whether any code changed."""
        slope = self._gram[first:last] @ self._errors
        changed = False
        for start in range(first, last, _TOGETHER):
            stop = min(start + _TOGETHER, last)
            steps = self._step(start, stop, slope[start - first : stop - first])
            changed = changed or bool(steps.any())
            slope[stop - first :] -= self._gram[stop:last, start:stop] @ steps
        return changed

    def _step(self, start: int, stop: int, slope: Floats) -> Floats:
        """Give columns start to stop their best codes in turn; by how much each value changed. Changes ``slope``."""
        steps = np.empty_like(slope)
        for place, column in enumerate(range(start, stop)):
            block = column // self._size
            scales, offsets = self._scales[block], self._offsets[block]
            wanted = self._values[column] + slope[place] / self._gram[column, column]
            codes = round_codes(wanted, scales, offsets, self._bits)
            steps[place] = (codes - self._codes[column]) * scales
            self._codes[column] = codes
            self._values[column] += steps[place]
            self._errors[column] -= steps[place]
            slope[place + 1 :] -= self._gram[column + 1 : stop, column, None] * steps[place]
        return steps
