"""Generates: the loop that picks token after token, and the text that comes of it with its stop strings.

Puts together decoding.py, sampling.py and text.py and knows neither files nor sessions. A model has one KV cache, so a
newer generation ends an older one; continuing the older is an error rather than silent nonsense.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .errors import InputError
from .sampling import Sampler, Sampling
from .text import StopStrings, TextCodec

FinishReason = Literal["stop", "length"]


class Decoder(Protocol):
    """What generates: decoding.py's over buffers in place, or standard.py's over past and present."""

    config: RuntimeConfig
    sequence: int

    def reserve(self, tokens: int) -> None: ...
    def prefill(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...
    def step(self, token: int) -> npt.NDArray[np.float32]: ...


class TokenOptions(TypedDict, total=False):
    """How to generate; what is left out is as in `Settings`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    ignore_eos: bool


class TextOptions(TokenOptions, total=False):
    """How to generate text: besides, the strings that end it and are not part of it."""

    stop: Sequence[str]


@dataclass(frozen=True)
class Settings(Sampling):
    """Everything about one generation but its prompt; greedy by default, and an end token ends it."""

    max_new_tokens: int = 128
    ignore_eos: bool = False
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}.")


@dataclass(frozen=True)
class Completion:
    """What `generate` made: the text without stop string or special tokens, and the tokens without the end token.

    finish_reason is "stop" at an end token or stop string, "length" at max_new_tokens or the end of the context.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int


TokenLoop = Callable[[npt.NDArray[np.int64], int, Settings], Iterator[int]]
"""Gives up to so many tokens behind a prompt: one at a time as below, or as speculative.py makes them."""


def room(prompt_tokens: int, context: int, settings: Settings) -> int:
    """How many tokens may be made; InputError if the prompt leaves no place for one."""
    if prompt_tokens >= context:
        raise InputError(
            f"The prompt has {prompt_tokens} tokens, but the context of this model holds {context} and a new token "
            "needs one of them: shorten the prompt."
        )
    return min(settings.max_new_tokens, context - prompt_tokens)


def token_stream(
    decoder: Decoder, prompt: npt.NDArray[np.int64], settings: Settings, loop: TokenLoop | None = None
) -> Iterator[int]:
    """The tokens behind a prompt, each as soon as it is chosen, without the end token; checks before it returns."""
    count = room(prompt.size, decoder.config.max_length, settings)
    return _token_loop(decoder, prompt, count, settings) if loop is None else loop(prompt, count, settings)


def require_same_sequence(decoder: Decoder, sequence: int) -> None:
    """InputError where the decoder's cache no longer holds the sequence of that number."""
    if decoder.sequence != sequence:
        raise InputError("Another generation has begun on this model, which ended this one: load a model for each.")


def _token_loop(decoder: Decoder, prompt: npt.NDArray[np.int64], count: int, settings: Settings) -> Iterator[int]:
    end_ids = () if settings.ignore_eos else decoder.config.eos_token_ids
    pick, step = Sampler(settings, prompt.tolist()).pick, decoder.step
    decoder.reserve(prompt.size + count)
    token = pick(decoder.prefill(prompt))
    sequence = decoder.sequence
    for _ in range(count - 1):
        if token in end_ids:
            return
        yield token
        require_same_sequence(decoder, sequence)
        token = pick(step(token))
    if token not in end_ids:
        yield token


class TextRun:
    """One generation of text. `token_ids` and `finish_reason` hold when `pieces` has ended."""

    def __init__(
        self,
        decoder: Decoder,
        codec: TextCodec,
        prompt_ids: Sequence[int],
        settings: Settings,
        loop: TokenLoop | None = None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason = "stop"
        self._room = room(len(prompt_ids), decoder.config.max_length, settings)
        self._tokens = token_stream(decoder, np.asarray(prompt_ids, np.int64), settings, loop)
        self._detokenizer = codec.detokenizer(prompt_ids)
        self._stops = StopStrings(settings.stop)

    def completion(self) -> Completion:
        """All of it at once."""
        text = "".join(self.pieces())
        return Completion(text, tuple(self.token_ids), self.finish_reason, len(self.prompt_ids))

    def pieces(self) -> Iterator[str]:
        """The text, each piece as soon as no later token can change it."""
        for token in self._tokens:
            self.token_ids.append(token)
            piece = self._stops.feed(self._detokenizer.feed(token))
            if piece:
                yield piece
            if self._stops.matched:
                return
        rest = self._stops.feed(self._detokenizer.flush()) + self._stops.flush()
        if not self._stops.matched and len(self.token_ids) == self._room:
            self.finish_reason = "length"
        if rest:
            yield rest
