"""Drafts within an engine: whoever runs alone gets the same tokens sooner, sampled and constrained ones too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmdeploy.runtime import drafting as drafting_module
from slmdeploy.runtime.batching import BatchDecoder
from slmdeploy.runtime.drafting import ModelDraft, PromptLookup
from slmdeploy.runtime.engine import Engine
from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.generation import Settings
from slmdeploy.runtime.lone_drafting import LoneDrafting
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.requests import EngineSettings, EngineStats, TokenEvent
from slmdeploy.runtime.speculative import Proposal
from tests.graphs import write_tiny_graph
from tests.runtime.receivers import PATIENCE_S, PROMPTS, Receiver, generation, submit
from tests.runtime.test_engine import Countdown

LONG = (7, 8, 9, 10) * 6


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model of the same vocabulary that knows nothing of what `tiny` says, with a shorter context."""
    folder = tmp_path_factory.mktemp("graphs") / "other"
    return write_tiny_graph(folder, layers=1, seed=3, max_length=40, tasks=("generate",))


@pytest.fixture(params=["itself", "another", "lookup"])
def drafting(request: pytest.FixtureRequest, tiny: Path, other: Path) -> Model:
    """`tiny` with a draft that is always right, one that hardly ever is, and prompt lookup; each costs nothing."""
    if request.param == "lookup":
        return load(tiny, prompt_lookup=True)
    draft = tiny if request.param == "itself" else other
    model, small = load(tiny, draft=draft), load(draft)
    model._make_drafter = lambda: ModelDraft(small.decoder, 0.0)
    return model


def one_by_one(model: Model, *asked: Any, **settings: Any) -> tuple[list[Receiver], EngineStats]:
    """Each request alone in the engine, one after the other; and what the engine counted."""
    receivers = []
    with Engine(model, EngineSettings(slots=4, **settings)) as engine:
        for request in asked:
            receivers += submit(engine, request)
            receivers[-1].last()
        assert engine.drain(PATIENCE_S)
        return receivers, engine.stats()


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_greedy_tokens_are_those_without_a_draft_to_the_end_of_the_context(
    model: Model, drafting: Model, cache: int
) -> None:
    asked = [generation(prompt, max_new_tokens=100, ignore_eos=True) for prompt in (*PROMPTS[:3], LONG, LONG)]
    found, stats = one_by_one(drafting, *asked, prefix_cache_bytes=cache)
    for request, receiver in zip(asked, found, strict=True):
        alone = list(model.generate_ids(request.prompt_ids, max_new_tokens=100, ignore_eos=True))
        assert receiver.tokens() == alone
        assert receiver.reason() == "length"
        assert receiver.usage().completion_tokens == len(alone) == 64 - len(request.prompt_ids)
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
    # The first token of each comes of its prompt, every other one of a step or of a guess that held.
    assert stats.generated_tokens == len(asked) + sum(stats.batch_sizes.values()) + stats.accepted_tokens
    assert stats.drafted_tokens > 0


def test_a_draft_that_is_always_right_saves_steps_and_one_that_is_not_costs_no_token(tiny: Path, other: Path) -> None:
    steps = []
    for draft in (tiny, other):
        model, small = load(tiny, draft=draft), load(draft)
        model._make_drafter = lambda small=small: ModelDraft(small.decoder, 0.0)
        found, stats = one_by_one(model, generation((5, 6, 7), max_new_tokens=40, ignore_eos=True))
        assert found[0].usage().completion_tokens == 40
        steps.append(sum(stats.batch_sizes.values()))
        if draft == tiny:
            assert stats.accepted_tokens == stats.drafted_tokens
    assert steps[0] < 39 / 3 < steps[1] <= 39


@pytest.mark.parametrize(("slots", "sampling"), [(2, {}), (4, {"temperature": 0.8, "seed": 5})])
def test_together_and_alone_give_the_same(model: Model, drafting: Model, slots: int, sampling: dict[str, Any]) -> None:
    """Requests of unequal lengths: sequences run together, and the last one of them alone."""
    options: list[dict[str, Any]] = [
        {"max_new_tokens": count, "ignore_eos": True, **sampling} for count in (3, 30, 12, 5, 40, 8)
    ]
    forked: dict[str, Any] = {"max_new_tokens": 9, "ignore_eos": True, "temperature": 0.7}
    with Engine(drafting, EngineSettings(slots=slots, prefill_tokens_per_step=3)) as engine:
        for _ in range(2):
            asked = [generation(prompt, **each) for prompt, each in zip(PROMPTS, options, strict=True)]
            *receivers, last = submit(engine, *asked, generation(LONG, n=3, seed=1, **forked))
            for prompt, each, receiver in zip(PROMPTS, options, receivers, strict=True):
                receiver.last()
                assert receiver.tokens() == list(model.generate_ids(prompt, **each))
            last.last()
            for choice in range(3):
                assert last.tokens(choice) == list(model.generate_ids(LONG, seed=1 + choice, **forked))
        assert engine.drain(PATIENCE_S)
        stats = engine.stats()
    assert max(stats.batch_sizes) > 1
    assert stats.drafted_tokens > 0 or drafting._make_drafter is PromptLookup  # these texts repeat little
    assert (stats.kv_tokens_used, stats.running, stats.failed_requests) == (0, 0, 0)


def test_a_seed_gives_what_it_gives_without_a_draft(model: Model, drafting: Model) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 30,
        "temperature": 0.8,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "seed": 3,
        "ignore_eos": True,
    }
    found, _ = one_by_one(drafting, *(generation(prompt, **options) for prompt in (*PROMPTS[:3], LONG)))
    for prompt, receiver in zip((*PROMPTS[:3], LONG), found, strict=True):
        assert receiver.tokens() == list(model.generate_ids(prompt, **options))


def test_end_tokens_stop_strings_and_logprobs_are_the_same(model: Model, drafting: Model) -> None:
    whole = model.generate(list(PROMPTS[0]), max_new_tokens=40, ignore_eos=True)
    stop = [whole.text[9:12]]
    plain = Engine(load(model.path), EngineSettings(slots=1))
    asked = [
        generation(PROMPTS[0], max_new_tokens=40, ignore_eos=True, stop=stop, logprobs=2),
        generation(PROMPTS[2], max_new_tokens=40),
    ]
    with plain as engine:
        expected = submit(engine, *asked)
        for receiver in expected:
            receiver.last()
    found, _ = one_by_one(drafting, *asked)
    for one, two in zip(expected, found, strict=True):
        assert (one.text(), one.reason(), one.tokens()) == (two.text(), two.reason(), two.tokens())
        pairs = zip(one.events, two.events, strict=True)
        for here, there in pairs:
            if isinstance(here, TokenEvent) and here.logprob is not None:
                assert isinstance(there, TokenEvent)
                assert there.logprob == pytest.approx(here.logprob, abs=1e-4)
    assert found[0].text() == model.generate(list(PROMPTS[0]), max_new_tokens=40, ignore_eos=True, stop=stop).text


def test_a_constraint_sees_only_what_is_kept(drafting: Model) -> None:
    (found,), _ = one_by_one(drafting, generation(LONG, max_new_tokens=30, constraint=lambda: Countdown(60)))
    assert found.tokens() == list(range(60, 39, -1))
    assert found.reason() == "stop"


def test_what_was_guessed_and_not_kept_is_not_in_the_prefix_cache(model: Model, drafting: Model) -> None:
    first = list(model.generate_ids(LONG, max_new_tokens=20, ignore_eos=True))
    longer = (*LONG, *first, 50, 51)
    asked = [generation(prompt, max_new_tokens=20, ignore_eos=True) for prompt in (LONG, longer[:44], longer)]
    found, _ = one_by_one(drafting, *asked, prefix_cache_bytes=1 << 20)
    for request, receiver in zip(asked, found, strict=True):
        count = min(20, 64 - len(request.prompt_ids))
        assert receiver.tokens() == list(model.generate_ids(request.prompt_ids, max_new_tokens=count, ignore_eos=True))
    assert found[1].usage().cached_tokens == 43


@pytest.mark.parametrize(("at_once", "unread"), [(3, 11), (256, 0)])
def test_a_draft_reads_a_long_text_in_pieces(
    model: Model, tiny: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, unread: int
) -> None:
    """Of 25 tokens and one more with each call it is at the end of the text after so many calls without a guess."""
    monkeypatch.setattr(drafting_module, "AT_ONCE", at_once)
    draft = ModelDraft(load(tiny).decoder, 0.0)
    draft.begin(list(LONG), Settings())
    text = [*LONG]
    for call in range(unread + 1):
        guesses = draft.propose([5], 3).tokens
        text.append(5)
        assert bool(guesses) == (call == unread)
    assert guesses == list(model.generate_ids(text, max_new_tokens=3, ignore_eos=True))


def test_a_run_that_fails_ends_its_request_and_no_other(
    drafting: Model, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, works = BatchDecoder.judge, [False]

    def failing(batch: BatchDecoder, ids: Any) -> Any:
        if works and not works.pop(0):
            raise CorruptArtifactError("it does not run")
        return judge(batch, ids)

    monkeypatch.setattr(BatchDecoder, "judge", failing)
    asked = generation(LONG, max_new_tokens=20, ignore_eos=True)
    with Engine(drafting, EngineSettings(slots=2)) as engine:
        (broken,) = submit(engine, asked)
        assert str(broken.error()) == "it does not run"
        (good,) = submit(engine, asked)
        good.last()
        assert good.tokens() == list(model.generate_ids(LONG, max_new_tokens=20, ignore_eos=True))
        assert engine.drain(PATIENCE_S)
        assert (engine.stats().healthy, engine.stats().kv_tokens_used) == (True, 0)


class Scripted:
    """A drafter that says what it was told and guesses what the test says; and the row that it is judged in."""

    cost = 0.0

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.guesses: list[int] = [1, 2, 3]

    def begin(self, prompt: Sequence[int], settings: Settings) -> None:
        self.said.append(("begin", *prompt, settings.temperature))

    def propose(self, tokens: Sequence[int], count: int) -> Proposal:
        self.said.append(("grown", *tokens))
        return Proposal(self.guesses[:count])

    def judge(self, tokens: np.ndarray) -> np.ndarray:
        self.said.append(("run", *tokens.tolist()))
        return np.zeros((tokens.size, 4), np.float32)

    def take_back(self, tokens: int) -> None:
        self.said.append(("back", tokens))


def test_it_follows_whoever_runs_alone_and_takes_back_what_was_wrong() -> None:
    said = Scripted()
    lone = LoneDrafting(said, said)
    assert lone.guess(7, [40], [50], 3) == [1, 2]
    assert lone.run(50, [1, 2]).shape == (3, 4)
    lone.used([1, 2], 1)
    assert lone.guess(7, [40], [50, 1, 9], 1) == []
    assert lone.guess(8, [41], [60, 61], 9) == [1, 2, 3]
    assert said.said == [
        ("begin", 40, 0.0),
        ("grown", 50),
        ("run", 50, 1, 2),
        ("back", 1),
        ("grown", 1, 9),
        ("begin", 41, 0.0),
        ("grown", 60, 61),
    ]


def test_where_guesses_are_never_kept_few_are_made() -> None:
    said = Scripted()
    lone = LoneDrafting(said, said)
    made, guessed = [0], []
    for _ in range(64):
        guesses = lone.guess(1, [40], made, 100)
        guessed.append(len(guesses))
        if guesses:
            lone.used(guesses, 0)
        made = [*made, 0]
    assert guessed[0] > 1
    assert sum(guessed[32:]) <= 2


def test_a_model_that_decodes_one_sequence_on_a_gpu_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slmdeploy.runtime.batch_generation import BatchOfOne

    model = load(tiny, prompt_lookup=True)
    monkeypatch.setattr(Model, "open_batch", lambda self, slots: BatchOfOne(self.decoder))
    with pytest.raises(InputError, match="runs on a GPU, where an engine does not draft"):
        Engine(model).start()
