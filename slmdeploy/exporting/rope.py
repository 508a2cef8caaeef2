"""The cosine and sine tables of rotary embedding, from a spec's `Rope`.

Computed by torch in float32 with the same operations as transformers, because at position 8000 one unit in the last
place of a frequency is already an angle error of 5e-4: tables that are mathematically better would fail parity. Covers
plain, linearly scaled (position interpolation, Chen et al. 2023) and Llama 3.1 frequencies. Knows nothing of graphs.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from slmdeploy.exporting.spec import Rope


def rope_tables(rope: Rope, head_dim: int, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, each [positions, head_dim / 2]: column j turns elements j and j + head_dim / 2."""
    angles = torch.arange(positions).float()[:, None] * frequencies(rope, head_dim)
    return angles.cos().numpy(), angles.sin().numpy()


def frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians per position for each of the head_dim / 2 planes, float32."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    parameters = dict(rope.parameters)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / parameters["factor"]
    assert rope.kind == "llama3", rope.kind
    return _llama3(plain, **parameters)


def _llama3(
    plain: torch.Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> torch.Tensor:
    """Slow planes are slowed by `factor`, fast ones kept, those between interpolated (Llama 3.1 reference code)."""
    wavelengths = 2 * math.pi / plain
    slowed = torch.where(wavelengths > original_max_position_embeddings / low_freq_factor, plain / factor, plain)
    share = (original_max_position_embeddings / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (wavelengths >= original_max_position_embeddings / high_freq_factor) & (
        wavelengths <= original_max_position_embeddings / low_freq_factor
    )
    return torch.where(between, (1 - share) * slowed / factor + share * slowed, slowed)
