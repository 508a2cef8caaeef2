"""The KV cache of one sequence on the GPU, for ONNX Runtime's CUDA provider: the twin of kv.py's, which is the host's.

The buffers take the whole context at once, since growing would copy them, and stay on the device: with past and present
in one place GroupQueryAttention writes new keys where they belong. **Not run on a GPU yet.** Knows nothing of sessions
beyond the names that it binds.
"""

import numpy as np
import onnxruntime as ort

from .bundle import RuntimeConfig
from .kv import KvCache, too_long
from .session import Binding

DEVICE = "cuda"


class DeviceKvCache(KvCache):
    """Keys and values of one sequence in the GPU's memory."""

    def __init__(self, config: RuntimeConfig) -> None:
        super().__init__(config)
        self._values: list[ort.OrtValue] = []

    @property
    def size_bytes(self) -> int:
        """Bytes of all buffers together."""
        return sum(int(np.prod(value.shape())) for value in self._values) * self._type.itemsize

    def reserve(self, tokens: int) -> bool:
        """Make room for the context, once; true when that was now. InputError when `tokens` are more than it."""
        if tokens > self.limit:
            raise too_long(tokens, self.limit)
        if self._values:
            return False
        self.capacity = self.limit
        make = ort.OrtValue.ortvalue_from_shape_and_type
        shapes = [(1, heads, self.capacity, self._dim) for heads in self._heads]
        self._values = [make(shape, self._type.type, DEVICE, 0) for shape in shapes]
        return True

    def bind(self, binding: Binding) -> None:
        """Bind every buffer as past and as present."""
        for (past, present), value in zip(self._names, self._values, strict=True):
            binding.set_input(past, value)
            binding.set_output(present, value)
