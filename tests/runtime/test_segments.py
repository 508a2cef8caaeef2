"""Segments are copies: what is split or joined has the right tokens and holds nobody else's memory."""

import numpy as np

from slmdeploy.runtime.model import Model
from slmdeploy.runtime.segments import joined, segment_tree, split, token_bytes


def test_split_parts_have_memory_of_their_own_and_join_to_the_whole() -> None:
    whole = [np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3), np.arange(5, dtype=np.float32).reshape(1, 5, 1)]
    first, rest = split(whole, 2)
    assert [part.shape for part in (*first, *rest)] == [(2, 2, 3), (1, 2, 1), (2, 3, 3), (1, 3, 1)]
    assert all(part.base is None for part in (*first, *rest))
    for found, expected in zip(joined([(first, 2), (rest, 2)]), whole, strict=True):
        assert np.array_equal(found, expected[:, :4])
        assert found.flags.c_contiguous
    (view, _) = joined([(whole, 3)])
    assert np.shares_memory(view, whole[0])
    assert view.shape == (2, 3, 3)


def test_a_tree_has_room_for_as_many_tokens_as_fit_into_its_bytes(model: Model) -> None:
    """The tiny model has 2 and 1 KV heads of 16 numbers: keys and values of a token are 2 x 48 floats."""
    assert token_bytes(model.runtime) == 384
    assert segment_tree(1000, model.runtime).capacity == 2
    assert segment_tree(0, model.runtime).capacity == 0
