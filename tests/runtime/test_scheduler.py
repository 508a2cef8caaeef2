"""What the scheduler promises, for any requests in any order, ends and cancellations at any time: no model needed."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmdeploy.runtime import scheduler as module
from slmdeploy.runtime.scheduler import Job, Queue, Scheduler

PLACES, MOST = 40, 30


@dataclass(frozen=True)
class Planned:
    """A request of a plan: when it comes, what it asks for, how many tokens its choices make, when it is cancelled."""

    step: int
    prompt: int
    made: tuple[int, ...]
    priority: int
    cached: int
    deadline: int | None
    cancelled: int | None
    scores: bool

    @property
    def places(self) -> int:
        """The most that a choice may come to."""
        return self.prompt + max(self.made)


PLANS = st.lists(
    st.builds(
        Planned,
        step=st.integers(0, 12),
        prompt=st.integers(1, 20),
        made=st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple),
        priority=st.integers(-1, 1),
        cached=st.integers(0, 19),
        deadline=st.none() | st.integers(0, 30),
        cancelled=st.none() | st.integers(0, 30),
        scores=st.booleans(),
    ).filter(lambda one: one.places <= MOST),
    max_size=8,
)


@dataclass
class World:
    """Runs a scheduler as an engine would, and checks at each step what must always hold."""

    scheduler: Scheduler
    plan: list[Planned]
    prompt_tokens: int
    made: dict[int, int] = field(default_factory=dict)
    owner: dict[int, Planned] = field(default_factory=dict)
    length: dict[int, int] = field(default_factory=dict)
    """What each choice is to make; of a request to score the pieces that it takes."""
    computed: dict[int, int] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)

    def run(self, steps: int) -> None:
        """So many steps, or until nothing is left."""
        for step in range(steps):
            self._arrive(step)
            self._step(step)
            self._check()
            if step > 12 and not self.scheduler.busy:
                return

    def _arrive(self, step: int) -> None:
        for group, one in enumerate(self.plan):
            if one.step != step:
                continue
            for length in one.made[: 1 if one.scores else None]:
                key = len(self.owner)
                self.owner[key], self.length[key], self.made[key] = one, length, 0
                deadline = None if one.deadline is None else float(one.deadline)
                job = Job(key, group, one.prompt, one.places, one.priority, deadline)
                if one.scores:
                    self.scheduler.add_score(job)
                else:
                    self.scheduler.add(job)

    def _step(self, step: int) -> None:
        scheduler = self.scheduler
        for key in scheduler.begin(step):
            assert self.owner[key].deadline is not None
            self._end(key)
        for key, one in self.owner.items():
            if one.cancelled == step and key not in self.ended:
                self._end(key)
        for key in list(scheduler.running):
            self._make(key)
        tokens = sum(self._pieces())
        key = scheduler.score()
        assert tokens <= self.prompt_tokens
        assert key is None or tokens == 0, "prompts and scores take turns"
        if key is not None:
            self._make(key)

    def _pieces(self) -> Iterator[int]:
        """Compute prompts as the scheduler says; the tokens of each piece."""
        scheduler = self.scheduler
        while True:
            key = scheduler.admit()
            if key is not None:
                found = min(self.owner[key].cached, self.owner[key].prompt - 1)
                scheduler.found(found)
                self.computed[key] = found
                self.admitted.append(key)
            piece = scheduler.piece()
            if piece is None:
                return
            assert piece.start == self.computed[piece.key] < piece.stop <= self.owner[piece.key].prompt
            assert piece.last == (piece.stop == self.owner[piece.key].prompt)
            assert piece.last or not piece.forks
            self.computed[piece.key] = piece.stop
            yield piece.stop - piece.start
            for fork in piece.forks:
                assert self.owner[fork] is self.owner[piece.key], "only choices of one request share a prompt"
                self.admitted.append(fork)
            for begun in (piece.key, *piece.forks) if piece.last else ():
                self._make(begun)

    def _make(self, key: int) -> None:
        self.made[key] += 1
        if self.made[key] == self.length[key]:
            self._end(key)

    def _end(self, key: int) -> None:
        assert key not in self.ended, "a request ends once"
        self.ended.append(key)
        self.scheduler.end(key)

    def _check(self) -> None:
        scheduler = self.scheduler
        inside = [*scheduler.running.values(), *([scheduler.filling] if scheduler.filling else [])]
        assert len(inside) <= scheduler.slots
        assert scheduler.places_used == sum(job.places for job in inside) <= scheduler.places
        assert ({scheduler.alone()} == scheduler.running.keys()) == (len(scheduler.running) == 1)
        assert (scheduler.alone() is None) == (len(scheduler.running) != 1)
        everywhere = [job.key for job in (*inside, *scheduler.waiting, *scheduler.scores)]
        assert sorted(everywhere + self.ended) == sorted(self.owner), "nobody is lost and nobody is there twice"


@given(PLANS, st.integers(1, 4), st.integers(1, 25))
def test_never_over_its_limits_and_every_request_ends_once(plan: list[Planned], slots: int, tokens: int) -> None:
    world = World(Scheduler(slots, PLACES, tokens), plan, tokens)
    world.run(steps=2000)
    assert sorted(world.ended) == sorted(world.owner)
    assert not world.scheduler.busy
    assert world.scheduler.places_used == 0


@given(PLANS, st.integers(1, 4), st.integers(1, 25))
def test_whoever_is_not_cancelled_gets_all_that_was_asked_for(plan: list[Planned], slots: int, tokens: int) -> None:
    patient = [replace(one, deadline=None, cancelled=None) for one in plan]
    world = World(Scheduler(slots, PLACES, tokens), patient, tokens)
    world.run(steps=2000)
    assert world.made == world.length


@given(PLANS, st.integers(1, 4), st.integers(1, 25))
def test_within_a_priority_the_first_to_come_is_the_first_let_in(plan: list[Planned], slots: int, tokens: int) -> None:
    equal = [replace(one, priority=0, deadline=None, cancelled=None, scores=False) for one in plan]
    world = World(Scheduler(slots, PLACES, tokens), equal, tokens)
    world.run(steps=2000)
    assert world.admitted == sorted(world.owner)


@given(st.lists(st.integers(-2, 2), min_size=2, max_size=30), st.integers(0, 5))
def test_nobody_starves(priorities: list[int], overtaken: int) -> None:
    """Each time one is served another of the highest priority comes: the others are served all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OVERTAKEN", overtaken)
        queue = Queue()
        for key, priority in enumerate(priorities):
            queue.add(Job(key, priority=priority))
        served: list[int] = []
        while any(key in queue for key in range(len(priorities))):
            job = queue.turn()
            assert job is not None
            queue.passed(job)
            served.append(queue.remove(job.key).key)
            queue.add(Job(len(priorities) + len(served), priority=-3))
        for place, key in enumerate(served):
            assert sum(other > key for other in served[:place]) <= overtaken


def test_one_request_in_many_pieces_overtakes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OVERTAKEN", 2)
    scheduler = Scheduler(slots=1, places=10, prompt_tokens=1)
    for key, priority in enumerate((1, 0, 0, 0)):
        scheduler.add_score(Job(key, priority=priority))
    order: list[int | None] = []
    for _ in range(5):
        scheduler.begin(0.0)
        order.append(scheduler.score())
    scheduler.end(1)
    for _ in range(3):
        scheduler.begin(0.0)
        order.append(scheduler.score())
    assert order == [1, 1, 1, 1, 1, 2, 0, 0], "two later ones went before the first, as many as may"


def test_a_smaller_priority_goes_first_and_equals_in_order() -> None:
    queue = Queue()
    for key, priority in enumerate((1, 0, 1, 0)):
        queue.add(Job(key, priority=priority))
    order = []
    while (job := queue.turn()) is not None:
        order.append(queue.remove(job.key).key)
    assert order == [1, 3, 0, 2]


def test_a_large_request_is_not_passed_by_small_ones_that_would_fit() -> None:
    scheduler = Scheduler(slots=3, places=20, prompt_tokens=100)
    for key, places in enumerate((15, 10, 3)):
        scheduler.add(Job(key, key, prompt=2, places=places))
    scheduler.begin(0.0)
    assert scheduler.admit() == 0
    scheduler.found(0)
    assert scheduler.piece() is not None
    assert scheduler.admit() is None
    scheduler.end(0)
    assert scheduler.admit() == 1


def test_prompts_and_scores_take_turns_and_decoding_waits_for_neither_for_long() -> None:
    scheduler = Scheduler(slots=1, places=100, prompt_tokens=4)
    scheduler.add(Job(0, 0, prompt=10, places=20))
    scheduler.add_score(Job(1, 1))
    did = []
    for step in range(6):
        scheduler.begin(float(step))
        if scheduler.admit() is not None:
            scheduler.found(0)
        piece = scheduler.piece()
        did.append("score" if scheduler.score() == 1 else piece and (piece.start, piece.stop))
    assert did == [(0, 4), "score", (4, 8), "score", (8, 10), "score"]


def test_choices_of_a_request_share_its_prompt_as_far_as_there_are_slots() -> None:
    scheduler = Scheduler(slots=2, places=100, prompt_tokens=50)
    for key in range(3):
        scheduler.add(Job(key, group=7, prompt=5, places=9))
    scheduler.begin(0.0)
    scheduler.admit()
    scheduler.found(0)
    piece = scheduler.piece()
    assert piece is not None
    assert piece.forks == (1,)
    assert scheduler.admit() is None
    scheduler.end(0)
    assert scheduler.admit() == 2


def test_a_job_that_could_never_run_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="refused earlier"):
        Scheduler(1, 10, 5).add(Job(0, 0, prompt=5, places=11))
