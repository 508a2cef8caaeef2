"""Scores items behind a shared prefix with a paged OpenVINO model: the prefix once, then the items side by side.

Each item is a sequence of its own that shares the prefix's pages, so items of unequal lengths run together without
padding, and no second graph and no second set of weights is needed. The prefix is kept for the next request that has
the same one. Knows nothing of texts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from .bundle import ScoreConfig
from .errors import CorruptArtifactError
from .openvino_decoding import PIECE
from .openvino_pages import PagedRuns, PagedSequence
from .scoring import check_room

RUN_TOKENS = 512
"""Tokens of items in one run: with more, what a layer hands to the next no longer stays in the processor's cache."""
Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


class PagedScorer:
    """A paged model that gives the label logits of items."""

    def __init__(self, runs: PagedRuns, score: ScoreConfig) -> None:
        self._runs = runs
        self._labels = list(score.label_ids)
        self._prefix: Ids = np.zeros(0, np.int64)
        self._kept = PagedSequence()

    def score(self, prefix: Ids, items: Sequence[Ids]) -> Scores:
        """Label logits at the last token of each item behind the prefix, float32 [items, labels]."""
        check_room(prefix, items, self._runs.config.max_length)
        if not np.array_equal(prefix, self._prefix):
            self._keep(prefix)
        scores = np.empty((len(items), len(self._labels)), np.float32)
        for part in batches([item.size for item in items]):
            scores[part] = self._batch([items[i] for i in part])
        if not np.isfinite(scores).all():
            raise CorruptArtifactError(f"{self._runs.path} computes NaN or infinity; its weights are damaged.")
        return scores

    def _keep(self, prefix: Ids) -> None:
        """Have the pages of this prefix in place of those of the last one."""
        self._runs.pool.release(self._kept)
        self._prefix = np.zeros(0, np.int64)
        self._runs.run_pieces(self._kept, prefix, np.zeros(0, np.int64), PIECE)
        self._prefix = prefix.copy()

    def _batch(self, items: list[Ids]) -> Scores:
        sequences: list[PagedSequence] = []
        try:
            sequences.extend(self._runs.pool.fork(self._kept) for _ in items)
            last = np.cumsum([item.size for item in items]) - 1
            logits = self._runs.run(list(zip(sequences, items, strict=True)), last)
        finally:
            for sequence in sequences:
                self._runs.pool.release(sequence)
        labels: Scores = logits[:, self._labels]
        return labels


def batches(lengths: Sequence[int], tokens: int = RUN_TOKENS) -> Iterator[list[int]]:
    """Indices of items that run together, in order: at most `tokens` tokens, or one item that has more."""
    batch: list[int] = []
    held = 0
    for index, length in enumerate(lengths):
        if batch and held + length > tokens:
            yield batch
            batch, held = [], 0
        batch.append(index)
        held += length
    if batch:
        yield batch
