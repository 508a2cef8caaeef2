"""Sends a load to a live server and notes when each request arrived, was sent and was answered.

The counterpart of driving.py, whose records it makes: requests come from the same sources at the same times, but many
are under way at once, one thread each, because it is the server that decides who waits. What was refused or broken off
counts as unanswered and is kept with its reason. Knows nothing of HTTP (live_http.py) or statistics.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from slmdeploy.errors import InputError
from slmdeploy.profiling.arrivals import Clients, Request, Scheduled, Source
from slmdeploy.profiling.live_http import UnansweredError

Reply = dict[str, Any]
Send = Callable[[Request, float], Reply]
"""Sends a request and waits at most so many seconds; raises UnansweredError."""
MOST_UNDER_WAY = 512
"""Requests that are open at once; further ones wait here, and their wait counts."""
ANSWER_S = 300.0
"""The longest that one request is waited for."""


class LiveClient:
    """A server as the profiler's `Client`. `failures` are reasons of requests without an answer, `sent` counts all.

    `spread` is true once events held several tokens, so that times between tokens are not known.
    """

    def __init__(self, send: Send, make: Callable[[Request], Request]) -> None:
        self.failures: list[str] = []
        self.sent = 0
        self.spread = False
        self._send, self._make = send, make
        self._lock = threading.Lock()

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """The reply to `drive` of worker.py, the only op; InputError where no request at all was answered so far."""
        assert op == "drive", "a live server is only driven"
        requests = [self._make(request) for request in fields["requests"]]
        arrivals = fields["arrivals"]
        source: Source = Clients(requests, fields["concurrency"]) if arrivals is None else Scheduled(arrivals, requests)
        records = drive_live(source, self._answered, limit_s=fields["limit_s"])
        if self.failures and len(self.failures) == self.sent:
            raise InputError(f"the server answers no request: {self.failures[0]}")
        return {"records": records}

    def _answered(self, request: Request, left_s: float) -> Reply:
        """What `send` says, or that nothing came of it."""
        reply: Reply
        failure = None
        try:
            reply = self._send(request, min(left_s, ANSWER_S))
        except UnansweredError as error:
            # What the end of a turn cut off is no fault: its time so far counts as a lower bound, as in driving.py.
            failure = None if error.too_late and left_s <= ANSWER_S else str(error)
            reply = {"unanswered": True}
        with self._lock:
            self.sent += 1
            self.failures += [] if failure is None else [failure]
            self.spread = reply.pop("spread", False) or self.spread
        return reply


def drive_live(source: Source, send: Callable[[Request, float], Reply], *, limit_s: float) -> list[Reply]:
    """Send everything that ``source`` gives, each at its time, and return a record of each in the order of arrival.

    When ``limit_s`` have passed nothing further is sent, and what is under way is broken off by its own time limit.
    """
    started = time.perf_counter()
    records: list[Reply] = []
    done: queue.SimpleQueue[float] = queue.SimpleQueue()
    under_way = 0

    def now() -> float:
        return time.perf_counter() - started

    def run(record: Reply, request: Request) -> None:
        try:
            begin = now()
            reply: Reply = send(request, limit_s - begin) if begin < limit_s else {"unanswered": True}
            end = begin + reply["stamps_ms"][-1] / 1e3 if "stamps_ms" in reply else now()
            record |= {"begin_s": begin, "end_s": end, **reply}
        finally:
            done.put(now())

    futures: list[Future[None]] = []
    with ThreadPoolExecutor(MOST_UNDER_WAY) as pool:
        while True:
            for arrival, request in source.due(now()) if now() <= limit_s else ():
                records.append({"arrival_s": arrival})
                futures.append(pool.submit(run, records[-1], request))
                under_way += 1
            following = source.next_arrival() if now() <= limit_s else None
            if following is None and not under_way:
                break
            try:
                source.answered(done.get(timeout=None if following is None else max(0.0, following - now())))
                under_way -= 1
            except queue.Empty:
                pass  # it is time for the next arrival
    for future in futures:
        future.result()  # a bug in a thread shall be seen
    return records
