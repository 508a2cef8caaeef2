"""FP8 (E4M3: 4 bits of exponent, 3 of mantissa, largest number 448): numbers, scales, and the nodes that carry them.

A linear layer becomes QuantizeLinear and DequantizeLinear of what it reads, with one scale for the tensor, and
DequantizeLinear of a weight that is stored in FP8; the MatMul keeps its name. A compiler such as TensorRT makes one FP8
product of the pattern, ONNX Runtime computes it as written. Scales: the largest magnitude onto 448, which uses all of
the format's range, or a smaller one that clips what is rare (percentile) or minimises the squared error (MSE). FP8
steps grow with the number, so clipping gains less than it does for integers (docs/tensorrt.md has the figures). Zero
points are zero: the format is signed. Knows nothing of profiles' gates or files; contract.py says what must hold.
"""

from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.contract import MIN_SIDE
from slmdeploy.building.rewriting import Replacement, remove_unused_initializers, weight_array
from slmdeploy.specs import ActivationScale, Fp8

E4M3 = ml_dtypes.float8_e4m3fn
LARGEST = np.float32(448)
_PERCENTILE = 0.9999
_SHRINKS = np.geomspace(1, 0.25, 32).astype(np.float32)
_SMALLEST = np.finfo(np.float32).tiny

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Codes = npt.NDArray[ml_dtypes.float8_e4m3fn]


def encode(values: Floats, scale: Floats | np.float32) -> Codes:
    """values / scale in E4M3, to the nearest, ties to even, clipped to ±448: QuantizeLinear of ONNX, bit for bit."""
    return np.asarray(np.clip(values / scale, -LARGEST, LARGEST).astype(E4M3))


def decode(codes: Codes, scale: Floats | np.float32) -> Floats:
    """What the codes stand for."""
    return np.asarray(codes.astype(np.float32) * scale, np.float32)


def weight_scale(weight: Floats, form: Fp8) -> Floats:
    """The scale of a weight [K, N] under ``form``: float32 [] or, per channel, [N]; 1 where all is zero."""
    axes = 0 if form.per_channel else None
    whole = _onto_largest(np.abs(weight).max(axis=axes))
    if form.weight_scale == "amax":
        return whole
    candidates = [np.maximum(whole * shrink, _SMALLEST) for shrink in _SHRINKS]
    errors = np.stack([np.square(decode(encode(weight, s), s) - weight).sum(axis=axes) for s in candidates])
    best = errors.argmin(axis=0)
    return np.asarray(np.take_along_axis(np.stack(candidates), best[None], axis=0)[0], np.float32)


def activation_scale(counts: Counts, rule: ActivationScale) -> np.float32:
    """The scale of a tensor whose values were counted by the bits of their float16 number, int64 [65536].

    ``max``: the largest magnitude seen. ``percentile``: that which 99.99 % of the values are within. ``mse``: of scales
    down to a quarter of the first, that of least squared error.
    """
    seen = np.flatnonzero(counts)
    values = seen.astype(np.uint16).view(np.float16).astype(np.float32)
    weights = counts[seen].astype(np.float64)
    return _RULES[rule](values, weights)


def _of_largest(values: Floats, weights: npt.NDArray[np.float64]) -> np.float32:
    return np.float32(_onto_largest(np.abs(values).max()))


def _of_percentile(values: Floats, weights: npt.NDArray[np.float64]) -> np.float32:
    order = np.abs(values).argsort()
    within = np.cumsum(weights[order]) / weights.sum()
    place = min(int(np.searchsorted(within, _PERCENTILE)), len(order) - 1)
    return np.float32(_onto_largest(np.abs(values[order[place]])))


def _of_least_error(values: Floats, weights: npt.NDArray[np.float64]) -> np.float32:
    whole = _of_largest(values, weights)
    candidates = [np.float32(max(whole * shrink, _SMALLEST)) for shrink in _SHRINKS]
    return min(candidates, key=lambda s: float(weights @ np.square(decode(encode(values, s), s) - values)))


_RULES: Mapping[ActivationScale, Callable[[Floats, npt.NDArray[np.float64]], np.float32]] = {
    "max": _of_largest,
    "percentile": _of_percentile,
    "mse": _of_least_error,
}


def _onto_largest(magnitude: Floats | np.float32) -> Floats:
    """The scale that puts this magnitude at 448; 1 for a magnitude of zero."""
    scale = np.maximum(np.asarray(magnitude, np.float32) / LARGEST, _SMALLEST)
    return np.asarray(np.where(np.asarray(magnitude) == 0, np.float32(1), scale), np.float32)


def half_scale(scale: Floats | np.float32) -> Floats:
    """The scale that float16 has for it: of a layer whose other numbers are float16, the scales are too.

    Nothing below float16's smallest normal number: FP8 loses nothing by a larger scale until its own smallest numbers.
    """
    tiny, most = (np.float32(limit) for limit in (np.finfo(np.float16).tiny, np.finfo(np.float16).max))
    return np.clip(scale, tiny, most).astype(np.float16).astype(np.float32)


def fp8_product(rows: Floats, weight: Floats) -> Floats:
    """What FP8 makes of rows [n, K] times a weight [K, N], by the plainest scales: one for the rows, one per column."""
    step, columns = _onto_largest(np.abs(rows).max()), weight_scale(weight, Fp8())
    product = decode(encode(rows, step), step) @ decode(encode(weight, columns), columns)
    return np.asarray(product, np.float32)


def too_narrow(weight: ir.Value) -> bool:
    """Whether a weight [K, N] has a side that FP8 products do not take."""
    assert weight.shape is not None
    return min(int(size) for size in weight.shape.numpy()) < MIN_SIDE


def quantize_linears(
    graph: ir.Graph,
    layers: Mapping[str, ir.Node],
    scales: Mapping[str, np.float32],
    form: Fp8,
    settled: Callable[[Floats | np.float32], Floats] | None = None,
) -> None:
    """Change ``graph`` in place: each of these MatMul nodes, x [..., K] times a constant [K, N], reads FP8 on both.

    ``scales`` are those of the values that the layers read, by the value's name; layers that read one value share it.
    ``settled`` makes of each scale one that the graph can hold.
    """
    settled = settled or np.asarray
    read: dict[ir.Value, ir.Value] = {}
    for node in layers.values():
        source, weight = node.inputs[:2]
        assert source is not None
        assert source.name
        assert weight is not None
        if source not in read:
            read[source] = _activation(node, source, settled(scales[source.name]))
        node.replace_input_with(0, read[source])
        node.replace_input_with(1, _weight(node, weight_array(weight), form, settled))
    remove_unused_initializers(graph)


def _activation(node: ir.Node, source: ir.Value, scale: Floats) -> ir.Value:
    new = Replacement(node)
    step = new.constant(f"{source.name}.fp8_scale", np.float32(scale), shared=True)
    zero = new.constant("fp8.zero", np.zeros((), E4M3), shared=True)
    codes = new.add("QuantizeLinear", source, step, zero, name="input_fp8")
    return new.add("DequantizeLinear", codes, step, name="input")


def _weight(node: ir.Node, weight: Floats, form: Fp8, settled: Callable[[Floats | np.float32], Floats]) -> ir.Value:
    new, scale = Replacement(node), settled(weight_scale(weight, form))
    stored = new.constant("weight_fp8", encode(weight, scale))
    step = new.constant("weight_scale", scale)
    return new.add("DequantizeLinear", stored, step, name="weight", axis=1)
