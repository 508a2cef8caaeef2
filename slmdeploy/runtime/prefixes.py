"""What a scorer keeps of the prefixes that it has computed: the last one, and of those before it as many as fit.

The last one stays as it is, so that a repeated prefix costs nothing; what a radix tree keeps has been copied out, and
is put together by another copy where it lies in several edges. Knows nothing of sessions or items.
"""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .radix import common
from .segments import Segment, SegmentTree, joined

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Past:
    """Keys and values of the prefix's first `length` tokens, one float32 [1, length, kv_heads x head_dim] per input."""

    length: int
    rows: Segment

    def beginning(self, length: int) -> "Past":
        """Of it the first `length` tokens."""
        return self if length == self.length else Past(length, [rows[:, :length] for rows in self.rows])


class Prefixes:
    """The prefixes of one scorer. nothing: the past of no tokens."""

    def __init__(self, nothing: Past, tree: SegmentTree) -> None:
        self.tree = tree
        self._tokens: list[int] = []
        self._last = nothing

    def find(self, prefix: Ids) -> Past:
        """What is kept of the longest beginning of a prefix."""
        wanted = prefix.tolist()
        length = min(common(self._tokens, wanted), self._last.length)
        found = self.tree.find(wanted)
        if found.length <= length:
            return self._last.beginning(length)
        past = Past(found.length, joined(found.pieces))
        if past.length == len(wanted):  # so that the next request with it need not join the pieces again
            self._tokens, self._last = wanted, past
        return past

    def keep(self, prefix: Ids, past: Past) -> None:
        """Keep a prefix whose keys and values are all there."""
        self._tokens, self._last = prefix.tolist(), past
        with suppress(MemoryError):  # more than the last one can be done without, its scores cannot
            self.tree.insert(self._tokens, lambda start, stop: [rows[:, start:stop].copy() for rows in past.rows])
