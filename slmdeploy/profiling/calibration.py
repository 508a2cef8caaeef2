"""Fits the costs of a roofline to measurements, and keeps them as a small JSON file with what they were fitted to.

Times are linear in the costs, so the fit is least squares over relative errors (a millisecond counts as much as a
minute) with costs that may not be negative, after Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter
23; measurements far off weigh less (Huber, Ann. Math. Stat. 35(1), 1964). A cost that no measurement moves stays where
the machine's own figures put it. Knows nothing of targets (estimate.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.profiling.roofline import PEAK_OF, READ, UNITS
from slmdeploy.specs.base import AboveZero, Positive, Real, Spec, shipped

Floats = NDArray[np.float64]
Cost = Annotated[float, Field(ge=0.0, strict=False)]

SHIPPED = "calibration.json"
_HUBER = 0.15
"""Relative errors beyond it count less: a disturbed measurement must not bend the costs."""
_PRIOR_WEIGHT = 0.03
"""How much a cost's relative distance to its first guess counts beside one measurement's relative error."""
_REWEIGHTINGS = 12
_OPERATOR_S, _REQUEST_S = 3e-6, 5e-5
"""First guesses of what starting an operator and serving a request cost."""


class Reference(Spec):
    """The machine that was calibrated, with the figures that other machines are compared with (hardware.py)."""

    cpu: str | None
    arch: str
    threads: Positive
    read_bandwidth_bytes_per_s: AboveZero
    fp32_peak_ops_per_s: AboveZero
    int8_peak_ops_per_s: AboveZero
    cache_bytes: int = Field(ge=0)


class Memory(Spec):
    """Peak resident memory of a build's process: ``base_bytes`` + ``per_weight_byte`` x matrices + keys and values."""

    base_bytes: Real
    per_weight_byte: Real


class Errors(Spec):
    """Estimate / measured - 1 on builds that were left out of the fit: the median size, and where 95 % of them end."""

    median: Annotated[float, Field(ge=0.0, strict=False)]
    low: Annotated[float, Field(gt=-1.0, strict=False)]
    high: Annotated[float, Field(gt=-1.0, strict=False)]
    samples: Positive

    def interval(self, value: float) -> tuple[float, float]:
        """Between which ends a time lies that is estimated as ``value``."""
        return value / (1 + self.high), value / (1 + self.low)


class Calibration(Spec):
    """Costs in seconds per unit of roofline.UNITS, and what they were fitted to.

    ``builds`` by name with their content keys, and the number of ``samples`` that were measured of them.
    """

    format: Literal[1] = 1
    slmdeploy: str
    made: str
    machine: Reference
    costs: dict[str, Cost]
    memory: Memory
    errors: Errors
    builds: dict[str, str | None]
    samples: Positive

    @model_validator(mode="after")
    def _every_unit_has_a_cost(self) -> Self:
        if set(self.costs) != set(UNITS):
            raise ValueError(f"costs are not those of {', '.join(UNITS)}")
        return self


@dataclass(frozen=True)
class Sample:
    """A measured time and the work that was done in it, by UNITS."""

    work: Floats
    seconds: float

    def error(self, costs: Mapping[str, float]) -> float:
        """Estimate / measured - 1."""
        return seconds(self.work, costs) / self.seconds - 1


def seconds(work: Floats, costs: Mapping[str, float]) -> float:
    """What the work takes."""
    return float(work @ np.array([costs[name] for name in UNITS]))


def first_guess(machine: Reference) -> dict[str, float]:
    """The costs on a machine whose kernels reach all that the short benchmark measured."""
    peaks = {"fp32": machine.fp32_peak_ops_per_s, "int8": machine.int8_peak_ops_per_s}
    moved = dict.fromkeys((*READ, "read_cached", "values", "values_w8a8", "keys"), machine.read_bandwidth_bytes_per_s)
    rates = moved | {name: peaks[dtype] for name, dtype in PEAK_OF.items()}
    return {name: 1 / rate for name, rate in rates.items()} | {"operators": _OPERATOR_S, "requests": _REQUEST_S}


def fit(samples: Sequence[Sample], guess: Mapping[str, float]) -> dict[str, float]:
    """The costs under which the samples' estimates are nearest to what was measured, none of them negative.

    ``guess`` holds the costs that no sample moves. Raises InputError without samples.
    """
    if not samples:
        raise InputError("there is no measurement to fit to: measure at least one build under one workload")
    start = np.array([guess[name] for name in UNITS])
    # Columns are in units of the guess, rows relative to what was measured: every number is then about one.
    relative = np.stack([sample.work * start / sample.seconds for sample in samples])
    weights = np.ones(len(samples))
    found = np.ones(len(UNITS))
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        matrix = np.concatenate([relative * root[:, None], _PRIOR_WEIGHT * np.eye(len(UNITS))])
        found = non_negative(matrix, np.concatenate([root, np.full(len(UNITS), _PRIOR_WEIGHT)]))
        weights = np.minimum(1.0, _HUBER / np.maximum(np.abs(relative @ found - 1), 1e-12))
    return {name: float(cost) for name, cost in zip(UNITS, found * start, strict=True)}


def non_negative(matrix: Floats, target: Floats) -> Floats:
    """The vector x >= 0 for which |matrix x - target| is least (Lawson and Hanson's active sets)."""
    count = matrix.shape[1]
    free, x = np.zeros(count, bool), np.zeros(count)
    for _ in range(10 * count):
        gradient = matrix.T @ (target - matrix @ x)
        if free.all() or gradient[~free].max() <= 1e-12:
            break
        free[np.where(~free, gradient, -np.inf).argmax()] = True
        x = _feasible(matrix, target, free, x)
    return x


def _feasible(matrix: Floats, target: Floats, free: NDArray[np.bool_], x: Floats) -> Floats:
    """The solution over the free columns; those that it would make negative are fixed at zero, one after the other."""
    while True:
        tried = np.zeros(len(x))
        tried[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        below = free & (tried <= 0)
        if not below.any():
            return tried
        step = float((x[below] / (x[below] - tried[below])).min())
        x = x + step * (tried - x)
        free &= x > 1e-15


def fit_memory(weights: Sequence[float], rests: Sequence[float]) -> Memory:
    """The memory of a process by least squares: ``rests`` are peaks without the cache, ``weights`` the matrices' bytes.

    Neither term may be negative: where the best is, the other one explains all.
    """
    columns = np.stack([np.ones(len(weights)), np.asarray(weights, np.float64)], axis=1)
    target = np.asarray(rests, np.float64)
    base, slope = np.linalg.lstsq(columns, target, rcond=None)[0]
    if base < 0:
        base, slope = 0.0, float(columns[:, 1] @ target / (columns[:, 1] @ columns[:, 1]))
    if slope < 0:
        base, slope = float(target.mean()), 0.0
    return Memory(base_bytes=float(base), per_weight_byte=float(slope))


def error_summary(errors: Sequence[float]) -> Errors:
    """What errors come to: the median of their sizes, and where the middle 95 % of them end."""
    low, high = np.percentile(errors, [2.5, 97.5])
    return Errors(median=float(np.median(np.abs(errors))), low=float(low), high=float(high), samples=len(errors))


def read_calibration(path: Path | None = None) -> Calibration:
    """The calibration in a file, by default the shipped one. Raises InputError or CorruptArtifactError."""
    file = path or shipped("targets") / SHIPPED
    try:
        return Calibration.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file} cannot be read: {error.strerror}; name a file made by benchmarks/roofline_error.py"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CorruptArtifactError(
            f"{file} is no calibration: {key or 'the file'}: {first['msg']}; make it again"
        ) from error
    except UnicodeDecodeError as error:
        raise CorruptArtifactError(f"{file} is no calibration: it is not UTF-8; make it again") from error
