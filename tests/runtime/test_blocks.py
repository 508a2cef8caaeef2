"""blocks.py: who sees whom, where each token stands, and how items are packed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmdeploy.runtime.blocks import lay_out, pack, shares, slots_for


@given(st.integers(0, 30), st.integers(0, 30), st.lists(st.integers(1, 12), max_size=8), st.integers(0, 10))
def test_every_token_sees_the_prefix_before_it_and_its_own_item(
    past: int, prefix: int, sizes: list[int], extra: int
) -> None:
    if past + prefix == 0 or prefix + sum(sizes) == 0:
        return
    slots = max([1, *sizes]) + extra
    layout = lay_out(past, prefix, sizes, slots)
    item = [-1] * prefix + [i for i, size in enumerate(sizes) for _ in range(size)]
    row = [past + token for token in range(len(item))]  # rows of the pool: past first, then this run
    for token, own in enumerate(item):
        block, slot = layout["token_blocks"][token], layout["token_slots"][token]
        assert layout["query_tokens"][block, slot] == token
        columns = layout["attention_bias"][block, 0, slot] == 0
        seen = layout["key_tokens"][block][columns].tolist()
        if own < 0:
            expected = [*range(past), *row[: token + 1]]
        else:
            expected = [*range(past + prefix), *(row[t] for t in range(token + 1) if item[t] == own)]
        assert seen == expected, f"token {token} of {item}"
        position = past + token if own < 0 else past + prefix + token - item.index(own)
        assert layout["position_ids"][0, token] == position


@pytest.mark.parametrize(
    ("seen", "prefix", "sizes", "slots"),
    [
        (20, 20, [22] * 10, 24),
        (20, 20, [5, 60], 60),
        (200, 0, [16] * 32, 50),
        (2000, 0, [16] * 32, 64),
        (3, 3, [2], 3),
        (9, 9, [], 9),
        (512, 256, [], 64),
    ],
)
def test_slots_grow_with_the_prefix_and_hold_the_longest_item(
    seen: int, prefix: int, sizes: list[int], slots: int
) -> None:
    assert slots_for(seen, prefix, sizes) == slots


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 64))
def test_packs_hold_every_item_once_in_order_within_the_limit(sizes: list[int], limit: int) -> None:
    packs = pack(sizes, limit)
    assert [i for one in packs for i in one] == list(range(len(sizes)))
    assert all(len(one) == 1 or sum(sizes[i] for i in one) <= limit for one in packs)


def test_packs_are_of_about_equal_size() -> None:
    assert [len(one) for one in pack([16] * 10, 128)] == [5, 5]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 5))
def test_shares_hold_every_item_once_in_order_and_are_about_equal(sizes: list[int], count: int) -> None:
    found = shares(sizes, count)
    assert [i for one in found for i in one] == list(range(len(sizes)))
    assert 1 <= len(found) <= count
    tokens = [sum(sizes[i] for i in one) for one in found]
    assert max(tokens) <= sum(sizes) / count + max(sizes)
