"""Runs model.onnx: prefill, one-token steps, all logits, and batches for checks. Ids in, logits out.

A build may have prefill.onnx beside it, the same model in a form that is faster for many tokens at once: prompts run
there, steps in model.onnx, over one KV cache. Prompts run in chunks, because their attention then computes less that is
masked, and what lies between two operators stays in the processor's cache.
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
from .cuda_cache import DeviceKvCache
from .errors import InputError
from .kv import KvCache, too_long
from .session import Binding, as_value, check_interface, kv_names, open_session

GRAPH, PREFILL = "model.onnx", "prefill.onnx"
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
        self.cache = KvCache(config) if config.provider == "cpu" else DeviceKvCache(config)
        self.prefill_chunk = config.prefill_chunk
        """Prompts run in pieces of so many tokens, 0 for all at once; may change between prompts."""
        self.step_rows = config.step_rows
        """Steps of a batch of so many rows or more run in the graph of prompts, 0 for none; asked as they are bound."""
        self.sequence = 0
        """Counts the sequences begun, so that whoever continues one can tell that the cache still holds it."""
        self._session, self._path = _open(folder / GRAPH, config, threads)
        self._prefill = _open(folder / PREFILL, config, threads) if config.own_prefill else (self._session, self._path)
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
        self._begin(ids.size)
        self.run_prompt(ids, self._row, self.cache.bind)
        self.cache.advance(ids.size)
        return self._last

    def logits(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Start anew with these ids; the logits of all positions, float32 [length, vocab], the caller's own.

        In two runs at most. Where prompts have a graph of their own, the first half of the ids are one and the others
        are what model.onnx makes of steps behind it, so that every position is computed as it would be in use.
        """
        rows = np.empty((ids.size, self.config.vocab_size), np.float32)
        cut = (ids.size + 1) // 2 if self.config.own_prefill else ids.size
        self._begin(ids.size)
        self._run(self._prefill, ids[:cut], 0, rows[:cut], self.cache.bind)
        if cut < ids.size:
            self._run((self._session, self._path), ids[cut:], cut, rows[cut:], self.cache.bind)
        self.cache.advance(ids.size)
        return rows

    def _begin(self, tokens: int) -> None:
        self.sequence += 1
        self.cache.truncate(0)
        self.reserve(tokens)

    def run_prompt(
        self,
        ids: npt.NDArray[np.int64],
        row: npt.NDArray[np.float32] | None,
        bind_kv: Callable[[Binding], None],
        *,
        past: int = 0,
    ) -> None:
        """Run a prompt, or go on with it behind its first `past` tokens, which the buffers hold already.

        Its keys and values go into the buffers that `bind_kv` binds for one row. The last position's logits go into
        `row`, float32 [1, vocab], where there is one. The one way in which prompts are computed, for the sequence of
        this decoder and for those of a batch (batching.py).
        """
        chunk = self.prefill_chunk or ids.size
        for start in range(0, ids.size, chunk):
            piece = ids[start : start + chunk]
            last = start + chunk >= ids.size
            self._run(self._prefill, piece, past + start, row if last else None, bind_kv)

    def _run(
        self,
        graph: tuple[ort.InferenceSession, Path],
        ids: npt.NDArray[np.int64],
        past: int,
        rows: npt.NDArray[np.float32] | None,
        bind_kv: Callable[[Binding], None],
    ) -> None:
        """One run over `ids` behind `past` tokens that the cache holds; the logits of the last of them fill `rows`."""
        wanted = 0 if rows is None else len(rows)
        binding = Binding(*graph)
        binding.set_input("input_ids", as_value(ids.reshape(1, -1)))
        binding.set_input("attention_mask", as_value(np.ones((1, past + ids.size), np.int64)))
        binding.set_input("logits_positions", as_value(np.arange(ids.size - wanted, ids.size)))
        if rows is not None:
            binding.set_output("logits", as_value(rows))
        bind_kv(binding)
        binding.run()

    def binding(self, rows: int) -> Binding:
        """A new binding of the session that steps of a batch of so many rows run in."""
        return Binding(*self._prefill) if 0 < self.step_rows <= rows else Binding(self._session, self._path)

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

    def extend(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Append given tokens in one run of model.onnx; the logits behind each, float32 [length, vocab], the caller's.

        As many steps would give, to the rounding of kernels. For those who know what follows, as whoever judges it.
        """
        self.reserve(self.cache.length + ids.size)
        rows = self.run_given(ids, self.cache.bind, past=self.cache.length)
        self.cache.advance(ids.size)
        return rows

    def run_given(
        self, ids: npt.NDArray[np.int64], bind_kv: Callable[[Binding], None], *, past: int
    ) -> npt.NDArray[np.float32]:
        """What `extend` does, in the buffers that `bind_kv` binds for one row, behind the `past` tokens they hold."""
        rows = np.empty((ids.size, self.config.vocab_size), np.float32)
        self._run((self._session, self._path), ids, past, rows, bind_kv)
        return rows

    def resume(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Append given tokens as those of a prompt; the logits behind the last, float32 [vocab], as `step` gives them.

        For many tokens, of which only the last one's logits are of use.
        """
        self.reserve(self.cache.length + ids.size)
        self.run_prompt(ids, self._row, self.cache.bind, past=self.cache.length)
        self.cache.advance(ids.size)
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
        binding = Binding(*self._prefill)
        for name, array in feeds.items():
            binding.set_input(name, as_value(array))
        binding.set_output("logits", as_value(logits))
        names = zip(*kv_names(self.config.layers), strict=True)
        heads = (heads for heads in self.config.kv_heads for _ in range(2))
        for (past, present), count in zip(names, heads, strict=True):
            value = as_value(np.zeros((len(rows), count, width, self.config.head_dim), self.config.cache))
            binding.set_input(past, value)
            binding.set_output(present, value)
        binding.run()
        return list(logits)


def _open(path: Path, config: RuntimeConfig, threads: int) -> tuple[ort.InferenceSession, Path]:
    """The session of a generating graph whose interface is that of runtime.json, and the path for errors."""
    session = open_session(
        path,
        threads=threads,
        spinning=config.spinning,
        as_written=config.numerics_only,
        provider=config.provider,
    )
    check_interface(session, path, config, dict.fromkeys(_INPUTS, "int64"), "logits")
    return session, path
