"""Speculative decoding: greedy output is the same, sampled output distributed the same, and the pace follows text."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from slmdeploy.cli import app
from slmdeploy.runtime.__main__ import main
from slmdeploy.runtime.drafting import ModelDraft
from slmdeploy.runtime.errors import InputError
from slmdeploy.runtime.generation import Settings
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.sampling import Odds, Sampler, Sampling, distribution
from slmdeploy.runtime.speculative import MOST_DRAFTED, DraftCounts, Pace, Proposal, Speculation, best_length
from tests.graphs import write_manifest, write_tiny_graph

PROMPTS = ("def f(", "a b a b a b", "x")
VOCAB = 4


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model of the same vocabulary that knows nothing of what `tiny` says, with a shorter context."""
    folder = tmp_path_factory.mktemp("graphs") / "other"
    return write_tiny_graph(folder, layers=1, seed=3, max_length=40, tasks=("generate",))


def drafted_by(path: Path, draft: Path) -> Model:
    """A model with a draft that passes for free, so that it drafts whatever the two take."""
    model, small = load(path, draft=draft), load(draft)
    model._make_drafter = lambda: ModelDraft(small.decoder, 0.0)
    return model


@pytest.fixture(params=["itself", "another", "lookup"])
def drafting(request: pytest.FixtureRequest, tiny: Path, other: Path) -> Model:
    """`tiny` with a draft that is always right, one that hardly ever is, and prompt lookup."""
    if request.param == "lookup":
        return load(tiny, prompt_lookup=True)
    return drafted_by(tiny, tiny if request.param == "itself" else other)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_output_is_the_same_to_the_end_of_the_context(
    model: Model, drafting: Model, prompt: str, penalty: float
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 200, "ignore_eos": True, "repetition_penalty": penalty}
    plain = model.generate(prompt, **options)
    assert drafting.generate(prompt, **options) == plain
    assert len(plain.token_ids) + plain.prompt_tokens == model.runtime.max_length


def test_end_tokens_stop_strings_and_streams_are_the_same(model: Model, drafting: Model, tiny: Path) -> None:
    whole = model.generate(PROMPTS[0], max_new_tokens=30, ignore_eos=True)
    stop = whole.text[8:11]
    options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True, "stop": [stop]}
    assert drafting.generate(PROMPTS[0], **options) == model.generate(PROMPTS[0], **options)
    assert "".join(drafting.stream(PROMPTS[0], **options)) == whole.text[: whole.text.index(stop)]
    assert list(drafting.generate_ids([5, 6], max_new_tokens=1)) == list(model.generate_ids([5, 6], max_new_tokens=1))


def test_an_end_token_among_the_guesses_ends_generation(tiny: Path, model: Model, tmp_path: Path) -> None:
    ids = model.tokenizer.encode(PROMPTS[0]).ids
    made = list(model.generate_ids(ids, max_new_tokens=20, ignore_eos=True))
    end = next(token for token in made[3:] if token not in made[:3])
    folder = write_tiny_graph(tmp_path / "ends", kv_heads=(2, 1))
    text = (folder / "runtime.json").read_text().replace('"eos_token_ids": [1]', f'"eos_token_ids": [{end}]')
    (folder / "runtime.json").write_text(text)
    write_manifest(folder)
    drafted = drafted_by(folder, tiny)
    assert list(drafted.generate_ids(ids, max_new_tokens=20)) == made[: made.index(end)]
    assert drafted.generate(PROMPTS[0], max_new_tokens=20).finish_reason == "stop"


def test_guesses_that_are_right_save_runs_and_are_counted(tiny: Path, other: Path) -> None:
    right, wrong = drafted_by(tiny, tiny), drafted_by(tiny, other)
    for drafted in (right, wrong):
        assert len(list(drafted.generate_ids([5, 6, 7], max_new_tokens=40, ignore_eos=True))) == 40
    good, bad = right.draft_counts, wrong.draft_counts
    assert good is not None
    assert bad is not None
    assert (good.accepted, good.tokens) == (good.drafted, 39)
    assert good.target_runs + good.accepted == 39
    assert bad.target_runs > good.target_runs
    assert good.to_dict()["acceptance"] == 1.0
    assert good.to_dict()["tokens_per_run"] == pytest.approx(39 / good.target_runs)
    assert DraftCounts().to_dict()["acceptance"] is None


def test_lookup_with_a_seed_draws_what_plain_sampling_draws(model: Model, tiny: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.7, "seed": 3, "ignore_eos": True}
    looked = load(tiny, prompt_lookup=True)
    assert looked.generate(PROMPTS[1], **options).token_ids == model.generate(PROMPTS[1], **options).token_ids


def test_a_draft_and_a_seed_give_the_same_tokens_each_time(tiny: Path, other: Path) -> None:
    drafted = drafted_by(tiny, other)
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "top_k": 20, "seed": 3, "ignore_eos": True}
    once = drafted.generate(PROMPTS[0], **options)
    assert drafted.generate(PROMPTS[0], **options) == once
    assert drafted.generate(PROMPTS[0], **{**options, "seed": 4}) != once


def test_a_newer_generation_ends_an_older_one(tiny: Path) -> None:
    drafted = drafted_by(tiny, tiny)
    older = drafted.generate_ids([5, 6], max_new_tokens=20, ignore_eos=True)
    next(older)
    next(drafted.generate_ids([7], max_new_tokens=20, ignore_eos=True))
    with pytest.raises(InputError, match="Another generation has begun"):
        list(older)


def test_what_cannot_be_drafted_for_is_refused_in_a_sentence(tiny: Path, tmp_path: Path) -> None:
    larger = write_tiny_graph(tmp_path / "larger", vocab=280, tasks=("generate",))
    with pytest.raises(InputError, match=r"has another vocabulary than .*tiny \(280 and 272 tokens\)"):
        load(tiny, draft=larger)
    with pytest.raises(InputError, match="do not go together"):
        load(tiny, draft=tiny, prompt_lookup=True)
    scorer = write_tiny_graph(tmp_path / "scorer", tasks=("score",))
    with pytest.raises(InputError, match="was made for score, not for generate"):
        load(tiny, draft=scorer)
    standard = write_tiny_graph(tmp_path / "standard", tasks=("generate",))
    text = (standard / "runtime.json").read_text().replace('"shared"', '"standard"')
    (standard / "runtime.json").write_text(text)
    write_manifest(standard)
    with pytest.raises(InputError, match="the standard interface, which cannot take tokens back"):
        load(standard, prompt_lookup=True)


class MarkovDecoder:
    """A decoder whose logits depend on the last token alone, so that what it should say is known exactly."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table.astype(np.float32)
        self.config = SimpleNamespace(eos_token_ids=(), max_length=100)
        self.cache = SimpleNamespace(length=0, truncate=self._truncate)
        self.sequence = 0

    def _truncate(self, length: int) -> None:
        self.cache.length = length

    def reserve(self, tokens: int) -> None:
        """Nothing to make room in."""

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.sequence, self.cache.length = self.sequence + 1, ids.size
        return self.table[ids[-1]]

    def step(self, token: int) -> np.ndarray:
        self.cache.length += 1
        return self.table[token]

    def extend(self, ids: np.ndarray) -> np.ndarray:
        self.cache.length += ids.size
        return self.table[ids]


class MarkovDraft:
    """Draws guesses from another table, the more of them the better."""

    cost = 0.0

    def __init__(self, table: np.ndarray, sampling: Sampling, seed: int) -> None:
        self.table, self.sampling = table.astype(np.float32), sampling
        self.sampler = Sampler(Sampling(temperature=1.0, seed=seed), ())

    def begin(self, prompt: Sequence[int], settings: Settings) -> None:
        """Keeps its random state, so that each generation of a test draws anew."""

    def propose(self, tokens: Sequence[int], count: int) -> Proposal:
        made, odds, last = [], [], tokens[-1]
        for _ in range(count):
            odds.append(distribution(self.table[last], self.sampling))
            made.append(last := self.sampler.draw(odds[-1]))
        return Proposal(made, odds)


def chi_square(counts: Counter[Any], expected: dict[Any, float]) -> float:
    """Pearson's statistic over the outcomes that can happen; any other outcome is infinitely wrong."""
    if any(outcome not in expected for outcome in counts):
        return float("inf")
    return sum((counts[outcome] - mean) ** 2 / mean for outcome, mean in expected.items())


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 3}])
def test_sampled_sequences_are_distributed_as_the_target_says(sampling: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    target, guess = random.normal(0, 1.0, (2, VOCAB, VOCAB))
    drafter = MarkovDraft(guess, Sampling(**sampling), seed=1)
    speculation = Speculation(MarkovDecoder(target), drafter)  # type: ignore[arg-type]
    rounds, counts, kept = 3000, Counter[tuple[int, ...]](), 0
    for seed in range(rounds):
        settings = Settings(**sampling, seed=seed)
        counts[tuple(speculation.tokens(np.array([0]), 3, settings))] += 1
        kept += speculation.counts.accepted
    rows = [distribution(row.astype(np.float32), Sampling(**sampling)) for row in target]
    odds = {row: {int(t): float(p) for t, p in zip(*rows[row], strict=True)} for row in range(VOCAB)}
    expected = {
        (a, b, c): rounds * odds[0][a] * odds[a][b] * odds[b][c] for a in odds[0] for b in odds[a] for c in odds[b]
    }
    # 99.9 % of the chi-square distribution with n degrees of freedom is below n + 3.1 sqrt(2 n) + 7.
    freedom = len(expected) - 1
    assert chi_square(counts, expected) < freedom + 3.1 * (2 * freedom) ** 0.5 + 7
    assert kept > 0
    # The test can fail: what the draft alone would say is far from it.
    alone = Counter({outcome: round(rounds / len(expected)) for outcome in expected})
    assert chi_square(alone, expected) > 10 * freedom


@pytest.mark.parametrize("shift", [0.0, 0.5, 5.0])
def test_judging_one_guess_keeps_the_distribution(shift: float) -> None:
    random = np.random.default_rng(5)
    wanted = random.normal(0, 1, 6).astype(np.float32)
    drawn_from = distribution((wanted + shift * random.normal(0, 1, 6)).astype(np.float32), Sampling(temperature=1.0))
    target, draft = Sampler(Sampling(temperature=1.0, seed=7), ()), Sampler(Sampling(temperature=1.0, seed=8), ())
    rounds = 6000
    guesses = [draft.draw(drawn_from) for _ in range(rounds)]
    made = [target.judge(wanted, guess, drawn_from) for guess in guesses]
    expected = {
        int(t): rounds * float(p) for t, p in zip(*distribution(wanted, Sampling(temperature=1.0)), strict=True)
    }
    assert chi_square(Counter(made), expected) < 20.5  # 99.9 % of the chi-square distribution with 5 degrees of freedom
    kept = sum(one == two for one, two in zip(made, guesses, strict=True)) / rounds
    overlap = sum(min(expected[t] / rounds, drawn_from.of(t)) for t in range(6))
    assert kept == pytest.approx(overlap, abs=0.03)  # the most that any rule can keep (Leviathan et al. 2023)


def test_a_certain_draft_of_equal_odds_is_always_kept() -> None:
    logits = np.array([0.0, 1.0, 2.0], np.float32)
    odds = distribution(logits, Sampling(temperature=1.0))
    sampler = Sampler(Sampling(temperature=1.0, seed=0), ())
    assert [sampler.judge(logits, 2, odds) for _ in range(50)] == [2] * 50
    impossible = Odds(np.array([0]), np.array([1.0]))
    strict = Sampler(Sampling(temperature=1.0, top_k=1, seed=0), ())
    assert strict.judge(logits, 0, impossible) == 2


def test_the_best_length_grows_with_acceptance_and_shrinks_with_cost() -> None:
    lengths = [best_length(acceptance, 0.1, MOST_DRAFTED) for acceptance in (0.1, 0.4, 0.6, 0.8, 0.95)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, MOST_DRAFTED)
    assert best_length(0.8, 0.5, MOST_DRAFTED) < best_length(0.8, 0.0, MOST_DRAFTED)
    assert best_length(0.99, 0.0, 2) == 2


def test_a_pace_stops_guessing_where_nothing_is_kept_and_asks_again_later() -> None:
    pace = Pace(draft_cost=0.3)
    assert pace.length(8) > 0
    for _ in range(12):
        pace.learn(4, 0)
    lengths = [pace.length(8) for _ in range(32)]
    assert set(lengths) == {0, 1}
    assert sum(lengths) == 2
    for _ in range(30):
        pace.learn(1, 1)
    assert pace.length(8) > 2
    assert pace.length(0) == 0
    expected = pace.length(8)
    for _ in range(10_000):
        pace.learn(0, 0)  # where nothing was guessed, nothing is learnt or forgotten
    assert pace.length(8) == expected


def test_both_command_lines_draft_and_say_what_it_came_to(
    tiny: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = model.generate(PROMPTS[1], max_new_tokens=20).text
    for option in (["--prompt-lookup"], ["--draft", str(tiny)]):
        arguments = [PROMPTS[1], "--max-new-tokens", "20", *option, "--json"]
        assert main([str(tiny), "generate", *arguments]) == 0
        on_device = json.loads(capsys.readouterr().out)
        done = CliRunner().invoke(app, ["generate", str(tiny), *arguments])
        on_workstation = json.loads(done.stdout.splitlines()[-1])
        assert on_device["text"] == on_workstation["text"] == expected
        assert on_device["drafting"] == on_workstation["drafting"]
        assert on_device["drafting"]["tokens"] > 0
    done = CliRunner().invoke(app, ["generate", str(tiny), PROMPTS[1], "--json"])
    assert "drafting" not in json.loads(done.stdout.splitlines()[-1])
