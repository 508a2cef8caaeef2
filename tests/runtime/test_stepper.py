"""Steps without a thread: what is left when requests come, end, fail and are cancelled at any moment."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmdeploy.runtime.batching import BatchDecoder
from slmdeploy.runtime.drafting import PromptLookup
from slmdeploy.runtime.errors import CorruptArtifactError, EngineStoppedError, RequestCancelledError, ResourceError
from slmdeploy.runtime.lone_drafting import LoneDrafting
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.requests import Begun, ChoiceDone, Event, Failed, Finished, ScoreEvent, TokenEvent
from slmdeploy.runtime.rows import BatchRows
from slmdeploy.runtime.scheduler import Scheduler
from slmdeploy.runtime.segments import SegmentTree, segment_tree, token_bytes
from slmdeploy.runtime.stepper import REPEATED, Stepper
from tests.runtime.receivers import PROMPTS, generation

NOW, LATE = 0.0, 10.0


def make(
    model: Model, *, slots: int = 2, piece: int = 4, cached: int = 40, drafted: bool = False
) -> tuple[Stepper, SegmentTree, BatchDecoder]:
    """A stepper over the tiny model, the tree of its prompts, and what computes."""
    tree = segment_tree(cached * token_bytes(model.runtime), model.runtime)
    batch = model.open_batch(slots)
    assert isinstance(batch, BatchDecoder)
    rows = BatchRows(batch, tree)
    drafting = LoneDrafting(PromptLookup(), rows) if drafted else None
    scheduler = Scheduler(slots, slots * 64, piece)
    return Stepper(rows, model.scorer, model.codec, model.runtime, scheduler, drafting), tree, batch


def ask(stepper: Stepper, number: int, prompt: tuple[int, ...], made: int, **options: object) -> list[Event]:
    """Let a request arrive; its events."""
    events: list[Event] = []
    request = generation(prompt, max_new_tokens=made, ignore_eos=True, **options)
    stepper.generate(number, request, np.array(prompt), len(prompt) + made, events.append)
    return events


@pytest.fixture(scope="module")
def opened(tiny: Path) -> Model:
    return load(tiny)


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 6])
def test_a_cancelled_request_is_out_before_the_next_step(opened: Model, steps: int) -> None:
    """The prompt of 20 tokens takes five steps, then the sequence runs."""
    stepper, _, _ = make(opened, slots=1)
    cancelled = ask(stepper, 1, (100,) * 20, 30)
    for _ in range(steps):
        stepper.step(NOW)
    stepper.cancel(1)
    assert isinstance(cancelled[-1], Finished)
    assert (stepper.scheduler.busy, stepper.scheduler.places_used, stepper.queued) == (False, 0, 0)
    other = ask(stepper, 2, PROMPTS[1], 1)
    stepper.step(NOW)
    assert [type(event) for event in other] == [Begun, TokenEvent, ChoiceDone, Finished]


REQUESTS = st.tuples(
    st.sampled_from(PROMPTS),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([None, 3.0]),
    st.sampled_from(["generate", "score", "raise"]),
)
MOVES = st.lists(st.one_of(REQUESTS, st.just("step"), st.integers(1, 6)), max_size=14)


FAULTS = st.lists(st.sampled_from([None, None, None, MemoryError(), ResourceError("no memory")]), max_size=20)
"""What the next calls that compute raise, each in turn; those behind them work."""


def let_fail(batch: BatchDecoder, scorer: object, faults: list[Exception | None]) -> pytest.MonkeyPatch:
    """Let whatever computes raise as planned before it has changed anything; undo it at the end."""
    patch = pytest.MonkeyPatch()

    def faulty(computes: Callable[..., object], only: Exception | None = None) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            if faults and (error := faults.pop(0)) is not None:
                raise only or error
            return computes(*arguments, **named)

        return call

    for name in ("begin", "extend", "fork", "step", "judge"):
        patch.setattr(batch, name, faulty(getattr(batch, name)))
    patch.setattr(batch, "read", faulty(batch.read, MemoryError()))  # a copy fails in no other way
    patch.setattr(scorer, "begin", faulty(scorer.begin))  # type: ignore[attr-defined]
    return patch


@settings(max_examples=40, deadline=None)
@given(MOVES, st.integers(1, 3), st.integers(1, 30), st.sampled_from([0, 10, 200]), FAULTS, st.booleans())
def test_every_request_ends_once_and_nothing_stays_behind(
    opened: Model,
    moves: list[object],
    slots: int,
    piece: int,
    cached: int,
    faults: list[Exception | None],
    drafted: bool,
) -> None:
    stepper, tree, batch = make(opened, slots=slots, piece=piece, cached=cached, drafted=drafted)
    told: list[list[Event]] = []
    patch = let_fail(batch, opened.scorer, list(faults))
    for clock, move in enumerate(moves):
        if move == "step":
            stepper.step(float(clock))
        elif isinstance(move, int):
            stepper.cancel(move)
        else:
            assert isinstance(move, tuple)
            prompt, made, choices, deadline, kind = move
            number = len(told) + 1
            if kind == "score":
                told.append([])
                stepper.score(number, np.array(prompt), [np.array([5, 6])] * made, 0, deadline, told[-1].append)
            else:
                constraint = (lambda: 1 / 0) if kind == "raise" else None
                told.append(ask(stepper, number, prompt, made, n=choices, deadline=deadline, constraint=constraint))
    for _ in range(1000):
        if not stepper.scheduler.busy:
            break
        stepper.step(LATE)
    patch.undo()
    for events in told:
        ends = [event for event in events if isinstance(event, Finished | ScoreEvent | Failed)]
        assert ends == events[-1:]
    assert (stepper.requests, stepper.queued, stepper.scheduler.places_used) == ({}, 0, 0)
    assert (batch.used, batch.cache.staged) == (0, None)
    assert {node.holds for node in tree.nodes()} <= {0}
    assert tree.size <= tree.capacity
    assert stepper.failure is None


def test_a_cancelled_request_to_score_says_so(opened: Model) -> None:
    stepper, _, _ = make(opened)
    events: list[Event] = []
    stepper.score(1, np.array(PROMPTS[0]), [np.array([4])], 0, None, events.append)
    stepper.cancel(1)
    (failed,) = events
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RequestCancelledError)
    assert not stepper.scheduler.busy


def test_failures_in_a_row_are_counted_from_the_last_run_that_worked(
    opened: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper, _, _ = make(opened, slots=1)
    extend, works = BatchDecoder.extend, [False, False, True, False, False, False]

    def failing(batch: BatchDecoder, ids: object, *, last: bool) -> object:
        if works.pop(0):
            return extend(batch, ids, last=last)  # type: ignore[arg-type]
        raise CorruptArtifactError("it does not run")

    monkeypatch.setattr(BatchDecoder, "extend", failing)
    for number in range(6):
        assert stepper.failure is None
        ask(stepper, number, (3, 4), 1)
        stepper.step(NOW)
    assert str(stepper.failure) == "it does not run"


def test_aborting_tells_everybody(opened: Model) -> None:
    stepper, _, _ = make(opened, slots=1)
    told = [ask(stepper, number, PROMPTS[number], 5) for number in range(2)]
    stepper.step(NOW)
    stepper.abort(EngineStoppedError("over"))
    for events in told:
        assert isinstance(events[-1], Failed)
        assert str(events[-1].error) == "over"
    assert (stepper.requests, stepper.queued) == ({}, 0)


def test_out_of_memory_is_a_sentence_and_no_sign_of_a_broken_build(
    opened: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper, _, _ = make(opened, slots=1)

    def failing(batch: BatchDecoder, ids: object, *, last: bool) -> object:
        raise MemoryError

    monkeypatch.setattr(BatchDecoder, "extend", failing)
    for number in range(REPEATED):
        events = ask(stepper, number, (3, 4), 1)
        stepper.step(NOW)
        begun, failed = events
        assert isinstance(begun, Begun)
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, ResourceError)
        assert "not enough memory" in str(failed.error)
    assert stepper.failure is None
