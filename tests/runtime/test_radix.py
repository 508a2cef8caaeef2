"""The radix tree against a model that keeps every beginning of every sequence: never wrong, never over its capacity."""

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmdeploy.runtime.radix import Node, RadixTree, common

Tokens = tuple[int, ...]
SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)
ACTIONS = st.lists(st.tuples(st.sampled_from(["find", "insert", "hold", "drop"]), SEQUENCES), max_size=40)


def tree_of_tokens(capacity: int) -> RadixTree[Tokens]:
    """A tree whose payloads are the tokens themselves, so that what is found shows whether it is right."""
    return RadixTree(capacity, lambda payload, at: (payload[:at], payload[at:]))


def held(node: Node[Tokens]) -> Tokens:
    """The beginning that a node stands for."""
    return () if node.parent is None else held(node.parent) + node.tokens


def check_shape(tree: RadixTree[Tokens]) -> None:
    """Edges have tokens and their payloads, are filed under their first, and add up to the size."""
    nodes = list(tree.nodes())
    assert tree.size == sum(len(node.tokens) for node in nodes) <= tree.capacity
    for node in nodes:
        assert node.tokens == node.payload != ()
        assert node.parent is not None
        assert node.parent.children[node.tokens[0]] is node
        assert node.parent.parent is None or node.parent.holds >= node.holds
        assert node.parent.parent is None or node.parent.used >= node.used


@given(st.integers(0, 25), ACTIONS)
def test_what_is_found_is_right_whatever_was_done_before(capacity: int, actions: list[tuple[str, Tokens]]) -> None:
    tree = tree_of_tokens(capacity)
    inserted: set[Tokens] = set()
    holds: list[tuple[Node[Tokens], Tokens]] = []
    for action, tokens in actions:
        if action == "insert":
            node = tree.insert(tokens, lambda start, stop, tokens=tokens: tokens[start:stop])  # type: ignore[misc]
            inserted.add(tokens)
            assert common(held(node), tokens) == min(len(held(node)), len(tokens))
        elif action == "hold":
            found = tree.find(tokens)
            tree.hold(found.node)
            holds.append((found.node, tokens[: found.length]))
        elif action == "drop" and holds:
            tree.drop(holds.pop()[0])
        found = tree.find(tokens)
        assert found.length <= max((common(one, tokens) for one in inserted), default=0)
        assert sum((payload[:count] for payload, count in found.pieces), ()) == tokens[: found.length]
        assert all(count == len(payload) for payload, count in found.pieces[:-1])
        for _, beginning in holds:
            assert tree.find(beginning).length == len(beginning), "what is held stays"
        check_shape(tree)
    for node, _ in holds:
        tree.drop(node)
    assert all(node.holds == 0 for node in tree.nodes())


@given(st.lists(SEQUENCES, max_size=20))
def test_with_room_for_all_it_finds_what_a_list_of_all_sequences_would(sequences: list[Tokens]) -> None:
    tree = tree_of_tokens(1000)
    for i, tokens in enumerate(sequences):
        expected = max((common(one, tokens) for one in sequences[:i]), default=0)
        assert tree.find(tokens).length == expected
        tree.insert(tokens, lambda start, stop, tokens=tokens: tokens[start:stop])  # type: ignore[misc]
        assert tree.find(tokens).length == len(tokens)
    beginnings = {one[:n] for one in sequences for n in range(1, len(one) + 1)}
    assert tree.size == len(beginnings)


@given(st.integers(1, 6), st.lists(st.integers(0, 9), max_size=40))
def test_the_least_recently_used_goes_first(room: int, uses: list[int]) -> None:
    """Sequences that share nothing, each of 3 tokens: the tree is then a plain LRU cache of `room` entries."""
    tree, model = tree_of_tokens(3 * room), OrderedDict[int, None]()
    for use in uses:
        tokens = (use, 100, 200)
        assert tree.find(tokens).length == (3 if use in model else 0)
        tree.insert(tokens, lambda start, stop, tokens=tokens: tokens[start:stop])  # type: ignore[misc]
        model[use] = None
        model.move_to_end(use)
        if len(model) > room:
            model.popitem(last=False)
        assert {node.tokens[0] for node in tree.nodes()} == set(model)


def test_only_what_is_new_is_read() -> None:
    tree, read = tree_of_tokens(100), []

    def reader(start: int, stop: int) -> Tokens:
        read.append((start, stop))
        return (1, 2, 3, 4)[start:stop]

    tree.insert((1, 2), reader)
    tree.insert((1, 2), reader)
    tree.insert((1, 2, 3, 4), reader)
    assert read == [(0, 2), (2, 4)]


def test_a_sequence_that_does_not_fit_is_kept_as_far_as_it_does() -> None:
    tree = tree_of_tokens(5)
    first = tree.insert((1, 2, 3), lambda start, stop: (1, 2, 3)[start:stop])
    tree.hold(first)
    node = tree.insert((7, 8, 9), lambda start, stop: (7, 8, 9)[start:stop])
    assert held(node) == (7, 8)
    tree.drop(first)
    tree.insert((4, 5, 6, 7, 8), lambda start, stop: (4, 5, 6, 7, 8)[start:stop])
    assert tree.find((1,)).length == 0
    assert tree.find((4, 5, 6, 7, 8)).length == tree.size == 5


def test_nothing_is_kept_without_capacity() -> None:
    tree = tree_of_tokens(0)
    node = tree.insert((1, 2), lambda start, stop: pytest.fail("nothing is to be read"))
    assert node.parent is None
    assert tree.find((1, 2)).length == 0


def test_what_is_not_held_cannot_be_dropped() -> None:
    tree = tree_of_tokens(10)
    node = tree.insert((1,), lambda start, stop: (1,))
    with pytest.raises(AssertionError, match="only what is held"):
        tree.drop(node)


@given(st.integers(1, 12), st.lists(SEQUENCES, max_size=15))
def test_what_is_given_up_is_told_once(capacity: int, sequences: list[Tokens]) -> None:
    """Each token read is either still in the tree or was told to be forgotten."""
    forgotten: list[Tokens] = []
    read: list[Tokens] = []
    tree: RadixTree[Tokens] = RadixTree(capacity, lambda payload, at: (payload[:at], payload[at:]), forgotten.append)
    for tokens in sequences:
        tree.insert(tokens, lambda start, stop, tokens=tokens: read.append(tokens[start:stop]) or tokens[start:stop])  # type: ignore[misc, func-returns-value]
    assert sum(map(len, read)) == tree.size + sum(map(len, forgotten))
