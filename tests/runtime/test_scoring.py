"""Scoring in blocks, packs and lanes equals scoring one by one, and all equal the logits of the whole model."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slmdeploy.runtime import scoring
from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.model import Model

RNG = np.random.default_rng(3)
PREFIX = [0, *RNG.integers(2, 200, 9).tolist()]
ITEMS = [RNG.integers(2, 200, size).tolist() for size in (3, 1, 8, 5, 2, 13, 1)]


@pytest.mark.parametrize("run_tokens", [1, 4, 9, 20, 256])
def test_packed_equals_one_by_one(model: Model, monkeypatch: pytest.MonkeyPatch, run_tokens: int) -> None:
    one_by_one = np.concatenate([model.score_ids(PREFIX, [item]) for item in ITEMS])
    monkeypatch.setattr(scoring, "RUN_TOKENS", run_tokens)
    packed = model.score_ids(PREFIX, ITEMS)
    assert packed.shape == (len(ITEMS), 2)
    assert packed.dtype == np.float32
    assert np.abs(packed - one_by_one).max() < 1e-4


@pytest.mark.parametrize("lane_prefix", [9, 10], ids=["prefix too long for lanes", "prefix in each lane"])
@pytest.mark.parametrize("threads", [2, 3])
def test_lanes_give_the_same_scores_in_the_same_order(
    tiny: Path, model: Model, monkeypatch: pytest.MonkeyPatch, lane_prefix: int, threads: int
) -> None:
    monkeypatch.setattr(scoring, "LANE_PREFIX", lane_prefix)
    monkeypatch.setattr(scoring, "RUN_TOKENS", 9)
    config = replace(model.runtime, parallel_items=True)
    lanes = Model(tiny, config, model.tokenizer, threads)
    for items in (ITEMS, ITEMS[:threads], ITEMS[:1], [ITEMS[2], *ITEMS[:2]]):
        assert np.abs(lanes.score_ids(PREFIX, items) - model.score_ids(PREFIX, items)).max() < 1e-4


def test_a_failure_in_a_lane_reaches_the_caller_and_the_next_request_works(
    tiny: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = Model(tiny, replace(model.runtime, parallel_items=True), model.tokenizer, 2)
    expected = lanes.score_ids(PREFIX, ITEMS)
    run = scoring.Lane.score

    def failing(lane: scoring.Lane, *arguments: object) -> object:
        if threading.current_thread() is not threading.main_thread():
            raise CorruptArtifactError("a lane failed")
        return run(lane, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring.Lane, "score", failing)
    with pytest.raises(CorruptArtifactError, match="a lane failed"):
        lanes.score_ids(PREFIX, ITEMS)
    monkeypatch.setattr(scoring.Lane, "score", run)
    assert np.abs(lanes.score_ids(PREFIX, ITEMS) - expected).max() < 1e-5


@pytest.mark.parametrize("run_tokens", [4, 20, 256])
@pytest.mark.parametrize(
    ("prefix", "computed"),
    [
        (PREFIX, 0),
        ([*PREFIX, 7, 8], 2),
        (PREFIX[:4], 0),
        ([*PREFIX[:4], 99, 98, 97], 3),
        ([99, *PREFIX], len(PREFIX) + 1),
    ],
    ids=["the same", "longer", "shorter", "other end", "other beginning"],
)
def test_a_request_computes_what_its_prefix_has_behind_the_last_one(
    tiny: Path,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    run_tokens: int,
    prefix: list[int],
    computed: int,
) -> None:
    monkeypatch.setattr(scoring, "RUN_TOKENS", run_tokens)
    warm, cold = (Model(tiny, model.runtime, model.tokenizer, 1) for _ in range(2))
    first = warm.score_ids(PREFIX, ITEMS)
    ran: list[int] = []
    run = scoring.Lane._run
    monkeypatch.setattr(
        scoring.Lane,
        "_run",
        lambda lane, past, new, items, *, keep: ran.append(new.size) or run(lane, past, new, items, keep=keep),
    )
    found = warm.score_ids(prefix, ITEMS)
    assert sum(ran) == computed
    assert np.abs(found - cold.score_ids(prefix, ITEMS)).max() < 1e-5
    assert np.abs(warm.score_ids(PREFIX, ITEMS) - first).max() < 1e-5


def test_a_prefix_that_the_caller_changes_later_is_not_taken_for_the_same(tiny: Path, model: Model) -> None:
    scorer, prefix = Model(tiny, model.runtime, model.tokenizer, 1), np.array(PREFIX)
    first = scorer.score_ids(prefix, ITEMS)
    prefix[3] = 77
    second = scorer.score_ids(prefix, ITEMS)
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(second - Model(tiny, model.runtime, model.tokenizer, 1).score_ids(prefix, ITEMS)).max() < 1e-5


def test_scores_are_the_whole_models_logits_of_the_label_words(model: Model) -> None:
    assert model.runtime.score is not None
    ends = np.array([model.logits(PREFIX + item)[-1] for item in ITEMS])
    assert np.abs(model.score_ids(PREFIX, ITEMS) - ends[:, model.runtime.score.label_ids]).max() < 1e-4


def test_text_is_scored_as_yes_minus_no(model: Model) -> None:
    items = ["an item", "another", " yes"]
    ids = [model.tokenizer.encode(item, add_special_tokens=False).ids for item in items]
    logits = model.score_ids(model.tokenizer.encode("a prefix").ids, ids)
    assert model.score("a prefix", items) == pytest.approx((logits[:, 1] - logits[:, 0]).tolist(), abs=1e-6)


def test_an_item_may_fill_the_context_and_no_more(model: Model) -> None:
    room = model.runtime.max_length - len(PREFIX)
    assert np.isfinite(model.score_ids(PREFIX, [[5], [6] * room, [7]])).all()
    with pytest.raises(InputError, match=f"Item 1 has {room + 1} tokens behind a prefix of 10, but the context .* 64"):
        model.score_ids(PREFIX, [[5], [6] * (room + 1)])
    with pytest.raises(InputError, match="Item 0 has 1 tokens behind a prefix of 64"):
        model.score_ids([2] * 64, [[5]])


def test_what_cannot_be_scored_is_refused(model: Model) -> None:
    for items in ([], "text"):
        with pytest.raises(InputError, match="There are no items to score"):
            model.score("prefix", items)
    with pytest.raises(InputError, match="The item 1 is empty"):
        model.score("prefix", ["x", ""])
    with pytest.raises(InputError, match="The prefix is empty"):
        model.score("", ["x"])
    with pytest.raises(InputError, match="There are no items"):
        model.score_ids(PREFIX, [])
    with pytest.raises(InputError, match="There are no tokens"):
        model.score_ids(PREFIX, [[]])
