"""Static W8A8: signed 8-bit weights with one scale per output channel, activations in a range fixed beforehand.

Knows nothing of profiles, files or gates, nor of where ranges come from (calibration.py): it turns one MatMul into a
QuantizeLinear and a MatMulIntegerToFloat. A token's result does not depend on its neighbours, and no pass over the
activations is spent on finding a row's range or on scaling the product back, which makes it the fastest form there is;
what a fixed range costs in quality is for the gate to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.rewriting import MICROSOFT, Replacement
from slmdeploy.building.w8a8 import Columns, quantize_columns

_LEVELS = 255


@dataclass(frozen=True)
class Range:
    """Numbers as ``step * (code - zero_point)`` with codes 0 to 255; zero is one of them."""

    step: float
    zero_point: int

    @classmethod
    def spanning(cls, low: float, high: float) -> Self:
        """The range from ``low`` <= 0 to ``high`` >= 0."""
        step = (high - low) / _LEVELS or 1.0
        return cls(step, int(np.clip(np.rint(-low / step), 0, _LEVELS)))

    def rounded(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """``values`` as codes stand for them: rounded, and clipped to the range."""
        codes = np.clip(np.rint(values / self.step) + self.zero_point, 0, _LEVELS)
        return np.asarray((codes - self.zero_point) * self.step, np.float64)


class StaticQuantizer:
    """Replaces MatMul nodes of one graph; nodes that read the same value share its 8-bit form."""

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        self._ranges = ranges
        self._rows: dict[ir.Value, ir.Value] = {}

    def replace(self, node: ir.Node, weight: npt.NDArray[np.float32], columns: Columns | None = None) -> None:
        """Put the static form of ``node`` (x [..., K] times ``weight`` [K, N]) in its place.

        ``columns`` is the weight as it was rounded; without it, it is rounded to the nearest.
        """
        source = node.inputs[0]
        assert source is not None
        assert source.name
        found, new = self._ranges[source.name], Replacement(node)
        step = new.constant(f"{source.name}.step", np.float32(found.step), shared=True)
        zero_point = new.constant(f"{source.name}.zero_point", np.uint8(found.zero_point), shared=True)
        if source not in self._rows:
            self._rows[source] = new.add("QuantizeLinear", source, step, zero_point)
        values, scales = columns or quantize_columns(weight)
        new.finish(
            new.add(
                "MatMulIntegerToFloat",
                self._rows[source],
                new.constant("weight_int8", values),
                step,
                new.constant("weight_scale", scales),
                zero_point,
                domain=MICROSOFT,
            )
        )
