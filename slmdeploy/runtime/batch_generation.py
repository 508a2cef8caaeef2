"""Generates for many prompts at once: each free place in the batch is taken by the next prompt, until all are done.

What a sequence does with its logits (sampling, stop strings, checks that force its tokens) is its own; the loop only
asks it for the next token. Every sequence gets what it would get alone: it has its own sampler, seeded as there. Knows
neither files nor sessions, and no policy beyond first come, first served.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .generation import Completion, Decoder, FinishReason, Settings, room
from .sampling import Sampler
from .text import StopStrings, TextCodec

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class BatchSequence(Protocol):
    """One sequence of a batch. needed: tokens that it may come to, the prompt among them."""

    prompt: Ids
    needed: int

    def take(self, logits: Floats) -> int | None:
        """The token behind these logits, float32 [vocab], with which the sequence goes on; None when it has ended."""


class Batch(Protocol):
    """What decodes several sequences together: over rows of buffers (batching.py) or pages (openvino_decoding.py).

    What the methods promise is said in batching.py.
    """

    @property
    def slots(self) -> int: ...
    @property
    def full(self) -> bool: ...
    def reserve(self, tokens: int) -> None: ...
    def admit(self, ids: Ids) -> Floats: ...
    def step(self, tokens: Ids) -> Floats: ...
    def release(self, row: int) -> None: ...


class BatchOfOne:
    """The one sequence of a decoder as a batch."""

    slots = 1

    def __init__(self, decoder: Decoder) -> None:
        self.full = False
        self._decoder = decoder

    def reserve(self, tokens: int) -> None:
        """See Batch."""
        self._decoder.reserve(tokens)

    def admit(self, ids: Ids) -> Floats:
        """See Batch."""
        self.full = True
        return self._decoder.prefill(ids)

    def step(self, tokens: Ids) -> Floats:
        """See Batch."""
        logits: Floats = self._decoder.step(int(tokens[0]))[None]
        return logits

    def release(self, row: int) -> None:
        """See Batch; the next prompt overwrites the sequence."""
        self.full = False


def run_batch(decoder: Batch, sequences: Iterable[BatchSequence]) -> None:
    """Run all sequences to their ends, as many together as the decoder has slots; the others join as those leave."""
    for _ in batch_steps(decoder, sequences):
        pass


def batch_steps(decoder: Batch, sequences: Iterable[BatchSequence]) -> Iterator[BatchSequence]:
    """`run_batch` step by step: yields a sequence each time it has been given its next logits, and has made of them
    what it makes of them."""
    waiting = deque(sequences)
    decoder.reserve(max((sequence.needed for sequence in waiting), default=0))
    running: list[BatchSequence] = []
    tokens = np.zeros(decoder.slots, np.int64)
    while waiting or running:
        while waiting and not decoder.full:
            sequence = waiting.popleft()
            token = sequence.take(decoder.admit(sequence.prompt))
            yield sequence
            if token is None:
                decoder.release(len(running))
            else:
                tokens[len(running)] = token
                running.append(sequence)
        if not running:
            return
        logits = decoder.step(tokens[: len(running)])
        # From the end, so that whoever takes the place of one that leaves has been asked already.
        for row in reversed(range(len(running))):
            token = running[row].take(logits[row])
            yield running[row]
            if token is None:
                decoder.release(row)
                running[row], tokens[row] = running[-1], tokens[len(running) - 1]
                running.pop()
            else:
                tokens[row] = token


class TokenSequence:
    """A prompt that is continued under `settings`. `token_ids` and `finish_reason` hold when it has ended."""

    def __init__(self, prompt: Ids, config: RuntimeConfig, settings: Settings) -> None:
        self.prompt = prompt
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason = "stop"
        self._room = room(prompt.size, config.max_length, settings)
        self.needed = prompt.size + self._room
        self._end_ids = () if settings.ignore_eos else config.eos_token_ids
        self._pick = Sampler(settings, prompt.tolist()).pick

    def take(self, logits: Floats) -> int | None:
        """See BatchSequence."""
        token = self._pick(logits)
        if token in self._end_ids:
            return None
        self.token_ids.append(token)
        if self._stops_at(token):
            return None
        if len(self.token_ids) == self._room:
            self.finish_reason = "length"
            return None
        return token

    def _stops_at(self, token: int) -> bool:
        """Whether the sequence ends with this token for a reason beside end tokens and room."""
        return False


class TextSequence(TokenSequence):
    """A prompt whose continuation is text, which a stop string may end."""

    def __init__(self, codec: TextCodec, prompt_ids: Sequence[int], config: RuntimeConfig, settings: Settings) -> None:
        super().__init__(np.asarray(prompt_ids, np.int64), config, settings)
        self._detokenizer = codec.detokenizer(prompt_ids)
        self._stops = StopStrings(settings.stop)
        self._pieces: list[str] = []

    def _stops_at(self, token: int) -> bool:
        self._pieces.append(self._stops.feed(self._detokenizer.feed(token)))
        return self._stops.matched

    def completion(self) -> Completion:
        """The text, once the sequence has ended."""
        if not self._stops.matched:
            self._pieces.append(self._stops.feed(self._detokenizer.flush()) + self._stops.flush())
        reason: FinishReason = "stop" if self._stops.matched else self.finish_reason
        return Completion("".join(self._pieces), tuple(self.token_ids), reason, self.prompt.size)


class ForcedSequence:
    """A prompt that is continued by given tokens: `rows` are the logits behind it and behind each of them."""

    def __init__(self, prompt: Ids, tokens: Ids) -> None:
        self.prompt, self.needed = prompt, prompt.size + tokens.size
        self.rows: list[Floats] = []
        self._tokens = tokens.tolist()

    def take(self, logits: Floats) -> int | None:
        """See BatchSequence."""
        self.rows.append(logits.copy())
        return self._tokens[len(self.rows) - 1] if len(self.rows) <= len(self._tokens) else None
