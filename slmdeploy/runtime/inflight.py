"""Requests inside an engine: what is known of each between its acceptance and its last event. Nouns only.

stepper.py changes them and nobody else does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .choices import Choice
from .requests import Event, GenerateRequest
from .score_runs import Run

Ids = npt.NDArray[np.int64]
OnEvent = Callable[[Event], None]


@dataclass
class Counts:
    """What a stepper has done since it was made; EngineStats says what each is."""

    requests: int = 0
    steps: int = 0
    batch_sizes: dict[int, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cache_hit_tokens: int = 0
    cache_miss_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    scored_items: int = 0
    failed_requests: int = 0


@dataclass(eq=False)
class Sequence:
    """A choice in the engine. over: it has ended; a row that it has is released behind the run in hand."""

    key: int
    index: int
    request: "Generation"
    choice: Choice | None = None
    over: bool = False


@dataclass(eq=False)
class Generation:
    """A GenerateRequest in the engine. places: tokens that each choice may come to, the prompt among them."""

    number: int
    asked: GenerateRequest
    on_event: OnEvent
    prompt: Ids
    places: int
    sequences: list[Sequence] = field(default_factory=list)
    begun: bool = False
    cached_tokens: int = 0
    made_tokens: int = 0


@dataclass(eq=False)
class Scoring:
    """A ScoreRequest in the engine; `run` is there from its first piece on."""

    number: int
    key: int
    on_event: OnEvent
    prefix: Ids
    items: list[Ids]
    run: Run | None = None

    @property
    def begun(self) -> bool:
        """Whether a piece of it has run."""
        return self.run is not None
