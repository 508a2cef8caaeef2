"""The engine on a tiny model: each request gets what it would get alone, and nobody's trouble is anybody else's."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from slmdeploy.runtime import scoring
from slmdeploy.runtime.batching import BatchDecoder
from slmdeploy.runtime.engine import Engine
from slmdeploy.runtime.errors import (
    CorruptArtifactError,
    DeadlineError,
    EngineStoppedError,
    InputError,
    QueueFullError,
    RequestCancelledError,
    ResourceError,
)
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.requests import (
    Begun,
    EngineSettings,
    Event,
    Failed,
    GenerateRequest,
    ScoreEvent,
    ScoreRequest,
    TokenEvent,
    Usage,
)
from tests.graphs import write_tiny_graph
from tests.runtime.receivers import PATIENCE_S, PROMPTS, Receiver, generation, submit


@pytest.fixture
def make(tiny: Path) -> Iterator[Callable[..., Engine]]:
    """Starts engines over models of their own and closes them."""
    made: list[Engine] = []

    def start(**settings: Any) -> Engine:
        engine = Engine(load(tiny), EngineSettings(**settings))
        engine.start()
        made.append(engine)
        return engine

    yield start
    for engine in made:
        engine.close()


@pytest.mark.parametrize("cache", [0, 1 << 20], ids=["no prefix cache", "prefix cache"])
@pytest.mark.parametrize(("slots", "piece"), [(1, 256), (3, 4), (8, 1)])
def test_greedy_tokens_are_those_of_each_prompt_alone(
    make: Callable[..., Engine], model: Model, slots: int, piece: int, cache: int
) -> None:
    engine = make(slots=slots, prefill_tokens_per_step=piece, prefix_cache_bytes=cache)
    for _ in range(2):  # with a cache, the second time all prompts are found in it
        receivers = submit(engine, *(generation(prompt, max_new_tokens=9) for prompt in PROMPTS))
        for prompt, receiver in zip(PROMPTS, receivers, strict=True):
            receiver.last()
            assert receiver.tokens() == list(model.generate_ids(prompt, max_new_tokens=9))
    assert receivers[2].usage().cached_tokens == (len(PROMPTS[2]) - 1 if cache else 0)


def test_sampling_is_seeded_as_alone_and_choices_share_the_prompt(make: Callable[..., Engine], model: Model) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 0.95, "ignore_eos": True}
    engine = make(slots=4, prefix_cache_bytes=0)
    (receiver,) = submit(engine, generation(PROMPTS[2], n=3, seed=5, **options))
    usage = receiver.usage()
    for choice in range(3):
        assert receiver.tokens(choice) == list(model.generate_ids(PROMPTS[2], seed=5 + choice, **options))
    assert len({tuple(receiver.tokens(choice)) for choice in range(3)}) > 1
    assert usage == Usage(prompt_tokens=11, cached_tokens=0, completion_tokens=24)
    assert engine.stats().cache_miss_tokens == 11, "the prompt is computed once"


def test_more_choices_than_slots_come_one_after_the_other(make: Callable[..., Engine], model: Model) -> None:
    engine = make(slots=2)
    (receiver,) = submit(engine, generation(PROMPTS[2], n=5, max_new_tokens=4, ignore_eos=True))
    assert receiver.usage().completion_tokens == 20
    alone = list(model.generate_ids(PROMPTS[2], max_new_tokens=4, ignore_eos=True))
    assert [receiver.tokens(choice) for choice in range(5)] == [alone] * 5


def test_text_ends_at_stop_strings_and_comes_whole(make: Callable[..., Engine], model: Model) -> None:
    engine = make(slots=2)
    prompt = tuple(model.tokenizer.encode("def f").ids)
    whole = model.generate("def f", max_new_tokens=12)
    stop = whole.text[2:4]
    plain, stopped = submit(
        engine, generation(prompt, max_new_tokens=12), generation(prompt, max_new_tokens=12, stop=[stop])
    )
    plain.last()
    stopped.last()
    assert (plain.text(), plain.reason()) == (whole.text, whole.finish_reason)
    assert (stopped.text(), stopped.reason()) == (model.generate("def f", max_new_tokens=12, stop=[stop]).text, "stop")


def test_a_conversation_goes_on_from_the_cache_as_without(make: Callable[..., Engine], model: Model) -> None:
    engine = make(slots=2)
    (first,) = submit(engine, generation(PROMPTS[2], max_new_tokens=6, ignore_eos=True))
    first.last()
    longer = (*PROMPTS[2], *first.tokens(), 50, 51)
    other = (*PROMPTS[2][:4], 99, 98)
    again, branch = submit(engine, generation(longer, max_new_tokens=6), generation(other, max_new_tokens=6))
    # The last token made was never run, so its keys and values are not there.
    assert again.usage().cached_tokens == len(PROMPTS[2]) + 5
    assert again.tokens() == list(model.generate_ids(longer, max_new_tokens=6))
    assert branch.usage().cached_tokens == 4
    assert branch.tokens() == list(model.generate_ids(other, max_new_tokens=6))


def test_a_cache_that_is_too_small_evicts_and_stays_right(make: Callable[..., Engine], model: Model) -> None:
    token_bytes = 3 * 16 * 2 * 4
    engine = make(slots=2, prefix_cache_bytes=2 * 12 * token_bytes)  # half of it is for scores
    for _ in range(2):
        receivers = submit(engine, *(generation(prompt, max_new_tokens=9) for prompt in PROMPTS))
        for prompt, receiver in zip(PROMPTS, receivers, strict=True):
            receiver.last()
            assert receiver.tokens() == list(model.generate_ids(prompt, max_new_tokens=9))
    assert engine.drain(PATIENCE_S)
    stats = engine.stats()
    assert stats.cache_tokens_capacity == 24
    assert 0 < stats.cache_tokens_used <= 12


def test_logprobs_are_those_of_the_models_own_distribution(make: Callable[..., Engine], model: Model) -> None:
    (receiver,) = submit(make(), generation(PROMPTS[0], max_new_tokens=3, logprobs=4, temperature=2.0, seed=1))
    receiver.last()
    ids = list(PROMPTS[0])
    assert isinstance(receiver.events[0], Begun)
    for event in receiver.events[1:4]:
        assert isinstance(event, TokenEvent)
        logits = model.logits(ids)[-1].astype(float)
        expected = logits - np.log(np.exp(logits).sum())
        assert event.logprob == pytest.approx(expected[event.token_id], abs=1e-4)
        assert [token for token, _ in event.top] == np.argsort(-expected)[:4].tolist()
        assert [value for _, value in event.top] == pytest.approx(sorted(expected)[:-5:-1], abs=1e-4)
        ids.append(event.token_id)


class Countdown:
    """Allows the token n, then n - 1, … down to 40, and nothing behind it."""

    def __init__(self, start: int) -> None:
        self._next = start
        self.finished = False

    def allowed(self) -> npt.NDArray[np.bool_]:
        mask = np.zeros(272, np.bool_)
        mask[self._next] = True
        return mask

    def accept(self, token: int) -> None:
        assert token == self._next
        self.finished, self._next = token == 40, token - 1


def test_a_constraint_masks_before_the_choice_and_ends_it(make: Callable[..., Engine]) -> None:
    greedy, sampled = submit(
        make(slots=3),
        generation(PROMPTS[0], constraint=lambda: Countdown(43), n=2),
        generation(PROMPTS[1], constraint=lambda: Countdown(42), temperature=5.0, top_k=3, seed=0),
    )
    greedy.last()
    sampled.last()
    assert greedy.tokens(0) == greedy.tokens(1) == [43, 42, 41, 40]
    assert sampled.tokens() == [42, 41, 40]
    assert greedy.reason() == sampled.reason() == "stop"


def broken_constraint() -> Countdown:
    raise RuntimeError("no such grammar")


def test_a_request_that_fails_leaves_the_others_alone(make: Callable[..., Engine], model: Model) -> None:
    engine = make(slots=4)
    good, broken, impossible = submit(
        engine,
        generation(PROMPTS[0], max_new_tokens=20, ignore_eos=True),
        generation(PROMPTS[1], constraint=broken_constraint, n=2),
        generation(PROMPTS[2], constraint=lambda: Countdown(-300)),
    )
    assert "no such grammar" in str(broken.error())
    assert isinstance(impossible.error(), Exception)
    good.last()
    assert good.tokens() == list(model.generate_ids(PROMPTS[0], max_new_tokens=20, ignore_eos=True))
    engine.drain(PATIENCE_S)
    stats = engine.stats()
    assert (stats.failed_requests, stats.healthy, stats.kv_tokens_used) == (2, True, 0)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_receiver_that_raises_ends_only_its_own_request(
    make: Callable[..., Engine], error: type[BaseException]
) -> None:
    def raising(event: Event) -> None:
        raise error(f"cannot take {event}")

    engine = make(slots=2)
    engine.submit(generation(PROMPTS[0], max_new_tokens=30, ignore_eos=True), raising)
    (good,) = submit(engine, generation(PROMPTS[1], max_new_tokens=5, ignore_eos=True))
    assert good.usage().completion_tokens == 5
    assert engine.drain(PATIENCE_S)
    assert engine.stats().kv_tokens_used == 0


@pytest.mark.parametrize("running", [True, False], ids=["running", "waiting"])
def test_cancelling_frees_the_slot_and_says_so(tiny: Path, model: Model, running: bool) -> None:
    engine = Engine(load(tiny), EngineSettings(slots=1))
    first, second = Receiver(), Receiver()
    gate, blocked = threading.Event(), threading.Event()

    def hold(event: Event) -> None:
        """Stop the engine at the first token until the test has cancelled."""
        first(event)
        if not blocked.is_set():
            blocked.set()
            assert gate.wait(PATIENCE_S)

    with engine:
        tickets = [engine.submit(generation(PROMPTS[0], max_new_tokens=50, ignore_eos=True), hold)]
        assert blocked.wait(PATIENCE_S)
        tickets.append(engine.submit(generation(PROMPTS[1], max_new_tokens=3, ignore_eos=True), second))
        engine.cancel(tickets[0 if running else 1])
        gate.set()
        cancelled, other = (first, second) if running else (second, first)
        assert cancelled.usage().completion_tokens == len(cancelled.tokens()) <= (1 if running else 0)
        assert cancelled.reason() == "cancelled"
        other.last()
        assert other.reason() == "length"
        engine.cancel(tickets[0])  # long over: nothing happens
        assert engine.drain(PATIENCE_S)
        assert engine.stats().kv_tokens_used == 0


def test_a_deadline_ends_what_is_unfinished(make: Callable[..., Engine]) -> None:
    past = time.monotonic() - 1
    late, late_scores, good = submit(
        make(slots=2),
        generation(PROMPTS[0], n=2, deadline=past),
        ScoreRequest(PROMPTS[0], ((1,),), deadline=past),
        generation(PROMPTS[1], max_new_tokens=2, ignore_eos=True, deadline=time.monotonic() + PATIENCE_S),
    )
    assert late.usage() == Usage(5, 0, 0)
    assert late.reason(0) == late.reason(1) == "deadline"
    assert isinstance(late_scores.error(), DeadlineError)
    assert good.usage().completion_tokens == 2


SCORED = [tuple(np.random.default_rng(4).integers(2, 200, size).tolist()) for size in (3, 1, 8, 5, 2, 13, 1)]


@pytest.mark.parametrize("run_tokens", [4, 256])
def test_scores_between_steps_of_decoding_equal_one_by_one(
    make: Callable[..., Engine], model: Model, monkeypatch: pytest.MonkeyPatch, run_tokens: int
) -> None:
    one_by_one = np.concatenate([model.score_ids(PROMPTS[2], [item]) for item in SCORED])
    monkeypatch.setattr(scoring, "RUN_TOKENS", run_tokens)
    engine = make(slots=2, prefill_tokens_per_step=3)
    requests = [generation(prompt, max_new_tokens=12, ignore_eos=True) for prompt in PROMPTS]
    scores = [ScoreRequest(PROMPTS[i], tuple(SCORED)) for i in (2, 0, 2)]
    receivers = submit(engine, *requests[:3], *scores, *requests[3:])
    generated, scored = [*receivers[:3], *receivers[6:]], receivers[3:6]
    for prompt, receiver in zip(PROMPTS, generated, strict=True):
        receiver.last()
        assert receiver.tokens() == list(model.generate_ids(prompt, max_new_tokens=12, ignore_eos=True))
    events = [receiver.last() for receiver in scored]
    found = [event.logits for event in events if isinstance(event, ScoreEvent)]
    assert np.abs(found[0] - one_by_one).max() < 1e-4
    assert np.abs(found[2] - one_by_one).max() < 1e-4
    assert np.abs(found[1] - model.score_ids(PROMPTS[0], SCORED)).max() < 1e-4
    assert isinstance(events[2], ScoreEvent)
    assert events[2].cached_tokens == len(PROMPTS[2]), "a prefix stays hot while another one is scored"
    engine.drain(PATIENCE_S)
    assert engine.stats().scored_items == 3 * len(SCORED)


def test_scores_can_be_cancelled(make: Callable[..., Engine]) -> None:
    engine, receiver = make(), Receiver()
    blocked, gate = threading.Event(), threading.Event()

    def hold(event: Event) -> None:
        blocked.set()
        assert gate.wait(PATIENCE_S)

    engine.submit(generation(PROMPTS[1], max_new_tokens=1), hold)
    assert blocked.wait(PATIENCE_S)
    ticket = engine.submit(ScoreRequest(PROMPTS[0], tuple(SCORED)), receiver)
    engine.cancel(ticket)
    gate.set()
    assert isinstance(receiver.error(), RequestCancelledError)


def test_a_failed_run_ends_what_was_in_it_and_the_engine_goes_on(
    make: Callable[..., Engine], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(slots=2)
    step, failures = BatchDecoder.step, [ResourceError("no memory"), CorruptArtifactError("it does not run")]

    def failing(batch: BatchDecoder, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        if failures:
            raise failures.pop()
        return step(batch, tokens)

    monkeypatch.setattr(BatchDecoder, "step", failing)
    for message in ("it does not run", "no memory"):
        (receiver,) = submit(engine, generation(PROMPTS[0], n=2, max_new_tokens=5, ignore_eos=True))
        assert str(receiver.error()) == message
    (good,) = submit(engine, generation(PROMPTS[0], max_new_tokens=5, ignore_eos=True))
    good.last()
    assert good.tokens() == list(model.generate_ids(PROMPTS[0], max_new_tokens=5, ignore_eos=True))
    assert engine.stats().healthy


def test_an_engine_that_cannot_compute_says_so_and_takes_nothing_more(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(slots=1)

    def failing(batch: BatchDecoder, ids: npt.NDArray[np.int64], *, last: bool) -> npt.NDArray[np.float32]:
        raise CorruptArtifactError("model.onnx does not run")

    monkeypatch.setattr(BatchDecoder, "extend", failing)
    receivers = submit(engine, *(generation(prompt) for prompt in PROMPTS[:3]))
    for receiver in receivers:
        assert "model.onnx does not run" in str(receiver.error())
    assert engine.drain(PATIENCE_S)
    engine._thread.join(PATIENCE_S)  # type: ignore[union-attr]
    stats = engine.stats()
    assert (stats.healthy, stats.failure, stats.running, stats.queued) == (False, "model.onnx does not run", 0, 0)
    with pytest.raises(EngineStoppedError, match=r"cannot compute any more: model\.onnx does not run"):
        engine.submit(generation(PROMPTS[0]), Receiver())


def test_draining_finishes_what_was_accepted_and_refuses_the_rest(make: Callable[..., Engine]) -> None:
    engine = make(slots=1)
    receivers = submit(engine, *(generation(p, max_new_tokens=3, ignore_eos=True) for p in PROMPTS))
    assert engine.drain(PATIENCE_S)
    assert [receiver.usage().completion_tokens for receiver in receivers] == [3] * len(PROMPTS)
    assert engine.stats().draining
    with pytest.raises(EngineStoppedError, match="takes no more requests"):
        engine.submit(generation(PROMPTS[0]), Receiver())


def test_closing_fails_what_has_not_ended(tiny: Path) -> None:
    engine, receiver = Engine(load(tiny), EngineSettings(slots=1)), Receiver()
    with pytest.raises(EngineStoppedError, match="has not been started"):
        engine.submit(generation(PROMPTS[0]), receiver)
    blocked, gate = threading.Event(), threading.Event()

    def hold(event: Event) -> None:
        receiver(event)
        blocked.set()
        assert gate.wait(PATIENCE_S)

    engine.start()
    with pytest.raises(InputError, match="started once"):
        engine.start()
    engine.submit(generation(PROMPTS[0], max_new_tokens=50, ignore_eos=True), hold)
    assert blocked.wait(PATIENCE_S)
    assert not engine.drain(0.0)
    closing = threading.Thread(target=engine.close)
    closing.start()
    with engine._changed:
        assert engine._changed.wait_for(lambda: engine._closing, PATIENCE_S)
    gate.set()
    closing.join()
    engine.close()
    assert isinstance(receiver.error(), EngineStoppedError)
    assert not engine.stats().healthy
    with pytest.raises(EngineStoppedError, match="was closed"):
        engine.submit(generation(PROMPTS[0]), receiver)


def test_no_more_wait_than_may(tiny: Path) -> None:
    engine = Engine(load(tiny), EngineSettings(slots=1, max_waiting=2))
    blocked, gate = threading.Event(), threading.Event()

    def hold(event: Event) -> None:
        blocked.set()
        assert gate.wait(PATIENCE_S)

    with engine:
        engine.submit(generation(PROMPTS[0], max_new_tokens=2), hold)
        assert blocked.wait(PATIENCE_S)
        receivers = submit(engine, generation(PROMPTS[1]), generation(PROMPTS[3]))
        assert engine.stats().queued >= 2
        with pytest.raises(QueueFullError, match="2 requests are waiting already"):
            engine.submit(generation(PROMPTS[2]), Receiver())
        gate.set()
        for receiver in receivers:
            receiver.last()
        submit(engine, generation(PROMPTS[2]))[0].last()


def test_what_cannot_run_is_refused_in_the_callers_thread(make: Callable[..., Engine], tiny: Path) -> None:
    token_bytes = 3 * 16 * 2 * 4
    engine = make(kv_bytes=30 * token_bytes)
    refused: list[tuple[GenerateRequest | ScoreRequest, str]] = [
        (generation((1,) * 64), "The prompt has 64 tokens, but the context"),
        (generation((1, 272)), "outside the vocabulary"),
        (generation(()), "There are no tokens"),
        (generation((1, 2), max_new_tokens=29), "need 31 places of keys and values, but this engine has 30"),
        (ScoreRequest((1,), ()), "There are no items"),
        (ScoreRequest((1,) * 60, ((2,) * 5,)), "Item 0 has 5 tokens behind a prefix of 60"),
    ]
    for request, message in refused:
        with pytest.raises(InputError, match=message):
            engine.submit(request, Receiver())
    assert engine.stats().requests == 0


def test_a_folder_for_one_task_refuses_the_other(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "generates", tasks=("generate",))
    with Engine(load(folder)) as engine, pytest.raises(InputError, match="was made for generate, not for score"):
        engine.submit(ScoreRequest((1,), ((2,),)), Receiver())


def test_it_holds_no_more_keys_and_values_than_it_may(make: Callable[..., Engine], model: Model) -> None:
    token_bytes = 3 * 16 * 2 * 4
    engine = make(slots=4, kv_bytes=30 * token_bytes)
    receivers = submit(engine, *(generation(p, max_new_tokens=9, ignore_eos=True) for p in PROMPTS))
    for prompt, receiver in zip(PROMPTS, receivers, strict=True):
        receiver.last()
        assert receiver.tokens() == list(model.generate_ids(prompt, max_new_tokens=9, ignore_eos=True))
    engine.drain(PATIENCE_S)
    stats = engine.stats()
    assert (stats.kv_tokens_used, stats.kv_tokens_capacity) == (0, 30)
    assert max(stats.batch_sizes) < 4


def test_figures_add_up(make: Callable[..., Engine]) -> None:
    engine = make(slots=2, prefix_cache_bytes=1 << 20)
    receivers = submit(engine, *(generation(p, max_new_tokens=5, ignore_eos=True) for p in PROMPTS))
    for receiver in receivers:
        receiver.last()
    assert engine.drain(PATIENCE_S)
    stats = engine.stats()
    assert (stats.requests, stats.queued, stats.running, stats.generated_tokens) == (6, 0, 0, 30)
    assert stats.prompt_tokens == sum(map(len, PROMPTS)) == stats.cache_hit_tokens + stats.cache_miss_tokens
    # The first token of each comes of its prompt, every other one of a row in a step.
    assert sum(size * count for size, count in stats.batch_sizes.items()) == 6 * 4
    assert stats.steps >= sum(stats.batch_sizes.values())


def test_settings_out_of_range_are_refused() -> None:
    for name in ("slots", "prefill_tokens_per_step", "max_waiting", "kv_bytes"):
        with pytest.raises(InputError, match=f"{name} must be 1 or more, not 0"):
            EngineSettings(**{name: 0})
    with pytest.raises(InputError, match="n must be 1 or more, not 0"):
        generation((1,), n=0)
    with pytest.raises(InputError, match="logprobs must be 0 or more, not -1"):
        replace(generation((1,)), logprobs=-1)


def test_many_threads_ask_and_cancel_at_once(make: Callable[..., Engine], model: Model) -> None:
    engine = make(slots=3, prefill_tokens_per_step=7, max_waiting=1000, prefix_cache_bytes=20_000)
    expected = [list(model.generate_ids(p, max_new_tokens=6, ignore_eos=True)) for p in PROMPTS]
    scores = model.score_ids(PROMPTS[0], SCORED)
    found: list[tuple[int, Receiver, bool]] = []

    def client(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(12):
            which, receiver = int(random.integers(len(PROMPTS))), Receiver()
            scoring_one = random.random() < 0.2
            request = (
                ScoreRequest(PROMPTS[0], tuple(SCORED))
                if scoring_one
                else generation(PROMPTS[which], max_new_tokens=6, ignore_eos=True, priority=int(random.integers(3)))
            )
            ticket = engine.submit(request, receiver)
            cancelled = random.random() < 0.3
            if cancelled:
                engine.cancel(ticket)
            found.append((-1 if scoring_one else which, receiver, cancelled))

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert engine.drain(PATIENCE_S)
    assert len(found) == 72
    for which, receiver, cancelled in found:
        last = receiver.last()
        if isinstance(last, ScoreEvent):
            assert np.abs(last.logits - scores).max() < 1e-4
        elif isinstance(last, Failed):
            assert cancelled
            assert which == -1
        else:
            made = receiver.tokens()
            assert made == expected[which][: len(made)]
            assert receiver.reason() == ("length" if len(made) == 6 else "cancelled")
            assert cancelled or len(made) == 6
    stats = engine.stats()
    assert (stats.running, stats.queued, stats.kv_tokens_used, stats.healthy) == (0, 0, 0, True)
