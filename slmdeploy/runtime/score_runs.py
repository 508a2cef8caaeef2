"""A request to score as pieces, between which an engine does other work, whichever scorer computes it.

The scorer of score.onnx has pieces of its own (scoring.py). One that takes a request whole gets its items in groups; it
keeps the last prefix, so a group costs no more than its items. Knows nothing of who asks.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .blocks import pack
from .scoring import RUN_TOKENS, Scorer

Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


class WholeScorer(Protocol):
    """What scores all items of a request in one call and keeps its prefix for the next."""

    def score(self, prefix: Ids, items: Sequence[Ids]) -> Scores:
        """Label logits at the last token of each item behind the prefix, float32 [items, labels]."""


class Run(Protocol):
    """A request on its way; the scores, float32 [items, labels], hold when it is done."""

    cached_tokens: int

    @property
    def done(self) -> bool: ...
    @property
    def scores(self) -> Scores: ...
    def advance(self) -> None: ...


class GroupedRun:
    """A request of which group after group of items is scored. What was found of its prefix is not known, so 0."""

    cached_tokens = 0

    def __init__(self, scorer: WholeScorer, prefix: Ids, items: Sequence[Ids]) -> None:
        self._scorer, self._prefix = scorer, prefix
        self._groups = [[items[i] for i in group] for group in pack([item.size for item in items], RUN_TOKENS)]
        self._found: list[Scores] = []

    @property
    def done(self) -> bool:
        """See Run."""
        return len(self._found) == len(self._groups)

    @property
    def scores(self) -> Scores:
        """See Run."""
        return np.concatenate(self._found)

    def advance(self) -> None:
        """Score the next group."""
        self._found.append(self._scorer.score(self._prefix, self._groups[len(self._found)]))


def begin_run(scorer: Scorer | WholeScorer, prefix: Ids, items: Sequence[Ids]) -> Run:
    """Begin a request; nothing is computed before its first `advance`."""
    return scorer.begin(prefix, items) if isinstance(scorer, Scorer) else GroupedRun(scorer, prefix, items)
