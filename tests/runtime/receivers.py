"""How tests of the engine ask: requests in short, and receivers that wait for the last event."""

import threading
from typing import Any

from slmdeploy.runtime.engine import Engine
from slmdeploy.runtime.generation import Settings
from slmdeploy.runtime.requests import (
    ChoiceDone,
    Event,
    Failed,
    Finished,
    GenerateRequest,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
    Usage,
)

PROMPTS = [(0, 5, 60, 7, 111), (9,), (10, 33, 4, 8, 8, 21, 90, 14, 3, 2, 77), (44, 45), (6, 7, 8, 200), (100,) * 20]
PATIENCE_S = 60


class Receiver:
    """Collects the events of one request and lets a test wait for the last."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | ScoreEvent | Failed):
            self._ended.set()

    def last(self) -> Event:
        assert self._ended.wait(PATIENCE_S)
        assert sum(isinstance(event, Finished | ScoreEvent | Failed) for event in self.events) == 1
        return self.events[-1]

    def tokens(self, choice: int = 0) -> list[int]:
        return [e.token_id for e in self.events if isinstance(e, TokenEvent) and e.choice == choice]

    def text(self, choice: int = 0) -> str:
        parts = (e for e in self.events if isinstance(e, TokenEvent | ChoiceDone) and e.choice == choice)
        return "".join(part.text for part in parts)

    def reason(self, choice: int = 0) -> str:
        (done,) = (e for e in self.events if isinstance(e, ChoiceDone) and e.choice == choice)
        return done.finish_reason

    def error(self) -> Exception:
        last = self.last()
        assert isinstance(last, Failed)
        return last.error

    def usage(self) -> Usage:
        last = self.last()
        assert isinstance(last, Finished)
        return last.usage


def generation(prompt: tuple[int, ...], **options: Any) -> GenerateRequest:
    names = ("n", "logprobs", "constraint", "priority", "deadline")
    own = {name: options.pop(name) for name in names if name in options}
    return GenerateRequest(prompt, Settings(**options), **own)


def submit(engine: Engine, *requests: GenerateRequest | ScoreRequest) -> list[Receiver]:
    receivers = [Receiver() for _ in requests]
    for request, receiver in zip(requests, receivers, strict=True):
        engine.submit(request, receiver)
    return receivers
