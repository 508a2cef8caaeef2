"""W8A8: signed 8-bit weights with one scale per output channel, and 8-bit activations with one scale per token.

Knows nothing of profiles, files or gates: it turns one MatMul into a small subgraph. The form is the fastest correct
one that benchmarks/matmul_forms.py finds (figures in docs/quantisation.md): each row is quantised by its own largest
magnitude to *unsigned* 8 bit with zero point 128 (signed activations fall off ONNX Runtime's fast path by 7-50x,
unsigned weights by 2x), multiplied in integers, and scaled back. A scale per token rather than per tensor, because with
one scale for the tensor a token's result would depend on its neighbours in the batch.
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.rewriting import MICROSOFT, Replacement

_LEVELS = 127
_ZERO_POINT = np.uint8(128)
_HUGE = np.float32(1e38)


def quantize_columns(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric 8-bit weights [K, N] in -127..127 and scales [N], so that ``values * scales`` is near ``weight``."""
    largest = np.abs(weight).max(axis=0)
    scales = np.where(largest > 0, largest / _LEVELS, 1.0).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


class TokenQuantizer:
    """Replaces MatMul nodes of one graph; nodes that read the same value share its row scales and its 8-bit form."""

    def __init__(self) -> None:
        self._rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def replace(self, node: ir.Node, weight: npt.NDArray[np.float32]) -> None:
        """Put the W8A8 form of ``node`` (x [..., K] times ``weight`` [K, N]) in its place."""
        source = node.inputs[0]
        assert source is not None
        new = Replacement(node)
        if source not in self._rows:
            self._rows[source] = _quantize_rows(new, source, weight.shape[0])
        rows, steps = self._rows[source]
        values, scales = quantize_columns(weight)
        product = new.add(
            "MatMulIntegerToFloat",
            rows,
            new.constant("weight_int8", values),
            new.constant("w8a8.one", np.float32(1), shared=True),
            new.constant("weight_scale", scales),
            new.constant("w8a8.zero_point", _ZERO_POINT, shared=True),
            domain=MICROSOFT,
        )
        new.finish(new.add("Mul", product, steps))


def _quantize_rows(new: Replacement, source: ir.Value, width: int) -> tuple[ir.Value, ir.Value]:
    """The rows of ``source`` [..., width] in uint8, and the step of each row (its last axis kept, of length 1).

    A row of zeros has step 0 and arbitrary codes, which the multiplication by the step brings back to zero.
    """
    last_axis = new.constant("w8a8.last_axis", np.array([-1], np.int64), shared=True)
    first = new.constant("w8a8.first", np.array([0], np.int64), shared=True)
    level = new.constant("w8a8.level", np.float32(1 / _LEVELS), shared=True)
    zero_point = new.constant("w8a8.zero_point", _ZERO_POINT, shared=True)
    huge = new.constant("w8a8.huge", _HUGE, shared=True)
    largest = new.add("ReduceMax", new.add("Abs", source), last_axis)
    # ONNX Runtime 1.31 leaves the axis at its full length when there are no rows (logits asked nowhere): cut it to 1.
    steps = new.add("Mul", new.add("Gather", largest, first, axis=-1), level, name="steps")
    # The blocked QuantizeLinear wants a zero point per step: steps over something huge, quantised, is 128 everywhere.
    zero_points = new.add("QuantizeLinear", steps, huge, zero_point, name="zero_points")
    return new.add("QuantizeLinear", source, steps, zero_points, axis=-1, block_size=width), steps
