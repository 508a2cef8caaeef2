"""Runs requests step by step: what the scheduler decides is computed, and events say what came of it. No thread.

A step decodes every row once, then computes a share of prompts or a piece of scores. An error stays with the request
that it belongs to; a failure of the graph ends the requests that were in it, and REPEATED ones with nothing that ran in
between mean that nothing will: `failure` then says so. Knows neither sessions nor HTTP.
"""

import itertools
import logging
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .choices import Choice
from .errors import DeadlineError, InputError, RequestCancelledError, ResourceError, SlmdeployError
from .inflight import Counts, Generation, OnEvent, Scoring, Sequence
from .lone_drafting import LoneDrafting
from .requests import Begun, ChoiceDone, EndReason, Event, Failed, Finished, GenerateRequest, ScoreEvent, Usage
from .rows import Rows
from .scheduler import Job, Piece, Scheduler
from .score_runs import WholeScorer, begin_run
from .scoring import Scorer
from .text import TextCodec

REPEATED = 3
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_LOG = logging.getLogger(__name__)


class Stepper:
    """All requests that were accepted and have not ended. One thread calls it."""

    def __init__(
        self,
        rows: Rows | None,
        scorer: Scorer | WholeScorer | None,
        codec: TextCodec,
        config: RuntimeConfig,
        scheduler: Scheduler,
        drafting: LoneDrafting | None = None,
    ) -> None:
        self.counts = Counts()
        self.failure: SlmdeployError | None = None
        """Why nothing can be computed any more."""
        self.requests: dict[int, Generation | Scoring] = {}
        """By their numbers."""
        self.queued = 0
        """How many of them have not begun; right at any time, also for other threads."""
        self.scheduler = scheduler
        self._rows, self._scorer, self._codec, self._config = rows, scorer, codec, config
        self._drafting = drafting
        self._keys = itertools.count()
        self._sequences: dict[int, Sequence] = {}
        self._scorings: dict[int, Scoring] = {}
        self._in_rows: list[Sequence] = []
        self._filling: Sequence | None = None
        self._failures = 0

    def generate(self, number: int, asked: GenerateRequest, prompt: Ids, places: int, on_event: OnEvent) -> None:
        """Accept a request whose prompt and room have been checked."""
        request = Generation(number, asked, on_event, prompt, places)
        self.requests[number] = request
        self._accepted()
        for index in range(asked.n):
            sequence = Sequence(next(self._keys), index, request)
            request.sequences.append(sequence)
            self._sequences[sequence.key] = sequence
            job = Job(sequence.key, number, prompt.size, places, asked.priority, asked.deadline)
            self.scheduler.add(job)

    def score(
        self, number: int, prefix: Ids, items: list[Ids], priority: int, deadline: float | None, on_event: OnEvent
    ) -> None:
        """Accept a request to score whose items have been checked."""
        request = Scoring(number, next(self._keys), on_event, prefix, items)
        self.requests[number] = self._scorings[request.key] = request
        self._accepted()
        self.scheduler.add_score(Job(request.key, number, priority=priority, deadline=deadline))

    def _accepted(self) -> None:
        self.counts.requests += 1
        self.queued += 1

    def cancel(self, number: int) -> None:
        """End a request as cancelled; nothing if it has ended already."""
        request = self.requests.get(number)
        if isinstance(request, Generation):
            for sequence in request.sequences:
                self._done(sequence, "cancelled")
            self._sweep()
        elif request is not None:
            self._fail(request, RequestCancelledError("The request was cancelled before its answer was complete."))

    def abort(self, error: SlmdeployError) -> None:
        """Tell every request that it failed. Touches nothing else, whatever state it is in: no step may follow."""
        requests, self.requests, self.queued = list(self.requests.values()), {}, 0
        for request in requests:
            self.counts.failed_requests += 1
            self._emit(request, Failed(error))

    def step(self, now: float) -> None:
        """One step. now: the time that deadlines are compared with."""
        self.counts.steps += 1
        for key in self.scheduler.begin(now):
            self._expire(key)
        self._sweep()
        self._decode()
        self._prompts()
        self._score()

    def _expire(self, key: int) -> None:
        if key in self._sequences:
            self._done(self._sequences[key], "deadline")
        elif key in self._scorings:
            self._fail(self._scorings[key], DeadlineError("The request ran out of the time that it was given."))

    def _decode(self) -> None:
        """A step of all rows, or of the only one over what is guessed to follow."""
        running = tuple(self._in_rows)
        if not running or self._rows is None:
            return
        last = np.array([_last_token(sequence) for sequence in running], np.int64)
        try:
            guesses = self._guesses()
            if guesses and self._drafting is not None:
                logits = self._drafting.run(int(last[0]), guesses)
            else:
                logits = self._rows.step(last)
        except Exception as error:
            self._broken(error, {sequence.request for sequence in running})
            return
        self._failures = 0
        self.counts.batch_sizes[len(running)] = self.counts.batch_sizes.get(len(running), 0) + 1
        if guesses:
            self._judge(running[0], guesses, logits)
        else:
            for sequence, row in zip(running, logits, strict=True):
                self._take(sequence, row)
        self._sweep()

    def _guesses(self) -> list[int]:
        """What may follow in the row of the one that runs alone; nothing where nobody does or nothing drafts."""
        key = self.scheduler.alone()
        if self._drafting is None or key is None:
            return []
        sequence = self._sequences[key]
        assert sequence.choice is not None, "a choice in a row has taken its first token"
        made, left = sequence.choice.token_ids, sequence.choice.left
        return self._drafting.guess(key, sequence.request.asked.prompt_ids, made, left)

    def _judge(self, sequence: Sequence, guesses: list[int], logits: Floats) -> None:
        """Let a choice have row after row of logits, as long as it takes the token that was guessed."""
        assert self._drafting is not None, "whoever guessed judges"
        accepted = 0
        for guess, row in zip([*guesses, None], logits, strict=True):
            self._take(sequence, row)
            if sequence.over or _last_token(sequence) != guess:
                break
            accepted += 1
        self._drafting.used(guesses, accepted)
        self.counts.drafted_tokens += len(guesses)
        self.counts.accepted_tokens += accepted

    def _prompts(self) -> None:
        """As much of prompts as the scheduler says."""
        while True:
            key = self.scheduler.admit()
            if key is not None and not self._begin(self._sequences[key]):
                continue
            piece = self.scheduler.piece()
            if piece is None:
                return
            self._extend(piece)

    def _begin(self, sequence: Sequence) -> bool:
        """Give a sequence its row; whether there was memory for it."""
        assert self._rows is not None, "a folder without the task generate takes no prompts"
        request = sequence.request
        self._filling = sequence
        try:
            found = self._rows.begin(request.prompt, request.places)
        except Exception as error:
            self._broken(error, [request])
            return False
        self.scheduler.found(found)
        if not request.begun:
            request.begun, request.cached_tokens = True, found
            self.queued -= 1
            self._count_prompt(request.prompt.size, found)
            self._emit(request, Begun())
        return not sequence.over

    def _count_prompt(self, tokens: int, found: int) -> None:
        self.counts.prompt_tokens += tokens
        self.counts.cache_hit_tokens += found
        self.counts.cache_miss_tokens += tokens - found

    def _extend(self, piece: Piece) -> None:
        """Run a piece of a prompt; with the last one its choices begin."""
        assert self._rows is not None, "a folder without the task generate takes no prompts"
        sequence = self._sequences[piece.key]
        request = sequence.request
        begun = [sequence, *(self._sequences[key] for key in piece.forks)]
        try:
            logits = self._rows.extend(request.prompt[piece.start : piece.stop], last=piece.last)
            if logits is None:
                return
            self._rows.join()
            self._filling = None
            self._in_rows.append(sequence)
            for fork in begun[1:]:
                self._rows.fork()
                self._in_rows.append(fork)
        except Exception as error:
            self._broken(error, [request])
            return
        self._failures = 0
        row = self._in_rows.index(sequence)
        for one in begun:
            self._take(one, logits)
        self._rows.keep(row, request.asked.prompt_ids)
        self._sweep()

    def _take(self, sequence: Sequence, logits: Floats) -> None:
        """Let a choice have its next logits, and tell what it made of them."""
        request = sequence.request
        if sequence.over:
            return
        try:
            if sequence.choice is None:
                sequence.choice = Choice(request.asked, sequence.index, self._codec, self._config)
            event = sequence.choice.take(logits)
        except Exception as error:
            self._fail(request, _sentence(error))
            return
        if event is not None:
            request.made_tokens += 1
            self.counts.generated_tokens += 1
            self._emit(request, event)
        if sequence.choice.finish is not None:
            self._done(sequence, sequence.choice.finish)

    def _score(self) -> None:
        """A piece of the scores whose turn it is."""
        key = self.scheduler.score()
        if key is None:
            return
        assert self._scorer is not None, "a folder without the task score takes no items"
        request = self._scorings[key]
        try:
            if request.run is None:
                request.run = begin_run(self._scorer, request.prefix, request.items)
                self.queued -= 1
                self._count_prompt(request.prefix.size, request.run.cached_tokens)
                self._emit(request, Begun())
                if request.number not in self.requests:
                    return
            request.run.advance()
        except Exception as error:
            self._broken(error, [request])
            return
        self._failures = 0
        if request.run.done:
            self.counts.scored_items += len(request.items)
            self._forget(request)
            self._emit(request, ScoreEvent(request.run.scores, request.run.cached_tokens))

    def _done(self, sequence: Sequence, reason: EndReason) -> None:
        """End a choice, and with the last one its request."""
        if sequence.over:
            return
        request = sequence.request
        self._end(sequence)
        if sequence.choice is None:
            self._emit(request, ChoiceDone(sequence.index, reason))
        else:
            self._emit(request, sequence.choice.done(reason))
        if request.number in self.requests and all(one.over for one in request.sequences):
            self._forget(request)
            usage = Usage(request.prompt.size, request.cached_tokens, request.made_tokens)
            self._emit(request, Finished(usage))

    def _end(self, sequence: Sequence) -> None:
        """A choice is over; if it is in a row, `_sweep` does the rest."""
        sequence.over = True
        if sequence in self._in_rows:
            return
        if sequence is self._filling:
            assert self._rows is not None, "only rows are filled"
            self._rows.abandon()
            self._filling = None
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.end(sequence.key)
        del self._sequences[sequence.key]

    def _sweep(self) -> None:
        """Release the rows of choices that are over; what they hold may be of use to prompts to come."""
        for row in reversed(range(len(self._in_rows))):
            sequence = self._in_rows[row]
            if not sequence.over or self._rows is None:
                continue
            made = sequence.choice.token_ids if sequence.choice is not None else []
            self._rows.keep(row, [*sequence.request.asked.prompt_ids, *made])
            self._rows.release(row)
            self._in_rows[row] = self._in_rows[-1]
            self._in_rows.pop()
            self._leave(sequence)

    def _broken(self, error: Exception, requests: Iterable[Generation | Scoring]) -> None:
        """A run failed: so do the requests that were in it, and with too many of them in a row everything."""
        sentence = _sentence(error)
        for request in requests:
            self._fail(request, sentence)
        self._sweep()
        if not isinstance(sentence, InputError | ResourceError):
            self._failures += 1
            if self._failures == REPEATED:
                self.failure = sentence

    def _fail(self, request: Generation | Scoring, error: SlmdeployError) -> None:
        """End a request with an error."""
        if request.number not in self.requests:
            return
        self._forget(request)
        self.counts.failed_requests += 1
        self._emit(request, Failed(error))

    def _forget(self, request: Generation | Scoring) -> None:
        """A request is over, and with it all of it that goes on."""
        if self.requests.pop(request.number, None) is not None and not request.begun:
            self.queued -= 1
        if isinstance(request, Scoring):
            del self._scorings[request.key]
            self.scheduler.end(request.key)
            return
        for sequence in request.sequences:
            if not sequence.over:
                self._end(sequence)

    def _emit(self, request: Generation | Scoring, event: Event) -> None:
        """Hand an event out. Who cannot take it gets no more of them."""
        try:
            request.on_event(event)
        except BaseException:  # not even an exit of a receiver's may end the thread that others wait for
            _LOG.exception("A receiver of events failed, so its request ends.")
            if request.number in self.requests:
                self._forget(request)


def _last_token(sequence: Sequence) -> int:
    assert sequence.choice is not None, "a choice in a row has taken its first token"
    return sequence.choice.token_ids[-1]


def _sentence(error: Exception) -> SlmdeployError:
    """The error as one for the user; what we did not foresee goes to the log with its traceback."""
    if isinstance(error, SlmdeployError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("There is not enough memory for the request: free some, or ask for less at once.")
    _LOG.error("A request failed.", exc_info=error)
    return SlmdeployError(
        f"The request failed ({type(error).__name__}: {error}); this is a bug of slmdeploy: report it."
    )
