"""Sends requests to a session as a source says and notes when each arrived, was begun and was answered.

First come, first served, up to ``batch`` requests together. The session is the only thing it knows of a model: it
answers. Times are seconds since driving began, on the clock that is given; with a session that has a clock of its own
(FakeSession) hours of load take no time, which is how the known latencies of queueing theory are held against it.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from slmdeploy.profiling.arrivals import Request, Source

Reply = dict[str, Any]
Answer = Callable[[Sequence[Request]], Sequence[Reply]]
"""Answers requests that were taken together: a reply for each, with ``stamps_ms`` or ``ms`` since they were begun."""
MOST_IDLE_S = 3600.0


def drive(
    source: Source,
    answer: Answer,
    *,
    batch: int = 1,
    limit_s: float = MOST_IDLE_S,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Reply]:
    """Run everything that ``source`` gives and return a record of each request, in the order of arrival.

    A record has arrival_s, begin_s, end_s and what the answer said. When ``limit_s`` have passed no further request is
    begun: what waits then is recorded with ``unanswered``, and its end is the moment it was given up, a lower bound.
    """
    started = clock()
    waiting: deque[tuple[int, Request]] = deque()
    records: list[Reply] = []
    slept_until = 0.0

    def now() -> float:
        return clock() - started

    while True:
        # A sleep may end a rounding error early, and what it waited for has arrived all the same.
        for arrival, request in source.due(max(now(), slept_until)):
            waiting.append((len(records), request))
            records.append({"arrival_s": arrival})
        if now() > limit_s:
            break
        if waiting:
            taken = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
            _serve(taken, records, answer, now)
            for _ in taken:
                source.answered(now())
            continue
        following = source.next_arrival()
        if following is None:
            break
        sleep(max(0.0, following - now()))
        slept_until = following
    for place, _ in waiting:
        records[place] |= {"begin_s": now(), "end_s": now(), "unanswered": True}
    return records


def _serve(
    taken: Sequence[tuple[int, Request]], records: list[Reply], answer: Answer, now: Callable[[], float]
) -> None:
    begin = now()
    replies = answer([request for _, request in taken])
    end = now()
    for (place, _), reply in zip(taken, replies, strict=True):
        finished = begin + reply["stamps_ms"][-1] / 1e3 if "stamps_ms" in reply else end
        records[place] |= {"begin_s": begin, "end_s": finished, **reply}
