"""The parity ladder: does one model give the same logits as another, in every way in which a graph can go wrong?

Each rung drives both sides with the same random tokens: lengths 1 and odd, a prompt followed by 64 cached steps, a
right-padded batch of unequal lengths, the last position of the longest context, sequences of unequal lengths decoded
together, and scores of candidates packed behind one prefix against one sequence each. Tokens are forced, so that one
near-tie cannot send the two sides apart. Serves torch against the fp32 graph in export/, and that graph against a
build. Knows nothing of either: it asks for token ids in, logits out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
STEPS = 64
LONGEST = 1024
"""A longer context is checked up to here: at 8192 the two sides take minutes even for 135M parameters."""
SELF_LIMIT = 0.02
"""How far a quantised build may be from itself: its kernels round activations differently for one row than for many
(0.006 measured with MatMulNBits), while a misplaced token, mask or position is off by the logits' own size."""
_PROMPT = 21
_ROWS = (5, 1, 17, 12)
_BATCH_STEPS = (4, 9, 3, 6)
"""Steps of each row decoded together: rows leave at different times, and the last joins when the first has left."""
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
    """What can also score, label logits [items, labels] of items packed behind one prefix, and decode in batches."""

    def batch_decode(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> Sequence[Floats]:
        """Of each sequence, decoded together, the rows behind its prompt and each forced token [1 + tokens, vocab]."""

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

    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> Floats:
        """The rows behind the prompt and behind each of the tokens, all from one run over all of them.

        A few rows behind a long prompt are run one by one: a head over all positions would cost more than that.
        """
        if len(tokens) * len(tokens) < len(prompt):
            return _in_steps(self, prompt, tokens)
        return self._model.logits([*prompt, *tokens])[len(prompt) - 1 :]

    def batch_logits(self, rows: Sequence[Sequence[int]]) -> list[Floats]:
        """Last position's row of each sequence, one after the other."""
        return [self._model.prefill(row).copy() for row in rows]


@dataclass(frozen=True)
class Check:
    """What is asked of each side for one rung, or for several that come of one run: name and rows of each in `parts`.

    The reference answers with rows of logits [n, vocabulary]; the candidate with the same, or with the `columns` of
    them. The two sides are asked apart, so that they need not be in memory together.
    """

    parts: tuple[tuple[str, slice], ...]
    reference: Callable[[Logits], Floats]
    candidate: Callable[[Scores], Floats]
    columns: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The names of its rungs."""
        return ", ".join(name for name, _ in self.parts)

    def rungs(self, expected: Floats, found: Floats, limit: float) -> list[Rung]:
        """The verdicts on the two answers."""
        return [compare(name, expected[rows], found[rows], self.columns, limit) for name, rows in self.parts]


def climb(
    reference: Logits,
    candidate: Scores,
    *,
    vocab_size: int,
    max_length: int,
    label_ids: Sequence[int] | None = None,
    batches: bool = False,
    limit: float,
    seed: int = 0,
) -> Iterator[Rung]:
    """Every rung of the ladder as it is measured, whether or not an earlier one passed.

    label_ids: the scorer's label tokens, None for a model that does not score. batches: whether the candidate decodes
    several sequences together. Lengths shrink to a context that is shorter than they are.
    """
    for check in checks(vocab_size=vocab_size, max_length=max_length, label_ids=label_ids, batches=batches, seed=seed):
        yield from check.rungs(check.reference(reference), check.candidate(candidate), limit)


def checks(
    *,
    vocab_size: int,
    max_length: int,
    label_ids: Sequence[int] | None = None,
    batches: bool = False,
    seed: int = 0,
) -> Iterator[Check]:
    """What `climb` asks, in its order, for callers that ask one side before the other."""
    draw = _Checks(vocab_size, max_length, np.random.default_rng(seed))
    yield draw.length(1)
    if max_length > 1:
        yield draw.length(min(_PROMPT, max_length - 1 + max_length % 2))
        yield draw.steps()
        yield draw.batch()
        yield draw.longest()
        if batches:
            yield draw.batched_steps()
        if label_ids is not None:
            yield draw.scores(tuple(label_ids))


@dataclass
class _Checks:
    vocab_size: int
    max_length: int
    random: np.random.Generator

    def length(self, tokens: int) -> Check:
        ids = self._tokens(tokens)
        return _alike(f"all logits, length {tokens}", lambda model: model.logits(ids))

    def steps(self) -> Check:
        count = min(STEPS, self.max_length - 1)
        prompt = self._tokens(min(_PROMPT, self.max_length - count))
        tokens = self._tokens(count)
        parts = ((f"prefill of {len(prompt)}", slice(0, 1)), (f"{count} decode steps", slice(1, None)))

        def ask(model: Logits) -> Floats:
            return _teacher_forced(model, prompt, tokens)

        return Check(parts, ask, ask)

    def batch(self) -> Check:
        rows = [self._tokens(min(length, self.max_length)) for length in _ROWS]
        lengths = ", ".join(str(len(row)) for row in rows)
        return _alike(f"right-padded batch of {lengths}", lambda model: np.stack(model.batch_logits(rows)))

    def batched_steps(self) -> Check:
        steps = [min(count, self.max_length - 1) for count in _BATCH_STEPS]
        prompts = [self._tokens(min(length, self.max_length - n)) for length, n in zip(_ROWS, steps, strict=True)]
        tokens = [self._tokens(count) for count in steps]

        def apart(model: Logits) -> Floats:
            return np.concatenate([_teacher_forced(model, *pair) for pair in zip(prompts, tokens, strict=True)])

        lengths = ", ".join(str(len(prompt)) for prompt in prompts)
        return Check(
            ((f"decoded together behind {lengths}", slice(None)),),
            apart,
            lambda model: np.concatenate(model.batch_decode(prompts, tokens)),
        )

    def longest(self) -> Check:
        length = min(self.max_length, LONGEST)
        tokens = self._tokens(length)
        name = "maximum length" if length == self.max_length else f"of a maximum of {self.max_length}, length"
        return _alike(f"{name} {length}", lambda model: _teacher_forced(model, tokens[:-1], tokens[-1:]))

    def scores(self, label_ids: tuple[int, ...]) -> Check:
        prefix = self._tokens(max(1, min(_PREFIX, self.max_length - max(_ITEMS))))
        items = [self._tokens(min(length, self.max_length - len(prefix))) for length in _ITEMS]
        return Check(
            ((f"{len(items)} items packed, one by one in the reference", slice(None)),),
            lambda model: np.stack([model.logits([*prefix, *item])[-1] for item in items]),
            lambda model: model.score_ids(prefix, items),
            columns=label_ids,
        )

    def _tokens(self, count: int) -> list[int]:
        return [int(token) for token in self.random.integers(0, self.vocab_size, count)]


def _alike(name: str, ask: Callable[[Logits], Floats]) -> Check:
    return Check(((name, slice(None)),), ask, ask)


def _teacher_forced(model: Logits, prompt: list[int], tokens: list[int]) -> Floats:
    return model.forced(prompt, tokens) if isinstance(model, Alone) else _in_steps(model, prompt, tokens)


def _in_steps(model: Logits, prompt: Sequence[int], tokens: Sequence[int]) -> Floats:
    rows = [model.prefill(prompt).copy()]
    rows += [model.decode(token).copy() for token in tokens]
    return np.stack(rows)


def compare(name: str, expected: Floats, found: Floats, columns: tuple[int, ...] | None, limit: float) -> Rung:
    """The verdict on two answers [n, vocabulary], or on the `columns` of the first and all of the second."""
    # Two label words say little of how large the model's logits are: measured by all of the row, as elsewhere.
    scale = max(1.0, float(np.abs(expected).max()))
    expected = expected if columns is None else expected[:, columns]
    assert expected.shape == found.shape, f"{name}: {expected.shape} against {found.shape}"
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return Rung(name, math.inf, math.inf, limit, False)
    largest = float(np.abs(expected - found).max())
    return Rung(name, largest, largest / scale, limit, largest / scale <= limit)
