"""Serves many callers with one model: takes requests from any thread, runs them in one of its own, hands out events.

Requests are checked in the caller's thread, so that a bad one is refused before it costs anything. Whatever is computed
is computed in the engine's thread, step by step (stepper.py); a cancelled request is out before the next step. While an
engine runs, the model is its own: nobody else may generate or score with it. Knows nothing of HTTP or text formats.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from .batching import BatchDecoder
from .decoding import token_array
from .errors import EngineStoppedError, InputError, QueueFullError, SlmdeployError
from .generation import room
from .inflight import Ids, OnEvent
from .lone_drafting import LoneDrafting
from .model import Model
from .paged_rows import PagedRows
from .radix import RadixTree
from .requests import EngineSettings, EngineStats, GenerateRequest, Request, ScoreRequest, Ticket
from .rows import BatchRows, Rows, WholePrompts
from .scheduler import Scheduler
from .scoring import Scorer, check_room, token_arrays
from .segments import segment_tree, token_bytes
from .speculative import Drafter
from .stepper import Stepper

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What an engine is made of, once the model's graphs are open."""

    stepper: Stepper
    rows: Rows | None
    caches: tuple[tuple[RadixTree[Any], int], ...]
    """The trees of prefixes, and how many tokens each counts as one."""


class Engine:
    """`start` it, `submit` requests, `close` it."""

    def __init__(self, model: Model, settings: EngineSettings | None = None) -> None:
        self.model, self.settings = model, settings or EngineSettings()
        self._changed = threading.Condition()
        """Guards all that follows; notified when there is something to do, and when nothing is left. Never held while
        events are handed out, so that whoever receives them may wait for a lock of a caller's."""
        self._inbox: deque[tuple[int, Callable[[], None]]] = deque()
        """What the engine's thread has to do, and how many requests arrive with it."""
        self._arriving = 0
        """Requests on their way to the stepper."""
        self._numbers = itertools.count(1)
        self._parts: _Parts | None = None
        self._thread: threading.Thread | None = None
        self._stats = EngineStats()
        self._draining = self._closing = self._idle = False
        self._refusal = "The engine has not been started."

    def start(self) -> None:
        """Open the graphs that the model's tasks need and begin to take requests. Raises what opening them raises."""
        if self._thread is not None:
            raise InputError("An engine is started once: make another one.")
        self._parts = _open(self.model, self.settings)
        self._refusal, self._idle = "", True
        self._publish()
        self._thread = threading.Thread(target=self._run, name="slmdeploy-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Accept a request from any thread; `on_event` is called from the engine's and must return at once.

        Raises InputError for what this model cannot do with these settings, QueueFullError when as many requests wait
        as may, EngineStoppedError when none are taken any more.
        """
        arrive = self._checked(request, on_event)
        with self._changed:
            if self._refusal:
                raise EngineStoppedError(self._refusal)
            if self._waiting() >= self.settings.max_waiting:
                raise QueueFullError(f"{self.settings.max_waiting} requests are waiting already: try again later.")
            ticket = Ticket(next(self._numbers))
            self._arriving += 1
            self._inbox.append((1, lambda: arrive(ticket.number)))
            self._idle = False
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request before the next step; its events say so. Nothing if it has ended already."""
        with self._changed:
            if self._parts is not None and self._alive:
                stepper = self._parts.stepper
                self._inbox.append((0, lambda: stepper.cancel(ticket.number)))
                self._idle = False
                self._changed.notify_all()

    @property
    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait until those accepted have ended; whether they did within so many seconds."""
        with self._changed:
            if not self._refusal:
                self._refusal = "The engine finishes what it has and takes no more requests."
            self._draining = True
            return self._changed.wait_for(lambda: self._idle or not self._alive, timeout_s)

    def close(self) -> None:
        """Stop behind the step in hand; what has not ended fails with EngineStoppedError. May be called again.

        Not from `on_event`: it waits for the thread that calls that.
        """
        with self._changed:
            self._closing = True
            self._refusal = "The engine was closed."
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def stats(self) -> EngineStats:
        """Figures as of the last step."""
        with self._changed:
            healthy = self._alive and not self._stats.failure
            return replace(self._stats, queued=self._waiting(), draining=self._draining, healthy=healthy)

    def _waiting(self) -> int:
        """Requests accepted and not begun. One that is just being handed over may count twice, never not at all."""
        return self._arriving + (self._parts.stepper.queued if self._parts is not None else 0)

    def _checked(self, request: Request, on_event: OnEvent) -> Callable[[int], None]:
        """What the engine's thread has to do to accept a request under a number. Raises InputError."""
        if self._parts is None:
            raise EngineStoppedError(self._refusal)
        stepper, runtime = self._parts.stepper, self.model.runtime
        task = "generate" if isinstance(request, GenerateRequest) else "score"
        if task not in runtime.tasks:
            raise InputError(f"{self.model.path} was made for {' and '.join(runtime.tasks)}, not for {task}.")
        if isinstance(request, ScoreRequest):
            prefix = token_array(request.prefix_ids, runtime.vocab_size)
            items = token_arrays(request.items, runtime.vocab_size)
            check_room(prefix, items, runtime.max_length)
            return lambda number: stepper.score(number, prefix, items, request.priority, request.deadline, on_event)
        prompt, places = self._places(request, stepper.scheduler.places)
        return lambda number: stepper.generate(number, request, prompt, places, on_event)

    def _places(self, request: GenerateRequest, most: int) -> tuple[Ids, int]:
        """The prompt, and the tokens that a choice may come to with it; InputError where that is too much."""
        runtime = self.model.runtime
        prompt = token_array(request.prompt_ids, runtime.vocab_size)
        places = prompt.size + room(prompt.size, runtime.max_length, request.settings)
        if places > most:
            raise InputError(
                f"The prompt of {prompt.size} tokens and what may follow need {places} places of keys and values, but "
                f"this engine has {most}: ask for fewer new tokens, or give it more kv_bytes."
            )
        return prompt, places

    def _run(self) -> None:
        """The thread: take what has arrived, run a step, until closed or broken."""
        assert self._parts is not None, "start opens the parts before the thread begins"
        parts = self._parts
        error: SlmdeployError | None = None
        try:
            while self._receive(parts):
                parts.stepper.step(time.monotonic())
                error = parts.stepper.failure
                if error is not None:
                    break
        except Exception as bug:
            _LOG.exception("The engine stopped.")
            error = SlmdeployError(f"The engine stopped ({type(bug).__name__}: {bug}); please report this bug.")
        self._stop(parts, error)

    def _receive(self, parts: _Parts) -> bool:
        """Take what has arrived, waiting for it where nothing else is to be done; whether to go on."""
        self._take_inbox()
        if parts.stepper.scheduler.busy:
            return not self._closing
        self._shrink(parts)
        with self._changed:
            if not self._inbox:
                self._idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._inbox or self._closing)
        self._take_inbox()
        return not self._closing

    def _take_inbox(self) -> None:
        """One by one, so that what follows a failure of ours is still there for `_stop`."""
        while True:
            with self._changed:
                if not self._inbox:
                    self._publish()
                    return
                requests, act = self._inbox.popleft()
            act()
            with self._changed:
                self._arriving -= requests

    def _shrink(self, parts: _Parts) -> None:
        """Rows keep the memory that long sequences have left in them; what is beyond the budget goes back when idle."""
        if parts.rows is not None and self.settings.kv_bytes is not None:
            parts.rows.shrink(self.settings.kv_bytes)

    def _publish(self) -> None:
        """Figures for `stats`; by the engine's thread, or before there is one."""
        assert self._parts is not None, "figures are of an engine that was started"
        stepper, caches = self._parts.stepper, self._parts.caches
        scheduler = stepper.scheduler
        self._stats = EngineStats(
            failure=self._stats.failure,
            running=len(stepper.requests) - stepper.queued,
            kv_tokens_used=scheduler.places_used,
            kv_tokens_capacity=scheduler.places,
            cache_tokens_used=sum(tree.size * unit for tree, unit in caches),
            cache_tokens_capacity=sum(tree.capacity * unit for tree, unit in caches),
            **asdict(stepper.counts),
        )

    def _stop(self, parts: _Parts, error: SlmdeployError | None) -> None:
        """Fail what has not ended; nothing is taken any more."""
        why = f"The engine cannot compute any more: {error}" if error is not None else "The engine was closed."
        with self._changed:
            self._refusal = why
        while self._inbox:
            try:
                self._take_inbox()
            except Exception:
                _LOG.exception("The engine stops, and what was still to be done failed.")
        parts.stepper.abort(EngineStoppedError(why))
        with self._changed:
            self._publish()
            self._stats = replace(self._stats, failure=str(error) if error is not None else "")
            self._idle = True
            self._changed.notify_all()


def _open(model: Model, settings: EngineSettings) -> _Parts:
    """Open the graphs of the model's tasks, which share the memory for prefixes evenly."""
    runtime, drafter = model.runtime, model.open_drafter()
    share = settings.prefix_cache_bytes // len(runtime.tasks)
    rows: Rows | None = None
    caches: list[tuple[RadixTree[Any], int]] = []
    if "generate" in runtime.tasks:
        rows, cache = _open_rows(model, settings.slots, share)
        caches += [cache] if cache is not None else []
    scorer = model.scorer if "score" in runtime.tasks else None
    if isinstance(scorer, Scorer):
        caches.append((scorer.keep_prefixes(share), 1))
    slots = rows.slots if rows is not None else 1
    places = slots * runtime.max_length
    if settings.kv_bytes is not None:
        places = min(places, settings.kv_bytes // token_bytes(runtime))
    scheduler = Scheduler(slots, places, settings.prefill_tokens_per_step)
    drafting = None if drafter is None else _drafting(model, drafter, rows)
    return _Parts(Stepper(rows, scorer, model.codec, runtime, scheduler, drafting), rows, tuple(caches))


def _drafting(model: Model, drafter: Drafter, rows: Rows | None) -> LoneDrafting:
    """Guesses for whoever runs alone; InputError where the engine's rows take no tokens back."""
    if not isinstance(rows, BatchRows):
        raise InputError(
            f"{model.path} runs on a GPU, where an engine does not draft: leave out the draft or prompt lookup."
        )
    return LoneDrafting(drafter, rows)


def _open_rows(model: Model, slots: int, cache_bytes: int) -> tuple[Rows, tuple[RadixTree[Any], int] | None]:
    """Rows over whatever decodes, and the cache of prompts where there is one."""
    if model.pages is not None:
        paged = PagedRows(model.pages, slots, cache_bytes)
        return paged, (paged.tree, paged.page)
    batch = model.open_batch(slots)
    if isinstance(batch, BatchDecoder):
        tree = segment_tree(cache_bytes, model.runtime)
        return BatchRows(batch, tree), (tree, 1)
    return WholePrompts(batch), None
