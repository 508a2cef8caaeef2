"""Keys and values of some successive tokens, copied out of a cache: what a prefix cache keeps of a sequence.

One array per input of a graph's past, with the tokens on axis 1: float32 [kv_heads, tokens, head_dim] of a row of
slots.py, float32 [1, tokens, kv_heads x head_dim] of scoring.py. Buffers are contiguous, so what is kept is copied out
and in; a segment that shared memory with another would keep that memory alive when the other is given up.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .radix import RadixTree

Floats = npt.NDArray[np.float32]
Segment = list[Floats]
SegmentTree = RadixTree[Segment]


def token_bytes(config: RuntimeConfig) -> int:
    """Bytes of keys and values of one token, over all layers."""
    return sum(config.kv_heads) * config.head_dim * 2 * np.dtype(config.cache).itemsize


def segment_tree(size_bytes: int, config: RuntimeConfig) -> SegmentTree:
    """A tree of segments that together have at most so many bytes."""
    return RadixTree(size_bytes // token_bytes(config), split)


def split(segment: Segment, at: int) -> tuple[Segment, Segment]:
    """The segments of the first `at` tokens and of the others, each with memory of its own."""
    return [part[:, :at].copy() for part in segment], [part[:, at:].copy() for part in segment]


def joined(pieces: Sequence[tuple[Segment, int]]) -> Segment:
    """One contiguous segment of the given number of tokens of each; with a single piece a view of it."""
    parts = zip(*([part[:, :count] for part in segment] for segment, count in pieces), strict=True)
    return [views[0] if len(views) == 1 else np.concatenate(views, axis=1) for views in parts]
