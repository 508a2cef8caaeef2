"""Packed scoring equals scoring one by one, and both equal the logits of the whole model."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmdeploy.runtime import scoring
from slmdeploy.runtime.errors import InputError
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.scoring import pack, packing_bias

RNG = np.random.default_rng(3)
PREFIX = [0, *RNG.integers(2, 200, 9).tolist()]
ITEMS = [RNG.integers(2, 200, size).tolist() for size in (3, 1, 8, 5, 2, 13, 1)]


@pytest.mark.parametrize("pack_tokens", [1, 9, 20, 128])
def test_packed_equals_one_by_one(model: Model, monkeypatch: pytest.MonkeyPatch, pack_tokens: int) -> None:
    one_by_one = np.concatenate([model.score_ids(PREFIX, [item]) for item in ITEMS])
    monkeypatch.setattr(scoring, "PACK_TOKENS", pack_tokens)
    packed = model.score_ids(PREFIX, ITEMS)
    assert packed.shape == (len(ITEMS), 2)
    assert packed.dtype == np.float32
    assert np.abs(packed - one_by_one).max() < 1e-4


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


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 64))
def test_packs_hold_every_item_once_in_order_within_the_limit(sizes: list[int], limit: int) -> None:
    packs = list(pack(sizes, limit))
    assert [i for one in packs for i in one] == list(range(len(sizes)))
    assert all(len(one) == 1 or sum(sizes[i] for i in one) <= limit for one in packs)


def test_packs_are_of_about_equal_size() -> None:
    assert [len(one) for one in pack([16] * 10, 128)] == [5, 5]


def test_the_bias_hides_items_from_each_other_alone() -> None:
    hidden = packing_bias(np.array([2, 1]), 3) < 0
    assert hidden.astype(int).tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0]]
