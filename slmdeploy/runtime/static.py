"""Runs model.onnx of the static interface: keys and values in buffers of fixed capacity, into which the graph scatters.

The portable dialect at opset 24 makes such graphs. Past and present are the same buffers, as in decoding.py; instead of
an attention mask the graph is told how many tokens they hold, and it computes over their whole capacity, which doubles
as a sequence grows. Has the methods of decoding.py's Decoder. Knows nothing of text, sampling or who made the graph.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .decoding import GRAPH, padded
from .errors import InputError
from .kv import KvCache
from .session import Binding, as_value, check_interface, kv_names, open_session

_INPUTS = ("input_ids", "cache_lengths", "position_ids")
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class StaticDecoder:
    """model.onnx with the KV buffers of one sequence."""

    def __init__(self, folder: Path, config: RuntimeConfig, threads: int) -> None:
        self.config = config
        self.cache = KvCache(config)
        self.sequence = 0
        """Counts the sequences begun, so that whoever continues one can tell that the cache still holds it."""
        self._path = folder / GRAPH
        if config.provider != "cpu":  # nothing there promises that what is written in place is seen by the next run
            raise InputError(f"{folder} has a static cache, which runs on a CPU alone: export it with --opset 23.")
        self._session = open_session(
            self._path, threads=threads, spinning=config.spinning, as_written=config.numerics_only
        )
        check_interface(self._session, self._path, config, dict.fromkeys(_INPUTS, "int64"), "logits")
        self._token, self._position = np.zeros((2, 1, 1), np.int64)
        self._held = np.zeros(1, np.int64)
        self._row = np.zeros((1, 1, config.vocab_size), np.float32)
        self._last: Floats = self._row.reshape(-1)
        self._step = self._bound(self._token, self._position, self._held, self._row)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all; InputError when that is more than the context."""
        if self.cache.reserve(tokens):
            self.cache.bind(self._step)

    def prefill(self, ids: Ids) -> Floats:
        """Start anew with these ids; the last position's logits, float32 [vocab], overwritten by the next call."""
        self._last[:] = self.logits(ids)[-1]
        return self._last

    def logits(self, ids: Ids) -> Floats:
        """Start anew with these ids; the logits of all positions, float32 [length, vocab], the caller's own."""
        self.sequence += 1
        self.cache.truncate(0)
        self.reserve(ids.size)
        logits = np.empty((1, ids.size, self.config.vocab_size), np.float32)
        binding = self._bound(ids[None], np.arange(ids.size)[None], np.zeros(1, np.int64), logits)
        self.cache.bind(binding)
        binding.run()
        self.cache.advance(ids.size)
        rows: Floats = logits[0]
        return rows

    def step(self, token: int) -> Floats:
        """Append one token; the logits behind it, float32 [vocab], overwritten by the next call."""
        length = self.cache.length
        self.reserve(length + 1)
        self._token[0, 0], self._position[0, 0], self._held[0] = token, length, length
        self._step.run()
        self.cache.advance(1)
        return self._last

    def batch(self, rows: Sequence[Ids]) -> list[Floats]:
        """One right-padded prefill over rows of unequal lengths; the last logits of each, float32 [vocab].

        Touches nothing of the sequence in the cache.
        """
        ids, _ = padded(rows, self.config.max_length)
        logits = np.empty((*ids.shape, self.config.vocab_size), np.float32)
        positions = np.tile(np.arange(ids.shape[1]), (ids.shape[0], 1))
        binding = self._bound(ids, positions, np.zeros(len(rows), np.int64), logits)
        heads = (heads for heads in self.config.kv_heads for _ in range(2))
        for past, present, count in zip(*kv_names(self.config.layers), heads, strict=True):
            value = as_value(np.zeros((len(rows), count, ids.shape[1], self.config.head_dim), self.config.cache))
            binding.set_input(past, value)
            binding.set_output(present, value)
        binding.run()
        return [logits[i, row.size - 1] for i, row in enumerate(rows)]

    def _bound(self, ids: Ids, positions: Ids, held: Ids, logits: Floats) -> Binding:
        binding = Binding(self._session, self._path)
        for name, array in zip(_INPUTS, (ids, held, positions), strict=True):
            binding.set_input(name, as_value(np.ascontiguousarray(array)))
        binding.set_output("logits", as_value(logits))
        return binding
