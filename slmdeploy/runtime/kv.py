"""The KV cache of one sequence: one buffer per layer for keys and one for values, bound as past and present alike.

GroupQueryAttention writes new keys behind the old ones in place when past and present share memory, so a step copies
nothing. The buffers have room for `capacity` tokens and hold `length`; `reserve` grows them by doubling, up to the
context, and keeps what they hold, so a short prompt does not pay for a long context. Layers may differ in their number
of heads (pruning). Knows nothing of tokens, positions or sessions beyond the names that it binds.
"""

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .errors import InputError, ResourceError
from .session import Binding, as_value, kv_names

_SMALLEST = 128


class KvCache:
    """Keys and values of one sequence, [1, kv_heads of the layer, capacity, head_dim] each, of the type `cache`."""

    def __init__(self, config: RuntimeConfig) -> None:
        self.limit = config.max_length
        self.length = 0
        self.capacity = 0
        self._heads = [heads for heads in config.kv_heads for _ in range(2)]
        self._dim, self._type = config.head_dim, np.dtype(config.cache)
        self._names = list(zip(*kv_names(config.layers), strict=True))
        self._buffers: list[npt.NDArray[np.floating]] = []

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers together; the system commits them only as they are written."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` in all; true when the buffers moved, so that bindings have to be made anew.

        Raises InputError when that is more than the context, ResourceError when there is no memory for it.
        """
        if tokens > self.limit:
            raise too_long(tokens, self.limit)
        if tokens <= self.capacity:
            return False
        capacity = min(self.limit, max(tokens, 2 * self.capacity, _SMALLEST))
        try:
            grown = [np.zeros((1, heads, capacity, self._dim), self._type) for heads in self._heads]
        except MemoryError:
            raise ResourceError(f"There is no memory for a KV cache of {capacity} tokens; use less context.") from None
        for old, new in zip(self._buffers, grown, strict=False):
            new[:, :, : self.length] = old[:, :, : self.length]
        self._buffers, self.capacity = grown, capacity
        return True

    def advance(self, tokens: int) -> None:
        """Count tokens that a run has written behind the others."""
        assert self.length + tokens <= self.capacity, "a run wrote behind the end of the KV cache"
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; the next run overwrites them."""
        assert 0 <= length <= self.length, "a KV cache can only become shorter by truncate"
        self.length = length

    def bind(self, binding: Binding) -> None:
        """Bind every buffer as past and as present."""
        for (past, present), buffer in zip(self._names, self._buffers, strict=True):
            value = as_value(buffer)
            binding.set_input(past, value)
            binding.set_output(present, value)


def too_long(tokens: int, limit: int) -> InputError:
    """The error for a sequence of more tokens than the context."""
    return InputError(f"{tokens} tokens are needed at once, but the context of this model holds {limit}.")
