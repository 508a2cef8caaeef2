"""The parity ladder: does one model give the same logits as another, in every way in which a graph can go wrong?

Each rung drives both sides with the same random tokens: lengths 1 and odd, a prompt followed by 64 cached steps, a
right-padded batch of unequal lengths, the last position of the longest context, and scores of candidates packed behind
one prefix against one sequence each. Tokens are forced, so that one near-tie cannot send the two sides apart. Serves
torch against the fp32 graph in export/, and that graph against a build. Knows nothing of either: it asks for token ids
in, logits out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
STEPS = 64
LONGEST = 2048
"""A longer context is checked up to here: at 8192 the two sides take minutes even for 135M parameters."""
SELF_LIMIT = 0.02
"""How far a quantised build may be from itself: its kernels round activations differently for one row than for many
(0.006 measured with MatMulNBits), while a misplaced token, mask or position is off by the logits' own size."""
_PROMPT = 21
_ROWS = (5, 1, 17, 12)
_PREFIX, _ITEMS = 19, (4, 1, 7)


class Logits(Protocol):
    """What can be compared. A row of logits is float32 [vocabulary]."""

    def logits(self, input_ids: Sequence[int]) -> Floats:
        """Logits [length, vocabulary] of every position."""

    def prefill(self, input_ids: Sequence[int]) -> Floats:
        """Start anew with these tokens; the last position's row."""

    def decode(self, token: int) -> Floats:
        """Append one token to the sequence that `prefill` began; the row behind it."""

    def batch_logits(self, rows: Sequence[Sequence[int]]) -> Sequence[Floats]:
        """Last position's row of each sequence, computed in one right-padded batch."""


class Scores(Logits, Protocol):
    """What can also score: label logits [items, labels] of items packed behind one prefix."""

    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> Floats: ...


@dataclass(frozen=True)
class Rung:
    """One comparison.

    `difference` is `max_abs_difference` divided by the reference's largest magnitude where that is above 1: absolute
    for small logits, relative for large ones, whose float32 spacing alone may exceed 1e-4.
    """

    name: str
    max_abs_difference: float
    difference: float
    limit: float
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a manifest; a difference that is not finite, which JSON cannot say, is None."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}


class Alone:
    """A model's answers computed the plain way: the whole sequence anew each time, by itself, and nothing kept.

    As the reference of the model's own ladder it tells faults of caching, batching and packing from loss by
    quantisation: `climb(Alone(model), model, limit=SELF_LIMIT, ...)`.
    """

    def __init__(self, model: Logits) -> None:
        self._model = model
        self._ids: list[int] = []

    def logits(self, input_ids: Sequence[int]) -> Floats:
        """The model's own."""
        return self._model.logits(input_ids)

    def prefill(self, input_ids: Sequence[int]) -> Floats:
        """Start anew with these tokens; the last position's row."""
        self._ids = list(input_ids)
        return self._model.prefill(self._ids)

    def decode(self, token: int) -> Floats:
        """The row behind one more token, from all tokens so far."""
        return self.prefill([*self._ids, token])

    def batch_logits(self, rows: Sequence[Sequence[int]]) -> list[Floats]:
        """Last position's row of each sequence, one after the other."""
        return [self._model.prefill(row).copy() for row in rows]


def climb(
    reference: Logits,
    candidate: Scores,
    *,
    vocab_size: int,
    max_length: int,
    label_ids: Sequence[int] | None = None,
    limit: float,
    seed: int = 0,
) -> Iterator[Rung]:
    """Every rung of the ladder as it is measured, whether or not an earlier one passed.

    label_ids: the scorer's label tokens, None for a model that does not score. Lengths shrink to a context that is
    shorter than they are.
    """
    ladder = _Ladder(reference, candidate, vocab_size, max_length, limit, np.random.default_rng(seed))
    yield ladder.length(1)
    if max_length > 1:
        yield ladder.length(min(_PROMPT, max_length - 1 + max_length % 2))
        yield from ladder.steps()
        yield ladder.batch()
        yield ladder.longest()
        if label_ids is not None:
            yield ladder.scores(list(label_ids))


@dataclass
class _Ladder:
    reference: Logits
    candidate: Scores
    vocab_size: int
    max_length: int
    limit: float
    random: np.random.Generator

    def length(self, tokens: int) -> Rung:
        ids = self._tokens(tokens)
        return self._rung(f"all logits, length {tokens}", lambda model: model.logits(ids))

    def steps(self) -> list[Rung]:
        count = min(STEPS, self.max_length - 1)
        prompt = self._tokens(min(_PROMPT, self.max_length - count))
        tokens = self._tokens(count)
        expected, found = (self._teacher_forced(model, prompt, tokens) for model in (self.reference, self.candidate))
        return [
            self._compare(f"prefill of {len(prompt)}", expected[:1], found[:1]),
            self._compare(f"{count} decode steps", expected[1:], found[1:]),
        ]

    def batch(self) -> Rung:
        rows = [self._tokens(min(length, self.max_length)) for length in _ROWS]
        lengths = ", ".join(str(len(row)) for row in rows)
        return self._rung(f"right-padded batch of {lengths}", lambda model: np.stack(model.batch_logits(rows)))

    def longest(self) -> Rung:
        length = min(self.max_length, LONGEST)
        tokens = self._tokens(length)
        name = "maximum length" if length == self.max_length else f"of a maximum of {self.max_length}, length"
        return self._rung(f"{name} {length}", lambda model: self._teacher_forced(model, tokens[:-1], tokens[-1:]))

    def scores(self, label_ids: list[int]) -> Rung:
        prefix = self._tokens(max(1, min(_PREFIX, self.max_length - max(_ITEMS))))
        items = [self._tokens(min(length, self.max_length - len(prefix))) for length in _ITEMS]
        rows = np.stack([self.reference.logits([*prefix, *item])[-1] for item in items])
        name = f"{len(items)} items packed, one by one in the reference"
        # Two label words say little of how large the model's logits are: measured by all of the row, as elsewhere.
        return self._compare(name, rows[:, label_ids], self.candidate.score_ids(prefix, items), largest_of=rows)

    def _teacher_forced(self, model: Logits, prompt: list[int], tokens: list[int]) -> Floats:
        rows = [model.prefill(prompt).copy()]
        rows += [model.decode(token).copy() for token in tokens]
        return np.stack(rows)

    def _tokens(self, count: int) -> list[int]:
        return [int(token) for token in self.random.integers(0, self.vocab_size, count)]

    def _rung(self, name: str, run: Callable[[Logits], Floats]) -> Rung:
        return self._compare(name, run(self.reference), run(self.candidate))

    def _compare(self, name: str, expected: Floats, found: Floats, largest_of: Floats | None = None) -> Rung:
        assert expected.shape == found.shape, f"{name}: {expected.shape} against {found.shape}"
        if not np.isfinite(found).all():
            return Rung(name, math.inf, math.inf, self.limit, False)
        largest = float(np.abs(expected - found).max())
        difference = largest / max(1.0, float(np.abs(expected if largest_of is None else largest_of).max()))
        return Rung(name, largest, difference, self.limit, difference <= self.limit)
