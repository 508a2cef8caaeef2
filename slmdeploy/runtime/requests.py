"""What an engine is asked and what it answers: requests, events, settings and figures. Nouns only, no behaviour.

The contract between engine.py and whoever serves it. Of each request the events come in order and from the engine's
thread: Begun; then for a GenerateRequest any number of TokenEvent, one ChoiceDone for each choice, and Finished; for a
ScoreRequest one ScoreEvent. A request that ends while it waits has no Begun, and Failed may come instead of what is
still missing. So the last event of a request is exactly one Finished, ScoreEvent or Failed. Knows neither models nor
threads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from .errors import InputError, SlmdeployError
from .generation import Settings

EndReason = Literal["stop", "length", "cancelled", "deadline"]


class TokenConstraint(Protocol):
    """What the next token of one choice may be, as a grammar or a JSON schema has it. Holds the state of that choice.

    The engine calls it from its own thread: `allowed` before each token, then `accept` with the token chosen, unless
    that is an end token. An error out of it fails the request it belongs to and no other.
    """

    @property
    def finished(self) -> bool:
        """Whether nothing may follow; the choice then ends with the reason "stop"."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [vocab]: the tokens that may come next, end tokens among them where the text may end here."""

    def accept(self, token: int) -> None:
        """Go on behind this token."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Continue a prompt, `n` times over; the prompt is computed once.

    logprobs: how many alternatives each TokenEvent brings beside the log-probability of its token; None for neither.
    With n > 1 choice i is seeded with settings.seed + i. Stop strings are in `settings`. deadline: a time.monotonic()
    at which what is unfinished ends. priority: a smaller one goes first.
    """

    prompt_ids: tuple[int, ...]
    settings: Settings
    n: int = 1
    logprobs: int | None = None
    constraint: Callable[[], TokenConstraint] | None = None
    priority: int = 0
    deadline: float | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"n must be 1 or more, not {self.n}.")
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"logprobs must be 0 or more, not {self.logprobs}.")


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Label logits at the end of each item behind one prefix; priority and deadline as in GenerateRequest."""

    prefix_ids: tuple[int, ...]
    items: tuple[tuple[int, ...], ...]
    priority: int = 0
    deadline: float | None = None


Request = GenerateRequest | ScoreRequest


@dataclass(frozen=True, slots=True)
class Begun:
    """The request waits no longer: what comes next is its prompt, or its first scores."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token of a choice, and the text that has become certain with it, perhaps none. End tokens have no event.

    logprob: natural logarithm of its probability by the model itself, before penalty, temperature, filters and
    constraint; top: (token id, logprob) of the most probable tokens, best first. None and () where not asked for.
    """

    choice: int
    token_id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceDone:
    """A choice has ended. text: what was held back for a character or stop string that never became whole."""

    choice: int
    finish_reason: EndReason
    text: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: of its prompt, counted once; of those the ones found in the cache; made in all choices."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """All choices have ended."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class ScoreEvent:
    """logits: float32 [items, labels]; cached_tokens: tokens of the prefix found in the cache."""

    logits: npt.NDArray[np.float32]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request has ended with an error of runtime/errors.py, whose message is a sentence for the user.

    A ScoreRequest that was cancelled or ran out of time ends with RequestCancelledError or DeadlineError; one with
    choices tells so in their ChoiceDone.
    """

    error: SlmdeployError


Event = Begun | TokenEvent | ChoiceDone | Finished | ScoreEvent | Failed


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request that was accepted; what `cancel` takes."""

    number: int


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How much an engine does at once.

    slots: sequences decoded together. kv_bytes: keys and values that the running sequences may come to, None for all
    slots to the end of the context. prefix_cache_bytes: keys and values kept of ended ones. prefill_tokens_per_step:
    tokens of prompts between two steps of decoding. max_waiting: requests accepted and not begun.
    """

    slots: int = 8
    kv_bytes: int | None = None
    prefix_cache_bytes: int = 256 << 20
    prefill_tokens_per_step: int = 256
    max_waiting: int = 256

    def __post_init__(self) -> None:
        least = {"slots": 1, "prefix_cache_bytes": 0, "prefill_tokens_per_step": 1, "max_waiting": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise InputError(f"{name} must be {limit} or more, not {getattr(self, name)}.")
        if self.kv_bytes is not None and self.kv_bytes < 1:
            raise InputError(f"kv_bytes must be 1 or more, not {self.kv_bytes}.")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of an engine. Those of `now` may go down, all others count from its start.

    healthy: whether it runs and computes; false for good once it does not, with `failure` saying why.
    """

    healthy: bool = True
    failure: str = ""
    draining: bool = False
    # now
    queued: int = 0
    """Requests accepted and not begun."""
    running: int = 0
    """Requests begun and not ended."""
    kv_tokens_used: int = 0
    """Places of keys and values set aside for running sequences, to the most that each may come to."""
    kv_tokens_capacity: int = 0
    cache_tokens_used: int = 0
    """Tokens in the prefix caches of prompts and of scores."""
    cache_tokens_capacity: int = 0
    # since the start
    requests: int = 0
    """Requests accepted."""
    steps: int = 0
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    """Steps of decoding by the number of sequences in them."""
    prompt_tokens: int = 0
    """Tokens of prompts and prefixes that came in, found in a cache or not."""
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """Tokens that were guessed for a sequence that ran alone."""
    accepted_tokens: int = 0
    """Guesses of which each saved a step: behind it the same run gave a further token."""
    scored_items: int = 0
    failed_requests: int = 0
