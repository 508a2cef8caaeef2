"""Speculative decoding: a draft guesses several tokens, one run of the target judges them all. Exact.

One run over k tokens reads the target's weights once, as one step does, so tokens that were guessed right are nearly
free. What comes out is the target's own: `Sampler.judge` keeps a guess or replaces it so that greedy output is the same
and sampled output is distributed the same (Leviathan et al. 2023, Fast inference from transformers via speculative
decoding; Chen et al. 2023, Accelerating large language model decoding with speculative sampling). How many are guessed
follows from how many were kept (`Pace`), on no clock, so that a seed gives the same tokens everywhere. Knows nothing of
text or of where guesses come from (drafting.py): a `Drafter` proposes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .decoding import Decoder
from .generation import Settings, require_same_sequence
from .sampling import Odds, Sampler

Ids = npt.NDArray[np.int64]

MOST_DRAFTED = 8
"""Tokens guessed at once: the kernels of most CPUs compute more than they read beyond so many rows."""
ROW_COST = 0.2
"""What a further row adds to a step, in steps: 8 rows take 2.1 to 2.9 times as long as one (docs/performance.md)."""
_PRIOR = (3.0, 4.0)
"""Kept and judged guesses that a sequence is taken to begin with."""
_MEMORY = 0.9
"""The share of what was counted before that counts after a further run: text changes its nature."""
_PROBE = 16
"""Where drafting does not pay, every so many runs one guess is made all the same, to see whether it does again."""


@dataclass(frozen=True)
class Proposal:
    """Guessed tokens, and of each the odds that it was drawn from; `odds` is empty where nothing was drawn."""

    tokens: Sequence[int] = ()
    odds: Sequence[Odds] = ()

    def places(self) -> Iterator[tuple[int, Odds | None]]:
        """Each token with its odds."""
        return zip(self.tokens, self.odds or repeat(None), strict=False)


class Drafter(Protocol):
    """Where guesses come from. cost: of one guess, in steps of the target."""

    cost: float

    def begin(self, prompt: Sequence[int], settings: Settings) -> None:
        """Forget what was; the sequence begins with these tokens."""

    def propose(self, tokens: Sequence[int], count: int) -> Proposal:
        """The sequence has grown by these tokens: guess at most `count` that follow, perhaps none."""


@dataclass
class DraftCounts:
    """What drafting came to in one generation: runs of the target behind its prompt, guesses, and those kept.

    tokens: those given out behind the first one, which comes of the prompt.
    """

    target_runs: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-ready: the counts; acceptance, kept per guess; tokens_per_run. None where nothing was counted."""
        acceptance = self.accepted / self.drafted if self.drafted else None
        per_run = self.tokens / self.target_runs if self.target_runs else None
        return {**vars(self), "acceptance": acceptance, "tokens_per_run": per_run}


def best_length(acceptance: float, draft_cost: float, most: int) -> int:
    """How many tokens to guess, 0 to `most`, so that a unit of time makes the most tokens.

    acceptance: probability that a guess is kept when those before it were. Of k guesses (1 - a^(k+1)) / (1 - a) tokens
    come (Leviathan et al. 2023, equation 1) in the time of 1 + k (ROW_COST + draft_cost) steps.

    >>> best_length(0.9, 0.0, 8), best_length(0.5, 0.1, 8), best_length(0.1, 0.0, 8)
    (8, 1, 0)
    """

    def rate(length: int) -> float:
        return sum(acceptance**power for power in range(length + 1)) / (1 + length * (ROW_COST + draft_cost))

    return max(range(most + 1), key=rate)


@dataclass
class Pace:
    """How many tokens to guess next, from what became of those before; a sequence has its own."""

    draft_cost: float
    _kept: float = _PRIOR[0]
    _judged: float = _PRIOR[1]
    _idle: int = 0

    def length(self, most: int) -> int:
        """Guesses for the next run, at most `most`."""
        found = best_length(self._kept / self._judged, self.draft_cost, min(most, MOST_DRAFTED))
        self._idle = 0 if found else self._idle + 1
        return min(most, 1) if self._idle and self._idle % _PROBE == 0 else found

    def learn(self, drafted: int, accepted: int) -> None:
        """Of `drafted` guesses the first `accepted` were kept: behind one that is not, none was judged."""
        if not drafted:
            return
        self._kept = _MEMORY * self._kept + accepted
        self._judged = _MEMORY * self._judged + min(accepted + 1, drafted)


@dataclass
class Speculation:
    """Generates with a target and what drafts for it; `counts` are those of the latest generation."""

    target: Decoder
    drafter: Drafter
    counts: DraftCounts = field(default_factory=DraftCounts)

    def tokens(self, prompt: Ids, count: int, settings: Settings) -> Iterator[int]:
        """Up to `count` tokens behind a prompt, without the end token; as generation.py's loop gives them."""
        end_ids = () if settings.ignore_eos else self.target.config.eos_token_ids
        sampler = Sampler(settings, prompt.tolist())
        counts = self.counts = DraftCounts()
        self.target.reserve(prompt.size + count)
        made = [sampler.pick(self.target.prefill(prompt))]
        sequence = self.target.sequence
        pace = Pace(self.drafter.cost)
        self.drafter.begin(prompt.tolist(), settings)
        given = 0
        while True:
            for token in made:
                if token in end_ids:
                    return
                given, counts.tokens = given + 1, given
                yield token
                require_same_sequence(self.target, sequence)
            if given == count:
                return
            # One token comes of the run itself, so the last one of all need not be guessed.
            proposal = self.drafter.propose(made, pace.length(count - given - 1))
            made = self._judged(made[-1], proposal, sampler, counts)
            pace.learn(len(proposal.tokens), len(made) - 1)

    def _judged(self, last: int, proposal: Proposal, sampler: Sampler, counts: DraftCounts) -> list[int]:
        """The target's tokens behind `last`, which it has not seen yet: the guesses that it keeps, and one of its own.

        Afterwards the cache holds all tokens of the sequence but the newest.
        """
        counts.target_runs += 1
        if not proposal.tokens:
            return [sampler.pick(self.target.step(last))]
        held = self.target.cache.length
        rows = self.target.extend(np.array([last, *proposal.tokens], np.int64))
        made: list[int] = []
        for row, (drafted, odds) in zip(rows, proposal.places(), strict=False):
            made.append(sampler.judge(row, drafted, odds))
            if made[-1] != drafted:
                break
        else:
            made.append(sampler.pick(rows[-1]))
        self.target.cache.truncate(held + len(made))
        counts.drafted += len(proposal.tokens)
        counts.accepted += len(made) - 1
        return made
