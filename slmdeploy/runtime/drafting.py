"""Where guesses of the next tokens come from: a smaller model of the same vocabulary, or the text itself.

The smaller model is another build, such as the pruned and distilled student of the target. Prompt lookup needs none:
where the last tokens have stood in the sequence before, it guesses that what followed then follows again, as in
summaries, edits and code. Knows nothing of the target: speculative.py judges.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from .decoding import Decoder
from .generation import Settings
from .sampling import Logits, Odds, Sampler
from .speculative import MOST_DRAFTED, Ids, Proposal

NGRAMS = (4, 3, 2)
"""Lengths of the ends that are looked for, the longest first: the longer the match, the likelier what follows."""
AT_ONCE = 256
"""Tokens of a text that a draft reads between two tokens of the target, which must not wait for a long prompt."""
_OWN_STREAM = 1 << 64
"""Added to a seed, because a draft must not draw the numbers by which its guesses are judged."""


class PromptLookup:
    """Guesses that the sequence goes on as it did where its last tokens stood before. Costs nothing to speak of."""

    cost = 0.0

    def __init__(self) -> None:
        self._text: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        """The place behind the latest occurrence of each run of tokens that something follows."""

    def begin(self, prompt: Sequence[int], settings: Settings) -> None:
        """See Drafter."""
        self._text, self._behind = [], {}
        self._append(prompt)

    def propose(self, tokens: Sequence[int], count: int) -> Proposal:
        """See Drafter."""
        self._append(tokens)
        ends = (tuple(self._text[-length:]) for length in NGRAMS)
        place = next((self._behind[end] for end in ends if end in self._behind), None)
        if place is None:
            return Proposal()
        found = self._text[place : place + count]
        for _ in range(count - len(found)):  # text that repeats itself goes on repeating what was guessed
            found.append(found[len(found) - (len(self._text) - place)])
        return Proposal(found)

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for length in NGRAMS:
                if length <= len(self._text):
                    self._behind[tuple(self._text[-length:])] = len(self._text)
            self._text.append(token)


class ModelDraft:
    """Guesses with a smaller model that has the target's vocabulary, drawn as the target is asked to draw.

    It leaves out the repetition penalty, which costs guesses and no exactness. Behind the end of its own context it
    guesses nothing, nor before it has read the text, of which one call runs no more than AT_ONCE tokens. cost: of its
    step, in steps of the target.
    """

    def __init__(self, decoder: Decoder, cost: float) -> None:
        self.cost = cost
        self._decoder = decoder
        self._text: list[int] = []
        self._guessed: Sequence[int] = ()
        self._held = 0
        """Tokens of the text that the cache holds for certain; guesses may stand behind them."""
        self._sequence = -1
        """The decoder's number of that sequence: whoever else uses the model begins another one."""
        self._sampler = Sampler(Settings(), ())
        self._greedy = True

    def begin(self, prompt: Sequence[int], settings: Settings) -> None:
        """See Drafter. Nothing runs yet: the target's first token does not wait for the draft's prompt."""
        seed = None if settings.seed is None else settings.seed + _OWN_STREAM
        self._sampler = Sampler(replace(settings, repetition_penalty=1.0, seed=seed), ())
        self._greedy = settings.temperature == 0
        self._text, self._guessed, self._held = list(prompt), (), 0

    def propose(self, tokens: Sequence[int], count: int) -> Proposal:
        """See Drafter."""
        kept = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, self._guessed[:-1], strict=False))
        self._held += sum(1 for _ in kept)
        self._guessed = ()
        self._text += tokens
        count = min(count, self._decoder.config.max_length - len(self._text))
        if count < 1:
            return Proposal()
        guessed: list[int] = []
        odds: list[Odds] = []
        row = self._row_behind_text(count)
        if row is None:
            return Proposal()
        while True:
            if not self._greedy:
                odds.append(self._sampler.odds(row))
            guessed.append(self._sampler.pick(row) if self._greedy else self._sampler.draw(odds[-1]))
            if len(guessed) == count:
                break
            row = self._decoder.step(guessed[-1])
        self._guessed = guessed
        return Proposal(guessed, odds)

    def _row_behind_text(self, count: int) -> Logits | None:
        """Bring the cache towards the end of the text; the logits behind it, float32 [vocab], once it is there."""
        held = self._held if self._decoder.sequence == self._sequence else 0
        new = np.array(self._text[held : held + AT_ONCE], np.int64)
        self._held = held + new.size
        row = self._behind(held, new, len(self._text) + count)
        return row if self._held == len(self._text) else None

    def _behind(self, held: int, new: Ids, expected: int) -> Logits:
        """Run new tokens behind the `held` ones; their last logits. The text may soon have `expected` tokens."""
        if held == 0:
            self._decoder.reserve(expected)
            row = self._decoder.prefill(new)
            self._sequence = self._decoder.sequence
            return row
        self._decoder.cache.truncate(held)
        if new.size == 1:
            return self._decoder.step(int(new[0]))
        # A few tokens are those of an earlier run and one more: the graph of steps is the better one for them.
        return self._decoder.extend(new)[-1] if new.size <= MOST_DRAFTED + 1 else self._decoder.resume(new)
