"""The rows of an engine over pages: prompts that begin alike, choices of one prompt and the cache share them.

The twin of rows.py's BatchRows for builds of the engine openvino. The radix tree counts whole pages: what it calls a
token is all tokens of a page, and what it keeps is the page itself, so nothing is copied but a page that is not full.
Knows nothing of requests, sampling or whose turn it is.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .kv import too_long
from .openvino_decoding import PIECE
from .openvino_pages import PagedRuns, PagedSequence
from .radix import RadixTree
from .segments import token_bytes

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class PagedRows:
    """See rows.py's Rows. cache_bytes: of pages kept for prompts to come, counted as float32."""

    def __init__(self, runs: PagedRuns, slots: int, cache_bytes: int) -> None:
        self.slots = slots
        self.page = runs.pool.page
        self._runs, self._pool = runs, runs.pool
        capacity = cache_bytes // (self.page * token_bytes(runs.config))
        self.tree: RadixTree[list[int]] = RadixTree(capacity, _split, self._give_back)
        self._sequences: list[PagedSequence] = []
        self._staged = PagedSequence()

    def begin(self, prompt: Ids, tokens: int) -> int:
        """See Rows."""
        if tokens > self._runs.config.max_length:
            raise too_long(tokens, self._runs.config.max_length)
        found = self.tree.find(self._pages_of(prompt[:-1].tolist()))
        self._staged = self._share([page for pages, count in found.pieces for page in pages[:count]])
        return self._staged.length

    def _pages_of(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The tokens of each page that these ids fill."""
        return [tuple(ids[at : at + self.page]) for at in range(0, len(ids) - self.page + 1, self.page)]

    def _share(self, pages: list[int]) -> PagedSequence:
        """A sequence that holds these full pages besides those who hold them already."""
        return self._pool.fork(PagedSequence(pages, len(pages) * self.page))

    def _give_back(self, pages: list[int]) -> None:
        self._pool.release(PagedSequence(pages, len(pages) * self.page))

    def extend(self, ids: Ids, *, last: bool) -> Floats | None:
        """See Rows."""
        wanted = np.arange(ids.size - 1, ids.size) if last else np.zeros(0, np.int64)
        logits = self._runs.run_pieces(self._staged, ids, wanted, PIECE)[-1]
        return logits[0] if last else None

    def join(self) -> None:
        """See Rows."""
        self._sequences.append(self._staged)
        self._staged = PagedSequence()

    def fork(self) -> None:
        """See Rows."""
        self._sequences.append(self._pool.fork(self._sequences[-1]))

    def abandon(self) -> None:
        """See Rows."""
        self._pool.release(self._staged)

    def step(self, tokens: Ids) -> Floats:
        """See Rows."""
        parts = [(sequence, tokens[row : row + 1]) for row, sequence in enumerate(self._sequences)]
        return self._runs.run(parts, np.arange(len(parts)))

    def keep(self, row: int, ids: Sequence[int]) -> None:
        """See Rows."""
        held = self._sequences[row]
        self.tree.insert(
            self._pages_of(ids[: held.length]), lambda start, stop: self._share(held.pages[start:stop]).pages
        )

    def release(self, row: int) -> None:
        """See Rows."""
        self._pool.release(self._sequences[row])
        self._sequences[row] = self._sequences[-1]
        self._sequences.pop()

    def shrink(self, size_bytes: int) -> None:
        """See Rows; the pool takes free pages again before it grows, and never becomes smaller."""


def _split(pages: list[int], at: int) -> tuple[list[int], list[int]]:
    return pages[:at], pages[at:]
