"""What a scorer keeps: the last prefix always, more where there is room; scores do not depend on it."""

from pathlib import Path

import numpy as np
import pytest

from slmdeploy.runtime import scoring
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.scoring import Scorer
from slmdeploy.runtime.segments import token_bytes

RNG = np.random.default_rng(5)
SHARED = RNG.integers(2, 200, 8).tolist()
PREFIXES = [np.array(SHARED + RNG.integers(2, 200, size).tolist()) for size in (4, 7, 12)]
ITEMS = [RNG.integers(2, 200, size) for size in (3, 1, 5)]


@pytest.fixture
def scorer(tiny: Path, model: Model) -> Scorer:
    assert model.runtime.score is not None
    return Scorer(tiny, model.runtime, model.runtime.score, threads=1)


@pytest.mark.parametrize("run_tokens", [4, 256])
def test_many_prefixes_stay_hot(scorer: Scorer, model: Model, monkeypatch: pytest.MonkeyPatch, run_tokens: int) -> None:
    monkeypatch.setattr(scoring, "RUN_TOKENS", run_tokens)
    tree = scorer.keep_prefixes(1 << 20)
    for _ in range(2):
        for prefix in PREFIXES:
            run = scorer.begin(prefix, ITEMS)
            while not run.done:
                run.advance()
            assert np.abs(run.scores - model.score_ids(prefix.tolist(), [i.tolist() for i in ITEMS])).max() < 1e-4
    assert run.cached_tokens == PREFIXES[-1].size
    assert scorer.begin(PREFIXES[0], ITEMS).cached_tokens == PREFIXES[0].size
    assert scorer.begin(np.array([*SHARED, 99]), ITEMS).cached_tokens == len(SHARED)
    assert tree.size == len(SHARED) + 4 + 7 + 12


def test_without_room_the_last_one_is_kept_all_the_same(scorer: Scorer) -> None:
    for prefix in PREFIXES:
        scorer.score(prefix, ITEMS)
    assert scorer.begin(PREFIXES[2], ITEMS).cached_tokens == PREFIXES[2].size
    assert scorer.begin(PREFIXES[0], ITEMS).cached_tokens == len(SHARED)


def test_a_small_cache_gives_up_the_oldest(scorer: Scorer, model: Model) -> None:
    tree = scorer.keep_prefixes(22 * token_bytes(model.runtime))
    for prefix in PREFIXES:
        scorer.score(prefix, ITEMS)
        assert tree.size <= tree.capacity == 22
    assert scorer.begin(PREFIXES[2], ITEMS).cached_tokens == PREFIXES[2].size
    assert scorer.begin(PREFIXES[0], ITEMS).cached_tokens == len(SHARED)


def test_requests_whose_pieces_alternate_do_not_disturb_each_other(
    scorer: Scorer, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "RUN_TOKENS", 4)
    runs = [scorer.begin(prefix, ITEMS) for prefix in PREFIXES]
    while any(not run.done for run in runs):
        for run in runs:
            if not run.done:
                run.advance()
    for prefix, run in zip(PREFIXES, runs, strict=True):
        assert np.abs(run.scores - model.score_ids(prefix.tolist(), [i.tolist() for i in ITEMS])).max() < 1e-4


def test_without_memory_for_the_cache_scores_come_all_the_same(
    scorer: Scorer, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = scorer.keep_prefixes(1 << 20)

    def out_of_memory(tokens: object, read: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tree, "insert", out_of_memory)
        found = scorer.score(PREFIXES[0], ITEMS)
    assert np.abs(found - model.score_ids(PREFIXES[0].tolist(), [i.tolist() for i in ITEMS])).max() < 1e-4
    assert tree.size == 0
    assert scorer.begin(PREFIXES[0], ITEMS).cached_tokens == PREFIXES[0].size, "the last prefix is kept as it is"
