"""One choice of a request on its way: logits in, an event out, and why it ended.

Everything that is a choice's own is here: sampler and seed, constraint, stop strings, half characters, how many tokens
it may have. Knows nothing of batches, caches or other choices, so a choice gets what it would get alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .errors import InputError
from .generation import FinishReason, room
from .requests import ChoiceDone, EndReason, GenerateRequest, TokenConstraint, TokenEvent
from .sampling import Sampler
from .text import StopStrings, TextCodec

Floats = npt.NDArray[np.float32]


class Choice:
    """Choice `index` of a request. `finish` is why it ended, None while it goes on."""

    def __init__(self, request: GenerateRequest, index: int, codec: TextCodec, config: RuntimeConfig) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish: FinishReason | None = None
        self._room = room(len(request.prompt_ids), config.max_length, request.settings)
        self._end_ids = () if request.settings.ignore_eos else config.eos_token_ids
        seed = request.settings.seed
        sampling = request.settings if seed is None else replace(request.settings, seed=seed + index)
        self._sampler = Sampler(sampling, request.prompt_ids)
        self._constraint = request.constraint() if request.constraint is not None else None
        self._logprobs = request.logprobs
        self._detokenizer = codec.detokenizer(request.prompt_ids)
        self._stops = StopStrings(request.settings.stop)

    def take(self, logits: Floats) -> TokenEvent | None:
        """Choose the token behind these logits, float32 [vocab]; None where it is an end token."""
        token = self._sampler.pick(logits if self._constraint is None else constrained(logits, self._constraint))
        if token in self._end_ids:
            self.finish = "stop"
            return None
        self.token_ids.append(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        text = self._stops.feed(self._detokenizer.feed(token))
        if self._stops.matched or (self._constraint is not None and self._constraint.finished):
            self.finish = "stop"
        elif self.left == 0:
            self.finish = "length"
        if self._logprobs is None:
            return TokenEvent(self.index, token, text)
        return TokenEvent(self.index, token, text, *log_probabilities(logits, token, self._logprobs))

    @property
    def left(self) -> int:
        """How many tokens it may still have."""
        return self._room - len(self.token_ids)

    def done(self, reason: EndReason) -> ChoiceDone:
        """The choice has ended: with the text that was held back, in which a stop string may still become whole."""
        if self._stops.matched:
            return ChoiceDone(self.index, reason)
        rest = self._stops.feed(self._detokenizer.flush()) + self._stops.flush()
        return ChoiceDone(self.index, "stop" if self._stops.matched else reason, rest)


def constrained(logits: Floats, constraint: TokenConstraint) -> Floats:
    """A copy in which no token is possible but those that the constraint allows."""
    allowed = constraint.allowed()
    if allowed.shape != logits.shape:
        raise InputError(f"A constraint of shape {allowed.shape} does not fit a vocabulary of {logits.size} tokens.")
    if not allowed.any():
        raise InputError("The constraint allows no token here: no text of this vocabulary satisfies it.")
    return np.where(allowed, logits, np.float32(-np.inf))


def log_probabilities(logits: Floats, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural logarithm of a token's probability, and those of the `count` most probable tokens, best first."""
    wide = logits.astype(np.float64)
    best = wide.max()
    total = float(best + np.log(np.exp(wide - best).sum()))
    return float(wide[token]) - total, tuple((i, float(wide[i]) - total) for i in most_probable(logits, count))


def most_probable(logits: Floats, count: int) -> Sequence[int]:
    """The `count` tokens of the largest logits, the largest first and of equals the smaller id."""
    count = min(count, logits.size)
    if count == 0:
        return ()
    least = np.partition(logits, -count)[-count]
    tokens = np.flatnonzero(logits >= least)
    ranked: list[int] = tokens[np.argsort(-logits[tokens], kind="stable")][:count].tolist()
    return ranked
