"""Runs model.onnx: prefill, one-token steps, all logits, and batches for checks. Ids in, logits out.

Knows nothing of text, sampling or stopping. The step is what counts: the token's buffer, the KV buffers and the row of
logits are bound once; a step writes one integer, binds the attention mask that is one longer (a ready OrtValue over one
shared array of ones), runs, and the caller reads the row where it is: 3–4 µs of Python per greedy token in all.
A batch is one prefill without a past, because ONNX Runtime refuses several tokens behind a past when the batch is > 1.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .bundle import RuntimeConfig
from .errors import InputError
from .kv import KvCache, too_long
from .session import Binding, as_value, check_interface, kv_names, open_session

GRAPH = "model.onnx"
_INPUTS = ("input_ids", "attention_mask", "logits_positions")


def width_masks(capacity: int) -> list[ort.OrtValue]:
    """The attention mask of every width up to `capacity`, at its width, all over the memory of one array of ones."""
    ones = np.ones((1, capacity), np.int64)
    return [as_value(ones[:, :width]) for width in range(capacity + 1)]


def token_array(ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int64]:
    """Token ids as int64 [length]; InputError if there is none or one outside the vocabulary."""
    array = np.asarray(ids, np.int64).reshape(-1)
    if array.size == 0:
        raise InputError("There are no tokens: give at least one.")
    if array.min() < 0 or array.max() >= vocab_size:
        odd = array[(array < 0) | (array >= vocab_size)][0]
        raise InputError(f"The token id {odd} is outside the vocabulary, 0 to {vocab_size - 1}.")
    return array


def padded(rows: Sequence[npt.NDArray[np.int64]], limit: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and attention mask [rows, width] of a right-padded batch; InputError for a row of more than `limit`."""
    width = max(row.size for row in rows)
    if width > limit:
        raise too_long(width, limit)
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, : row.size], mask[i, : row.size] = row, 1
    return ids, mask


class Decoder:
    """model.onnx with the KV cache of one sequence."""

    def __init__(self, folder: Path, config: RuntimeConfig, threads: int) -> None:
        self.config = config
        self.cache = KvCache(config)
        self.sequence = 0
        """Counts the sequences begun, so that whoever continues one can tell that the cache still holds it."""
        self._path = folder / GRAPH
        self._session = open_session(self._path, threads=threads, spinning=config.spinning)
        check_interface(self._session, self._path, config, dict.fromkeys(_INPUTS, "int64"), "logits")
        self._masks: list[ort.OrtValue] = []
        self._token = np.zeros((1, 1), np.int64)
        self._flat_token = self._token.reshape(-1)
        self._row = np.zeros((1, config.vocab_size), np.float32)
        self._last: npt.NDArray[np.float32] = self._row.reshape(-1)
        self._step = Binding(self._session, self._path)
        self._step.set_input("input_ids", as_value(self._token))
        self._step.set_input("logits_positions", as_value(np.zeros(1, np.int64)))
        self._step.set_output("logits", as_value(self._row))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all, so that no later step has to grow the cache."""
        if self.cache.reserve(tokens):
            self._masks = width_masks(self.cache.capacity)
            self.cache.bind(self._step)

    def prefill(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Start anew with these ids; the last position's logits, float32 [vocab], overwritten by the next call."""
        self._extend(ids, np.array([ids.size - 1]), self._row)
        return self._last

    def logits(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Start anew with these ids; the logits of all positions, float32 [length, vocab], the caller's own."""
        rows = np.empty((ids.size, self.config.vocab_size), np.float32)
        self._extend(ids, np.arange(ids.size), rows)
        return rows

    def _extend(
        self, ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], rows: npt.NDArray[np.float32]
    ) -> None:
        self.sequence += 1
        self.cache.truncate(0)
        self.reserve(ids.size)
        self.run_prompt(ids, positions, rows, self.cache.bind)
        self.cache.advance(ids.size)

    def run_prompt(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        rows: npt.NDArray[np.float32],
        bind_kv: Callable[[Binding], None],
    ) -> None:
        """Run the beginning of a sequence: its keys and values go into the buffers that `bind_kv` binds for one row.

        Logits at `positions` go into `rows`, float32 [positions, vocab]. The one way in which prompts are computed,
        for the sequence of this decoder and for those of a batch (batching.py).
        """
        binding = Binding(self._session, self._path)
        binding.set_input("input_ids", as_value(ids.reshape(1, -1)))
        binding.set_input("attention_mask", as_value(np.ones((1, ids.size), np.int64)))
        binding.set_input("logits_positions", as_value(positions))
        binding.set_output("logits", as_value(rows))
        bind_kv(binding)
        binding.run()

    def binding(self) -> Binding:
        """A new binding of the session that steps run in, for steps of a batch."""
        return Binding(self._session, self._path)

    def step(self, token: int) -> npt.NDArray[np.float32]:
        """Append one token; the logits behind it, float32 [vocab], overwritten by the next call."""
        width = self.cache.length + 1
        if width > self.cache.capacity:
            self.reserve(width)
        self._flat_token[0] = token
        self._step.set_input("attention_mask", self._masks[width])
        self._step.run()
        self.cache.length = width
        return self._last

    def batch(self, rows: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        """One right-padded prefill over rows of unequal lengths; the last logits of each, float32 [vocab].

        Touches nothing of the sequence in the cache.
        """
        ids, mask = padded(rows, self.config.max_length)
        width = ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "logits_positions": np.array([i * width + row.size - 1 for i, row in enumerate(rows)]),
        }
        logits = np.empty((len(rows), self.config.vocab_size), np.float32)
        binding = Binding(self._session, self._path)
        for name, array in feeds.items():
            binding.set_input(name, as_value(array))
        binding.set_output("logits", as_value(logits))
        names = zip(*kv_names(self.config.layers), strict=True)
        heads = (heads for heads in self.config.kv_heads for _ in range(2))
        for (past, present), count in zip(names, heads, strict=True):
            value = as_value(np.zeros((len(rows), count, width, self.config.head_dim), np.float32))
            binding.set_input(past, value)
            binding.set_output(present, value)
        binding.run()
        return list(logits)
