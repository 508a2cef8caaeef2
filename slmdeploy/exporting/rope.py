"""The cosine and sine tables of rotary embedding, from a spec's `Rope`.

Computed by torch in float32 with the same operations as transformers, because at position 8000 one unit in the last
place of a frequency is already an angle error of 5e-4: tables that are mathematically better would fail parity. Covers
plain frequencies (Su et al. 2021), linear scaling (position interpolation, Chen et al. 2023), Llama 3.1's, YaRN (Peng
et al. 2023), LongRoPE (Ding et al. 2024) and dynamic NTK scaling. Knows nothing of graphs.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slmdeploy.exporting.spec import Rope


def rope_tables(rope: Rope, positions: int, *, long: bool = False) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, each [positions, dims / 2]: column j turns elements j and j + dims / 2 of a head.

    long: the frequencies of LongRoPE for sequences beyond the original context.
    """
    angles = torch.arange(positions).float()[:, None] * frequencies(rope, long=long)
    scale = attention_scaling(rope)
    return (angles.cos() * scale).numpy(), (angles.sin() * scale).numpy()


def frequencies(rope: Rope, *, long: bool = False) -> torch.Tensor:
    """Radians per position for each of the dims / 2 planes, float32; those of dynamic scaling within the original."""
    given: dict[str, Any] = dict(rope.parameters)
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.float) / rope.dims
    if rope.kind == "longrope":
        factors = torch.tensor(given["long_factor" if long else "short_factor"], dtype=torch.float32)
        return torch.reciprocal(factors * (rope.theta**exponents))
    plain = torch.reciprocal(rope.theta**exponents)
    match rope.kind:
        case "default" | "dynamic":
            return plain
        case "linear":
            return torch.div(plain, given["factor"])
        case "llama3":
            return _llama3(plain, rope.original, **given)
        case "yarn":
            return _yarn(rope, rope.theta**exponents, given)
    raise AssertionError(rope.kind)


def attention_scaling(rope: Rope) -> float:
    """What cosines and sines are multiplied by: above 1 for the kinds that sharpen attention over long contexts."""
    given: dict[str, Any] = dict(rope.parameters)
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    factor = given["factor"]
    if "attention_factor" in given:
        return float(given["attention_factor"])
    if rope.kind == "longrope":
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original))
    if given.get("mscale") and given.get("mscale_all_dim"):
        return _mscale(factor, given["mscale"]) / _mscale(factor, given["mscale_all_dim"])
    return _mscale(factor)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(
    plain: torch.Tensor, original: int, *, factor: float, low_freq_factor: float, high_freq_factor: float
) -> torch.Tensor:
    """Slow planes are slowed by `factor`, fast ones kept, those between interpolated (Llama 3.1 reference code)."""
    wavelengths = 2 * math.pi / plain
    slowed = torch.where(wavelengths > original / low_freq_factor, plain / factor, plain)
    share = (original / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (wavelengths >= original / high_freq_factor) & (wavelengths <= original / low_freq_factor)
    return torch.where(between, (1 - share) * slowed / factor + share * slowed, slowed)


def _yarn(rope: Rope, powers: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """Planes that turn often within the original context are kept, those that hardly turn are slowed, with a ramp."""
    low, high = (
        rope.dims * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (given.get("beta_fast", 32.0), given.get("beta_slow", 1.0))
    )
    if given.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    if low == high:
        high += 0.001  # as transformers: the ramp needs a width
    ramp = torch.clamp((torch.arange(rope.dims // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    slowed: torch.Tensor = 1.0 / (given["factor"] * powers) * (1 - kept)
    return slowed + 1.0 / powers * kept
