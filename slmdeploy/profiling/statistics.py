"""Percentiles and how sure one can be of them: bootstrap draws, of which intervals and ratios are made.

A statistic is drawn again RESAMPLES times from the samples redrawn with replacement (Efron 1979, Bootstrap methods:
another look at the jackknife). Draws are kept, not intervals alone, because the interval of a ratio comes from the
draws of both sides: paired where the same seed redrew the same records, independent where the seeds differ. Knows
nothing of what was measured.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
_BLOCK_VALUES = 2_000_000
"""Values redrawn at a time: the samples of a long run times a thousand resamples would be gigabytes."""

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def percentile(values: ArrayLike, percent: float) -> float:
    """The percentile, linear between order statistics."""
    return float(np.percentile(np.asarray(values, np.float64), percent))


def spread(values: ArrayLike) -> float:
    """(p90 - p10) / p50: how much values differ among themselves."""
    low, middle, high = np.percentile(np.asarray(values, np.float64), [10, 50, 90])
    return float((high - low) / middle) if middle > 0 else 0.0


def draws(values: ArrayLike, statistic: Callable[[Floats], Floats], seed: int, resamples: int = RESAMPLES) -> Floats:
    """``statistic`` of ``resamples`` resamples of ``values``, float64 [resamples, …].

    ``values`` has one sample per row. ``statistic`` takes the redrawn samples, [block, n] or [block, n, columns], and
    returns one value, or one row of values, for each of the block.
    """
    data = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_VALUES // max(1, data.size))
    parts = [
        statistic(data[generator.integers(0, len(data), (min(block, resamples - start), len(data)))])
        for start in range(0, resamples, block)
    ]
    return np.concatenate(parts)


def percentile_draws(values: ArrayLike, percents: list[float], seed: int, resamples: int = RESAMPLES) -> Floats:
    """Draws of several percentiles of the same samples, float64 [resamples, percents]."""
    return draws(values, lambda drawn: np.percentile(drawn, percents, axis=-1).T, seed, resamples)


def interval(drawn: Floats) -> Interval:
    """The middle 95 % of draws; a draw on which the statistic is not defined is left out."""
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def bootstrap(values: ArrayLike, statistic: Callable[[Floats], Floats], seed: int) -> Interval:
    """95 % percentile-bootstrap interval of ``statistic``; see `draws`."""
    return interval(draws(values, statistic, seed))


def ratio_interval(own: Floats, reference: Floats) -> Interval | None:
    """95 % interval of own / reference from the draws of both; None where a reference may be 0."""
    if not np.nanmin(np.abs(reference)) > 0:
        return None
    return interval(own / reference)
