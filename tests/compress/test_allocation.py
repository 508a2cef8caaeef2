"""Sharing out over layers: the cheapest removals go, whole tiles at a time, and no layer is emptied."""

import pytest

from slmdeploy.compress.allocation import allocate


def test_the_layer_whose_groups_cost_least_gives_most() -> None:
    shares = allocate([[0.1, 0.2, 0.3, 0.4], [0.01, 0.02, 0.15, 0.5]], keep=4)
    assert [share.kept for share in shares] == [3, 1]
    assert [share.removed_cost for share in shares] == pytest.approx([0.1, 0.18])
    assert shares[0].next_cost == 0.2
    assert shares[1].next_cost is None


def test_groups_go_by_tiles_and_a_remainder_first() -> None:
    shares = allocate([[1.0] * 10, [0.0] * 10], keep=14, step=4)
    assert [share.kept for share in shares] == [10, 4]
    assert sum(share.kept for share in allocate([[1.0] * 10, [0.5] * 10], keep=13, step=4)) == 12
    assert shares[0].next_cost == 1.0


def test_nothing_goes_where_all_may_stay_and_one_group_always_stays() -> None:
    assert [share.kept for share in allocate([[1.0, 2.0], [3.0, 4.0]], keep=4)] == [2, 2]
    assert [share.kept for share in allocate([[0.0] * 3, [0.0] * 3], keep=0)] == [1, 1]
