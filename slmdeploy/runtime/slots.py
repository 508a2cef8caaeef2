"""The KV cache of a batch: per layer one buffer for keys and one for values, a row of it for each sequence.

The rows in use are always the first ones, so that a step over them computes nothing for rows that are free; a row is
contiguous, so that a prompt can be run straight into it. The row behind them may be *staged*: it is filled with the
prompt of a sequence that is not in use yet. All rows have the same capacity, which doubles as the longest sequence
grows; untouched memory is not committed by the system. Knows nothing of tokens or of who owns a row.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .errors import InputError, ResourceError
from .kv import too_long
from .segments import Segment
from .session import Binding, as_value, kv_names

_SMALLEST = 128


class SlotCache:
    """Keys and values of up to `slots` sequences, [slots, kv_heads of the layer, capacity, head_dim] each.

    lengths: tokens that each row holds, int64 [slots]; those of rows that are not in use mean nothing.
    """

    def __init__(self, config: RuntimeConfig, slots: int) -> None:
        if slots < 1:
            raise InputError(f"A batch needs room for at least 1 sequence, not {slots}.")
        self.slots, self.limit = slots, config.max_length
        self.used = 0
        self.staged: int | None = None
        """Tokens in the row behind those in use; None where that row is free."""
        self.capacity = 0
        self.lengths = np.zeros(slots, np.int64)
        self._heads = [heads for heads in config.kv_heads for _ in range(2)]
        self._dim, self._type = config.head_dim, np.dtype(config.cache)
        self._names = list(zip(*kv_names(config.layers), strict=True))
        self._buffers: list[npt.NDArray[np.floating]] = []

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
            grown = [np.zeros((self.slots, heads, capacity, self._dim), self._type) for heads in self._heads]
        except MemoryError:
            raise ResourceError(
                f"There is no memory for a KV cache of {self.slots} x {capacity} tokens; use a smaller batch."
            ) from None
        for old, new in zip(self._buffers, grown, strict=False):
            for row, length in self._held():
                new[row, :, :length] = old[row, :, :length]
        self._buffers, self.capacity = grown, capacity
        return True

    def _held(self) -> Iterator[tuple[int, int]]:
        """Each row that holds something, with its number of tokens."""
        yield from enumerate(self.lengths[: self.used].tolist())
        if self.staged is not None:
            yield self.used, self.staged

    def stage(self, pieces: Sequence[tuple[Segment, int]] = ()) -> None:
        """Begin to fill the first free row, with copies of the given number of tokens of each segment."""
        assert self.used < self.slots, "a batch holds no more sequences than it has slots"
        assert self.staged is None, "one row is staged at a time"
        self.staged = 0
        for segment, count in pieces:
            for buffer, part in zip(self._buffers, segment, strict=True):
                buffer[self.used, :, self.staged : self.staged + count] = part[:, :count]
            self.staged += count

    def join(self) -> None:
        """The staged row is in use from now on."""
        assert self.staged is not None, "only a staged row can join those in use"
        self.lengths[self.used], self.staged = self.staged, None
        self.used += 1

    def fork(self) -> None:
        """Put a copy of the last row in use behind it, in use too."""
        assert self.used < self.slots, "a batch holds no more sequences than it has slots"
        assert self.staged is None, "the copy would overwrite the staged row"
        self._move(self.used - 1, self.used, int(self.lengths[self.used - 1]))
        self.lengths[self.used] = self.lengths[self.used - 1]
        self.used += 1

    def remove(self, row: int) -> None:
        """Forget the sequence in `row`; the one in the last row takes its place, and a staged row moves up."""
        assert 0 <= row < self.used, "only a row in use can be released"
        last = self.used = self.used - 1
        if row != last:
            self.lengths[row] = self.lengths[last]
            self._move(last, row, int(self.lengths[last]))
        if self.staged is not None:
            self._move(last + 1, last, self.staged)

    def _move(self, source: int, target: int, tokens: int) -> None:
        for buffer in self._buffers:
            buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def read(self, row: int, start: int, stop: int) -> Segment:
        """A copy of what a row holds for the tokens start to stop."""
        return [buffer[row, :, start:stop].copy() for buffer in self._buffers]

    def clear(self) -> None:
        """Give the memory back; nothing is held."""
        assert not list(self._held()), "rows that hold a sequence cannot be given back"
        self._buffers, self.capacity = [], 0

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
