"""Decides what an engine runs next: who is let in, whose prompt goes on, who waits. Plain Python, no model, no clock.

A step decodes all running sequences and then computes up to `prompt_tokens` of prompts, or one piece of scores where
those have the turn. Prompts are computed one after the other, so that a sequence waits for the prompts before it and
running ones never for more than a step's share.
Admission sets aside the most that a sequence may come to (prompt and max_new_tokens): whoever was let in can always
finish. The other way, to let sequences grow and throw the youngest out when memory is full, computes prompts twice,
which costs a CPU more than the places do that are set aside in vain.
Order: priority, then arrival. Nobody overtakes the one whose turn it is, even who would fit; and after OVERTAKEN later
arrivals went first for their priority, it is the turn of the earliest whatever its own.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

OVERTAKEN = 64
"""So many later arrivals of a higher priority may go before a request."""


@dataclass(frozen=True, slots=True)
class Job:
    """A choice to generate, or a request to score. A smaller priority goes first; deadline: a time as `begin` has it.

    group: choices of one group share the prompt. prompt: its tokens; places: those of keys and values that the
    sequence may come to. A request to score has neither.
    """

    key: int
    group: int = 0
    prompt: int = 0
    places: int = 0
    priority: int = 0
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Compute the tokens start to stop of a prompt. With the last piece also `forks` begin, from a copy of its row."""

    key: int
    start: int
    stop: int
    last: bool
    forks: tuple[int, ...] = ()


class Queue:
    """Jobs in the order of their arrival, and whose turn it is."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._overtaken: dict[int, int] = {}
        self._passed: set[int] = set()

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __contains__(self, key: object) -> bool:
        return key in self._jobs

    def add(self, job: Job) -> None:
        """Put a job behind those that are there."""
        self._jobs[job.key], self._overtaken[job.key] = job, 0

    def turn(self) -> Job | None:
        """Whose turn it is; None where nobody waits."""
        patient = (job for job in self if self._overtaken[job.key] >= OVERTAKEN)
        # min takes the first of equals, which is the one that arrived first.
        return next(patient, None) or min(self, key=lambda job: job.priority, default=None)

    def passed(self, job: Job) -> None:
        """Count that this job went before all that had arrived earlier; once, in however many pieces it goes."""
        if job.key in self._passed:
            return
        self._passed.add(job.key)
        for earlier in self:
            if earlier.key == job.key:
                return
            self._overtaken[earlier.key] += 1

    def remove(self, key: int) -> Job:
        """Take a job out."""
        del self._overtaken[key]
        self._passed.discard(key)
        return self._jobs.pop(key)


class Scheduler:
    """Who waits, whose prompt is being computed and who runs, in at most `slots` rows and `places` of the cache."""

    def __init__(self, slots: int, places: int, prompt_tokens: int) -> None:
        self.slots, self.places = slots, places
        self.places_used = 0
        """Places set aside for those in rows."""
        self.waiting, self.scores = Queue(), Queue()
        self.running: dict[int, Job] = {}
        self.filling: Job | None = None
        """Whose prompt is being computed, in a row of its own."""
        self._prompt_tokens = prompt_tokens
        self._done = 0
        """Tokens of that prompt which the row holds."""
        self._left = 0
        self._scores_turn = False
        self._computed_prompt = False

    @property
    def busy(self) -> bool:
        """Whether anything is left to run."""
        return bool(self.waiting or self.scores or self.running or self.filling)

    def add(self, job: Job) -> None:
        """Let a choice wait for a row."""
        assert 0 < job.prompt < job.places <= self.places, "a job that could never run has to be refused earlier"
        self.waiting.add(job)

    def add_score(self, job: Job) -> None:
        """Let a request to score wait for its turns."""
        self.scores.add(job)

    def begin(self, now: float) -> list[int]:
        """Begin a step; the keys of those whose deadline has passed, which the caller ends."""
        self._scores_turn = bool(self.scores) and self._computed_prompt
        self._left = 0 if self._scores_turn else self._prompt_tokens
        self._computed_prompt = False
        return [job.key for job in self._all() if job.deadline is not None and job.deadline <= now]

    def alone(self) -> int | None:
        """Who runs while nobody else does, be prompts in the making or not: for that one alone guesses pay.

        A step of several shares the reading of the weights already, and no graph runs several tokens of several rows.
        """
        return next(iter(self.running)) if len(self.running) == 1 else None

    def _all(self) -> Iterator[Job]:
        yield from self.waiting
        yield from self.scores
        yield from self.running.values()
        if self.filling is not None:
            yield self.filling

    def admit(self) -> int | None:
        """Let the next one in whose prompt is to be computed, if it is the time; its key, for `found` and `piece`."""
        job = self.waiting.turn()
        if self.filling is not None or self._left == 0 or job is None or not self._fits(job):
            return None
        self._take(job)
        self.filling, self._done = job, 0
        return job.key

    def _fits(self, job: Job) -> bool:
        rows = len(self.running) + (self.filling is not None)
        return rows < self.slots and self.places_used + job.places <= self.places

    def _take(self, job: Job) -> None:
        self.waiting.passed(job)
        self.waiting.remove(job.key)
        self.places_used += job.places

    def found(self, tokens: int) -> None:
        """The first `tokens` of the prompt that was let in need not be computed."""
        assert self.filling is not None, "a prompt has to be let in first"
        assert 0 <= tokens < self.filling.prompt, "the last token of a prompt has to be computed"
        self._done = tokens

    def piece(self) -> Piece | None:
        """What to compute next of the prompt that was let in, as far as this step goes."""
        job = self.filling
        if job is None or self._left == 0:
            return None
        start, stop = self._done, min(job.prompt, self._done + self._left)
        self._left -= stop - start
        self._done = stop
        self._computed_prompt = True
        if stop < job.prompt:
            return Piece(job.key, start, stop, last=False)
        self.filling = None
        self.running[job.key] = job
        return Piece(job.key, start, stop, last=True, forks=tuple(self._forks(job)))

    def _forks(self, job: Job) -> Iterator[int]:
        """Choices of the same request, while it is their turn and there is room."""
        while (other := self.waiting.turn()) is not None and other.group == job.group and self._fits(other):
            self._take(other)
            self.running[other.key] = other
            yield other.key

    def score(self) -> int | None:
        """Of which request to run a piece of the scores in this step; none where prompts had the turn."""
        job = self.scores.turn()
        if job is None or self._computed_prompt:
            return None
        self.scores.passed(job)
        return job.key

    def end(self, key: int) -> None:
        """Forget a job wherever it is; what was set aside for it is free."""
        if key in self.waiting:
            self.waiting.remove(key)
        elif key in self.scores:
            self.scores.remove(key)
        elif self.filling is not None and self.filling.key == key:
            self.places_used -= self.filling.places
            self.filling = None
        else:
            self.places_used -= self.running.pop(key).places
