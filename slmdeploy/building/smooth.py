"""SmoothQuant: what is large in a few channels of the activations moves into the weights that read them.

Activations of 8 bits have one scale for a token or a tensor, so a channel that is a hundred times as large as the
others leaves those a hundredth of the steps; weights have a scale per output channel and bear it well. Each channel j
of what a layer reads is divided by s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), and row j of the weight multiplied by
it (Xiao et al., arXiv 2211.10438). The division is folded into what makes the value (folding.py), so it costs nothing
at run time and changes nothing in float32 but rounding. With weights of 4 bits the same search is that of AWQ (Lin et
al., arXiv 2306.00978): weights of channels that are large take the finer steps. Knows no engine: what is searched for
is the least error of a product that the caller gives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slmdeploy.building.blockwise import plain_scales, round_codes
from slmdeploy.building.folding import Place, places
from slmdeploy.building.w8a8 import quantize_columns

Floats = npt.NDArray[np.float32]
Product = Callable[[Floats, Floats], Floats]
"""What an engine makes of rows [n, K] times a weight [K, N]."""
ALPHAS = (0.2, 0.35, 0.5, 0.65, 0.8)
_LEAST = 1e-5
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Inputs:
    """What a linear layer was fed on calibration text: the largest magnitude of each channel [K], and some rows."""

    largest: Floats
    rows: Floats


def smooth(
    model: ir.Model, inputs: Mapping[str, Inputs], *, alpha: float | None = None, product: Product | None = None
) -> dict[str, float]:
    """Change the constants of a fp32 ``model`` in place so that its linear layers read smoother values.

    ``inputs`` are those of calibration.inputs_of, by the name of the value that layers read; places without an entry
    stay as they are. ``alpha``, 0 to 1, is the share that goes into the weights; None searches it for each place, of
    0.2 to 0.8 or not at all, for the least squared error of ``product`` (8-bit weights per channel, activations per
    token, unless given) on the calibration rows. The model computes what it did, up to float32's rounding, whichever
    engine it is for. Returns the exponent that each smoothed value took, by its name.
    """
    taken = {}
    for place in places(model.graph):
        if place.name not in inputs:
            continue
        found = inputs[place.name]
        chosen = alpha if alpha is not None else _best(place, found, product or w8a8_product)
        if chosen is not None:
            place.divide(factors(place, found, chosen))
            taken[place.name] = chosen
    return taken


def factors(place: Place, inputs: Inputs, alpha: float) -> Floats:
    """s of the module's docstring for each of the place's makers [size]; 1 for a channel that is always zero."""
    weights = np.max([np.abs(weight).max(axis=1) for weight in place.weights()], axis=0)
    activation, weight = np.zeros((2, place.size), np.float32)
    np.maximum.at(activation, place.channels, inputs.largest)
    np.maximum.at(weight, place.channels, weights)
    wanted = np.maximum(activation, _LEAST) ** alpha / np.maximum(weight, _LEAST) ** (1 - alpha)
    return np.where((activation > 0) & (weight > 0), np.maximum(wanted, _LEAST), 1).astype(np.float32)


def _best(place: Place, inputs: Inputs, product: Product) -> float | None:
    """The exponent of least error, None where the values are best left as they are."""
    errors: dict[float | None, float] = {None: _error(place, inputs, np.ones(place.size, np.float32), product)}
    for alpha in ALPHAS:
        errors[alpha] = _error(place, inputs, factors(place, inputs, alpha), product)
    return min(errors, key=lambda alpha: errors[alpha])


def _error(place: Place, inputs: Inputs, factors: Floats, product: Product) -> float:
    spread = factors[place.channels]
    rows = inputs.rows / spread
    return sum(
        float(np.square(product(rows, weight * spread[:, None]) - inputs.rows @ weight, dtype=np.float64).sum())
        for weight in place.weights()
    )


def w8a8_product(rows: Floats, weight: Floats) -> Floats:
    """Rows with a scale each times a weight with a scale per column, both of 8 bits: w8a8.py's form."""
    steps = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, _TINY)
    values, scales = quantize_columns(weight)
    return np.asarray((np.rint(rows / steps) * steps) @ (values * scales), np.float32)


def blocks_product(bits: int, block_size: int, *, symmetric: bool) -> Product:
    """Rows as they are times a weight in blocks along K, rounded to the nearest: blockwise.py's form."""

    def product(rows: Floats, weight: Floats) -> Floats:
        width, columns = weight.shape
        padded = np.zeros((columns, -(-width // block_size) * block_size), np.float32)
        padded[:, :width] = weight.T
        grouped = padded.reshape(columns, -1, block_size)
        scales, offsets = (part[..., None] for part in plain_scales(grouped, bits, symmetric))
        rounded = (round_codes(grouped, scales, offsets, bits) - offsets) * scales
        return np.asarray(rows @ rounded.reshape(columns, -1)[:, :width].T, np.float32)

    return product
