"""Runs a decoder build of the engine openvino: one sequence, or several together. Ids in, logits out.

Have the methods of decoding.py's Decoder and of batching.py's BatchDecoder, over pages of keys and values in place of
buffers (openvino_pages.py). Long prompts run in pieces, so that what one layer hands to the next stays in the
processor's cache. Knows nothing of text, sampling or who made the model.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .kv import too_long
from .openvino_pages import PagedRuns, PagedSequence

PIECE = 512
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_LAST = np.zeros(1, np.int64)


class PagedDecoder:
    """A paged model with the keys and values of one sequence."""

    def __init__(self, runs: PagedRuns) -> None:
        self.config = runs.config
        self.sequence = 0
        """Counts the sequences begun, so that whoever continues one can tell that it is still there."""
        self._runs = runs
        self._own = PagedSequence()

    def reserve(self, tokens: int) -> None:
        """Raise InputError when `tokens` are more than the context; pages are taken as they are needed."""
        if tokens > self.config.max_length:
            raise too_long(tokens, self.config.max_length)

    def prefill(self, ids: Ids) -> Floats:
        """Start anew with these ids; the last position's logits, float32 [vocab]."""
        row: Floats = self._start(ids, np.array([ids.size - 1]))[-1][-1]
        return row

    def logits(self, ids: Ids) -> Floats:
        """Start anew with these ids; the logits of all positions, float32 [length, vocab], the caller's own."""
        return np.concatenate(self._start(ids, np.arange(ids.size)))

    def _start(self, ids: Ids, positions: Ids) -> list[Floats]:
        self.reserve(ids.size)
        self.sequence += 1
        self._runs.pool.release(self._own)
        return self._runs.run_pieces(self._own, ids, positions, PIECE)

    def step(self, token: int) -> Floats:
        """Append one token; the logits behind it, float32 [vocab], overwritten by the next call."""
        row: Floats = self._runs.run([(self._own, np.array([token], np.int64))], _LAST)[0]
        return row

    def batch(self, rows: Sequence[Ids]) -> list[Floats]:
        """All rows in one run, of unequal lengths; the last logits of each, float32 [vocab].

        Touches nothing of the sequence that steps continue.
        """
        sequences = [PagedSequence() for _ in rows]
        last = np.cumsum([row.size for row in rows]) - 1
        try:
            return list(self._runs.run(list(zip(sequences, rows, strict=True)), last).copy())
        finally:
            for sequence in sequences:
                self._runs.pool.release(sequence)


class PagedBatch:
    """Up to `slots` sequences that run together; they join and leave between steps."""

    def __init__(self, runs: PagedRuns, slots: int) -> None:
        self.slots = slots
        self._runs = runs
        self._sequences: list[PagedSequence] = []

    @property
    def used(self) -> int:
        """Sequences in the batch; they have the rows 0 to used - 1."""
        return len(self._sequences)

    @property
    def full(self) -> bool:
        """Whether a sequence has to leave before another can join."""
        return self.used == self.slots

    def reserve(self, tokens: int) -> None:
        """Raise InputError when `tokens` are more than the context; pages are taken as they are needed."""
        if tokens > self._runs.config.max_length:
            raise too_long(tokens, self._runs.config.max_length)

    def admit(self, ids: Ids) -> Floats:
        """Run a prompt, int64 [length], in the next row; the logits behind it, float32 [vocab], the caller's own."""
        assert not self.full, "a sequence has to be released before another is admitted"
        self.reserve(ids.size)
        sequence = PagedSequence()
        try:
            row: Floats = self._runs.run_pieces(sequence, ids, np.array([ids.size - 1]), PIECE)[-1][0]
        except BaseException:
            self._runs.pool.release(sequence)
            raise
        self._sequences.append(sequence)
        return row

    def step(self, tokens: Ids) -> Floats:
        """Append tokens[i] to the sequence of row i, for all rows in use; their logits, float32 [used, vocab].

        They are overwritten by the next run. Raises InputError when a row is full to the end of the context.
        """
        assert tokens.shape == (self.used,) != (0,), "a step takes one token for each sequence"
        parts = [(sequence, tokens[i : i + 1]) for i, sequence in enumerate(self._sequences)]
        return self._runs.run(parts, np.arange(self.used))

    def release(self, row: int) -> None:
        """End the sequence of `row`; the sequence of the last row takes its place."""
        last = self._sequences.pop()
        if row < self.used:
            last, self._sequences[row] = self._sequences[row], last
        self._runs.pool.release(last)
