"""Guesses for the one sequence of an engine that runs alone: a run over what may follow, and how much of it held.

A guess is certain (speculative.py): from each row of logits the choice takes its own token with its own random numbers,
and the guess only says whether the next row is of use. So what comes out is what comes out without a draft, sampled
text too, to the rounding of kernels. Guesses drawn by odds would be kept more often where text is sampled, but draw
other numbers, and a seed's tokens would depend on when its neighbours came and went. Knows nothing of requests.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .generation import Settings
from .speculative import Drafter, Pace

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class LoneRow(Protocol):
    """Row 0 while it is the only one; see rows.py's BatchRows."""

    def judge(self, tokens: Ids) -> Floats: ...
    def take_back(self, tokens: int) -> None: ...


class LoneDrafting:
    """What drafts, for one sequence after the other, and the row that its guesses are judged in."""

    def __init__(self, drafter: Drafter, row: LoneRow) -> None:
        self._drafter, self._row = drafter, row
        self._key: int | None = None
        """The sequence that the drafter reads; another one takes its place as soon as that runs alone."""
        self._read = 0
        self._pace = Pace(drafter.cost)

    def guess(self, key: int, prompt: Sequence[int], made: Sequence[int], left: int) -> list[int]:
        """What may follow the tokens `made` behind a prompt, perhaps nothing; the sequence may have `left` more."""
        if key != self._key:
            self._drafter.begin(prompt, Settings())
            self._key, self._read, self._pace = key, 0, Pace(self._drafter.cost)
        new, self._read = made[self._read :], len(made)
        # One token comes of the run itself, so the last one of all need not be guessed.
        return list(self._drafter.propose(new, self._pace.length(left - 1)).tokens)

    def run(self, last: int, guesses: Sequence[int]) -> Floats:
        """The logits behind the newest token and behind each guess, float32 [1 + guesses, vocab]."""
        return self._row.judge(np.array([last, *guesses], np.int64))

    def used(self, guesses: Sequence[int], accepted: int) -> None:
        """The logits behind the newest token and the first `accepted` guesses were of use; the others are forgotten."""
        self._row.take_back(len(guesses) - accepted)
        self._pace.learn(len(guesses), accepted)
