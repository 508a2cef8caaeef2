"""When requests arrive: all at once, open loop at seeded Poisson times, from clients that wait, or as a trace says.

An open loop keeps to its times however slow the answers are, so a latency that counts from the arrival holds the wait
in the queue, and nothing is left out because the one before it was slow (coordinated omission). Knows no model and no
clock of the machine: driving.py asks what is due and says what was answered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Request = dict[str, Any]


class Source(Protocol):
    """Where requests come from; times are seconds since the driving began."""

    def due(self, now: float) -> list[tuple[float, Request]]:
        """Arrival and request of everything that has arrived by ``now`` and was not given out yet."""

    def next_arrival(self) -> float | None:
        """When the next request arrives if nothing else is answered; None where nothing more comes by itself."""

    def answered(self, at: float) -> None:
        """One request was answered: a client that waited may send its next one."""


@dataclass
class Scheduled:
    """Open loop: each request at its time, which no answer moves. ``arrivals`` are sorted seconds."""

    arrivals: Sequence[float]
    requests: Sequence[Request]
    _given: int = 0

    def due(self, now: float) -> list[tuple[float, Request]]:
        """See Source."""
        first = self._given
        while self._given < len(self.arrivals) and self.arrivals[self._given] <= now:
            self._given += 1
        return [(self.arrivals[i], self.requests[i]) for i in range(first, self._given)]

    def next_arrival(self) -> float | None:
        """See Source."""
        return self.arrivals[self._given] if self._given < len(self.arrivals) else None

    def answered(self, at: float) -> None:
        """Changes nothing: this is what makes the loop open."""


@dataclass
class Clients:
    """Closed loop: ``concurrency`` clients, each of which sends its next request when the last one was answered."""

    requests: Sequence[Request]
    concurrency: int
    _ready: list[float] = field(default_factory=list)
    _given: int = 0

    def __post_init__(self) -> None:
        self._ready = [0.0] * min(self.concurrency, len(self.requests))

    def due(self, now: float) -> list[tuple[float, Request]]:
        """See Source."""
        count = sum(at <= now for at in self._ready)
        found = [(self._ready[i], self.requests[self._given + i]) for i in range(count)]
        self._ready, self._given = self._ready[count:], self._given + count
        return found

    def next_arrival(self) -> float | None:
        """See Source."""
        return self._ready[0] if self._ready else None

    def answered(self, at: float) -> None:
        """The client sends its next request at once, if there is one."""
        if self._given + len(self._ready) < len(self.requests):
            self._ready.append(at)


def poisson(rate_per_s: float, n: int, seed: int | Sequence[int]) -> list[float]:
    """``n`` arrival times in seconds of a Poisson process: exponential gaps of mean 1 / rate, seeded."""
    gaps = np.random.default_rng(seed).exponential(1.0 / rate_per_s, n)
    return [float(at) for at in np.cumsum(gaps)]
