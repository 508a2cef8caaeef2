"""The seam between an engine and what computes: rows in which sequences stand, whatever the graph underneath.

Prompts of a graph of the shared interface (batching.py) are computed in pieces, and what rows have computed is kept for
prompts that begin alike (radix.py); paged_rows.py is its twin for the engine openvino. Any other batch, be it of one,
takes a prompt whole and keeps nothing of it. Knows nothing of requests, sampling or whose turn it is.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .batch_generation import Batch
from .batching import BatchDecoder
from .radix import Node
from .segments import Segment, SegmentTree

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Rows(Protocol):
    """Sequences in the rows 0, 1, …; the last one takes the row of one that leaves. A prompt is filled in behind them.

    Logits are there until the next call that computes. Errors are those of batching.py.
    """

    slots: int

    def begin(self, prompt: Ids, tokens: int) -> int:
        """Begin a sequence that may come to `tokens`; how many tokens of its prompt, never all, are there already."""

    def extend(self, ids: Ids, *, last: bool) -> Floats | None:
        """Run the next ids of the prompt; behind the last of them, their logits, float32 [vocab]."""

    def join(self) -> None:
        """The prompt is whole: its sequence takes part in the steps to come, as the last row."""

    def fork(self) -> None:
        """Put a copy of the last row behind it; only where there are several slots."""

    def abandon(self) -> None:
        """Forget the sequence whose prompt is not whole."""

    def step(self, tokens: Ids) -> Floats:
        """Append tokens[i] to row i, for all rows; the logits, float32 [rows, vocab]."""

    def keep(self, row: int, ids: Sequence[int]) -> None:
        """What the row holds is of these ids, or of their beginning: prompts to come may begin with it."""

    def release(self, row: int) -> None:
        """End the sequence of a row."""

    def shrink(self, size_bytes: int) -> None:
        """Give buffers back that are larger than this; called while there is no sequence."""


class BatchRows:
    """The rows of a BatchDecoder, each of which holds the part of the tree that its sequence shares."""

    def __init__(self, batch: BatchDecoder, tree: SegmentTree) -> None:
        self.slots = batch.slots
        self._batch, self._tree = batch, tree
        self._shared: list[Node[Segment] | None] = []

    def begin(self, prompt: Ids, tokens: int) -> int:
        """See Rows."""
        found = self._tree.find(prompt[:-1].tolist())
        self._batch.begin(tokens, found.pieces)
        return found.length

    def extend(self, ids: Ids, *, last: bool) -> Floats | None:
        """See Rows."""
        return self._batch.extend(ids, last=last)

    def join(self) -> None:
        """See Rows."""
        self._batch.join()
        self._shared.append(None)

    def fork(self) -> None:
        """See Rows."""
        self._batch.fork()
        self._shared.append(None)

    def abandon(self) -> None:
        """See Rows."""
        self._batch.abandon()

    def step(self, tokens: Ids) -> Floats:
        """See Rows."""
        return self._batch.step(tokens)

    def judge(self, tokens: Ids) -> Floats:
        """Append these tokens to row 0, the only one, in one run; the logits behind each, float32 [tokens, vocab]."""
        return self._batch.judge(tokens)

    def take_back(self, tokens: int) -> None:
        """Forget so many of the tokens that row 0, the only one, was given last."""
        self._batch.take_back(tokens)

    def keep(self, row: int, ids: Sequence[int]) -> None:
        """See Rows. What a running sequence shares is held, so that its end need only be put behind it."""
        if not self._tree.capacity:
            return
        held = ids[: self._batch.length(row)]
        try:
            node = self._tree.insert(held, lambda start, stop: self._batch.read(row, start, stop))
        except MemoryError:  # a cache can be done without, what runs cannot
            return
        self._tree.hold(node)
        self._let_go(row)
        self._shared[row] = node

    def _let_go(self, row: int) -> None:
        node = self._shared[row]
        if node is not None:
            self._tree.drop(node)

    def release(self, row: int) -> None:
        """See Rows."""
        self._let_go(row)
        self._shared[row] = self._shared[-1]
        self._shared.pop()
        self._batch.release(row)

    def shrink(self, size_bytes: int) -> None:
        """See Rows."""
        self._batch.shrink(size_bytes)


class WholePrompts:
    """The rows of a batch that takes prompts whole: the pieces of one are collected, and a copy is computed anew."""

    def __init__(self, batch: Batch) -> None:
        self.slots = batch.slots
        self._batch = batch
        self._pieces: list[Ids] = []

    def begin(self, prompt: Ids, tokens: int) -> int:
        """See Rows."""
        self._batch.reserve(tokens)
        self._pieces = []
        return 0

    def extend(self, ids: Ids, *, last: bool) -> Floats | None:
        """See Rows: the last piece runs them all."""
        self._pieces.append(ids)
        return self._batch.admit(np.concatenate(self._pieces)) if last else None

    def join(self) -> None:
        """See Rows; the batch has admitted the sequence already."""

    def fork(self) -> None:
        """See Rows."""
        self._batch.admit(np.concatenate(self._pieces))

    def abandon(self) -> None:
        """See Rows; what was collected is forgotten when the next prompt begins."""

    def step(self, tokens: Ids) -> Floats:
        """See Rows."""
        return self._batch.step(tokens)

    def keep(self, row: int, ids: Sequence[int]) -> None:
        """See Rows; nothing can be read out of this batch."""

    def release(self, row: int) -> None:
        """See Rows."""
        self._batch.release(row)

    def shrink(self, size_bytes: int) -> None:
        """See Rows; the batch looks after its memory itself."""
