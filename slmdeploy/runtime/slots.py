"""The KV cache of a batch: per layer one buffer for keys and one for values, a row of it for each sequence.

The rows in use are always the first ones, so that a step over them computes nothing for rows that are free; a row is
contiguous, so that a prompt can be run straight into it. All rows have the same capacity, which doubles as the longest
sequence grows; untouched memory is not committed by the system. Knows nothing of tokens or of who owns a row.
"""

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .errors import InputError, ResourceError
from .kv import too_long
from .session import Binding, as_value, kv_names

_SMALLEST = 128


class SlotCache:
    """Keys and values of up to `slots` sequences, float32 [slots, kv_heads of the layer, capacity, head_dim] each.

    lengths: tokens that each row holds, int64 [slots]; those of rows that are not in use mean nothing.
    """

    def __init__(self, config: RuntimeConfig, slots: int) -> None:
        if slots < 1:
            raise InputError(f"A batch needs room for at least 1 sequence, not {slots}.")
        self.slots, self.limit = slots, config.max_length
        self.used = 0
        self.capacity = 0
        self.lengths = np.zeros(slots, np.int64)
        self._heads = [heads for heads in config.kv_heads for _ in range(2)]
        self._dim = config.head_dim
        self._names = list(zip(*kv_names(config.layers), strict=True))
        self._buffers: list[npt.NDArray[np.float32]] = []

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers together; the system commits them only as they are written."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` in each row; true when the buffers moved, so that bindings have to be made anew.

        Raises InputError when that is more than the context, ResourceError when there is no memory for it.
        """
        if tokens > self.limit:
            raise too_long(tokens, self.limit)
        if tokens <= self.capacity:
            return False
        capacity = min(self.limit, max(tokens, 2 * self.capacity, _SMALLEST))
        try:
            grown = [np.zeros((self.slots, heads, capacity, self._dim), np.float32) for heads in self._heads]
        except MemoryError:
            raise ResourceError(
                f"There is no memory for a KV cache of {self.slots} x {capacity} tokens; use a smaller batch."
            ) from None
        for old, new in zip(self._buffers, grown, strict=False):
            for row, length in enumerate(self.lengths[: self.used]):
                new[row, :, :length] = old[row, :, :length]
        self._buffers, self.capacity = grown, capacity
        return True

    def add(self, tokens: int) -> int:
        """Count a sequence of `tokens` in the first free row, into which its prompt has been run; the row."""
        assert self.used < self.slots, "a batch holds no more sequences than it has slots"
        self.lengths[self.used] = tokens
        self.used += 1
        return self.used - 1

    def remove(self, row: int) -> None:
        """Forget the sequence in `row`; the one in the last row takes its place."""
        assert 0 <= row < self.used, "only a row in use can be released"
        last = self.used = self.used - 1
        if row != last:
            length = self.lengths[row] = self.lengths[last]
            for buffer in self._buffers:
                buffer[row, :, :length] = buffer[last, :, :length]

    def bind_row(self, binding: Binding, row: int) -> None:
        """Bind one row of every buffer as past and as present of a batch of 1."""
        self._bind(binding, slice(row, row + 1))

    def bind_used(self, binding: Binding) -> None:
        """Bind the rows in use of every buffer as past and as present."""
        self._bind(binding, slice(0, self.used))

    def _bind(self, binding: Binding, rows: slice) -> None:
        for (past, present), buffer in zip(self._names, self._buffers, strict=True):
            value = as_value(buffer[rows])
            binding.set_input(past, value)
            binding.set_output(present, value)
