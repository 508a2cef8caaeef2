"""How the weights of one graph are rounded: to the nearest, by GPTQ or by QuantEase, each layer and form once.

Trials of a build ask for the same layer again and again, so what was found is kept. Knows which method a form takes and
no arithmetic: that is in blockwise.py, w8a8.py, gptq.py and quantease.py; second moments are calibration.py's.
"""

from collections.abc import Callable

import numpy as np

from slmdeploy.building.blockwise import Blocks, Floats, quantize_rows
from slmdeploy.building.gptq import compensated_rows
from slmdeploy.building.quantease import descend
from slmdeploy.building.w8a8 import Columns, quantize_columns
from slmdeploy.specs import RoundingMethod, Weights

_MIDDLE = 128


def method_for(wanted: RoundingMethod | None, bits: int) -> RoundingMethod:
    """How weights of so many bits are rounded; None: by GPTQ where there are 4, which lose next to nothing with 8."""
    return wanted or ("gptq" if bits == 4 else "nearest")


class Rounding:
    """Rounds the linear layers of one graph.

    ``moments`` gives the second moments of what a layer reads, float32 [K, K], by the name of that value. ``method`` is
    that of `method_for`.
    """

    def __init__(self, moments: Callable[[str], Floats], method: RoundingMethod | None = None) -> None:
        self._moments, self._method = moments, method
        self._blocks: dict[tuple[str, Weights], Blocks] = {}
        self._columns: dict[str, Columns] = {}

    def __call__(self, layer: str, reads: str, weight: Floats, form: Weights) -> Blocks:
        """The blocks of ``weight`` [K, N] of the layer of this name, which reads the value ``reads``."""
        if (layer, form) not in self._blocks:
            rows = np.ascontiguousarray(weight.T)
            self._blocks[layer, form] = self._rounded(rows, reads, form.bits, form.block_size, form.symmetric)
        return self._blocks[layer, form]

    def columns(self, layer: str, reads: str, weight: Floats) -> Columns:
        """The same in 8 bits with one scale for each column, as W8A8 has it."""
        if method_for(self._method, 8) == "nearest":
            return quantize_columns(weight)
        if layer not in self._columns:
            found = self._rounded(np.ascontiguousarray(weight.T), reads, 8, len(weight), symmetric=True)
            values = found.values.reshape(weight.shape[1], -1).T.astype(np.int16) - _MIDDLE
            self._columns[layer] = np.ascontiguousarray(values.astype(np.int8)), found.scales[:, 0]
        return self._columns[layer]

    def _rounded(self, rows: Floats, reads: str, bits: int, size: int, symmetric: bool) -> Blocks:
        method = method_for(self._method, bits)
        if method == "nearest":
            return quantize_rows(rows, bits=bits, block_size=size, symmetric=symmetric)
        moments = self._moments(reads)
        found = compensated_rows(rows, moments, bits=bits, block_size=size, symmetric=symmetric)
        if method == "gptq":
            return found
        return descend(rows, moments, found, bits=bits, block_size=size)
