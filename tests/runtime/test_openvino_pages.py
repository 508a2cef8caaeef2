"""Pages of keys and values: who holds which, what is copied when sequences part, and growth that keeps all."""

from typing import Any

import numpy as np
import pytest

from slmdeploy.runtime.errors import ResourceError
from slmdeploy.runtime.openvino_pages import PagedSequence, PagePool

PAGE = 4
CACHES: dict[str, tuple[str, list[int | None]]] = {
    "key_cache.0": ("f32", [None, 2, PAGE, 3]),
    "value_cache.0": ("bf16", [None, 1, PAGE, 3]),
}


class Inputs:
    """What a request was given last, by name."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}

    def set_as(self, name: str, array: Any, element: str) -> None:
        self.arrays[name] = array


@pytest.fixture
def inputs() -> Inputs:
    return Inputs()


@pytest.fixture
def pool(inputs: Inputs) -> PagePool:
    return PagePool(inputs, CACHES)  # type: ignore[arg-type]


def sequence(pool: PagePool, tokens: int) -> PagedSequence:
    found = PagedSequence()
    pool.extend(found, tokens)
    found.length = tokens
    return found


def test_a_sequence_gets_as_many_pages_as_it_needs(pool: PagePool) -> None:
    found = sequence(pool, PAGE + 1)
    assert len(found.pages) == 2
    pool.extend(found, 2 * PAGE)
    assert len(found.pages) == 2
    pool.extend(found, 2 * PAGE + 1)
    assert len(set(found.pages)) == 3 == pool.held
    pool.release(found)
    assert (pool.held, found.pages, found.length) == (0, [], 0)


def test_two_sequences_never_share_what_one_of_them_will_write(pool: PagePool, inputs: Inputs) -> None:
    first = sequence(pool, PAGE + 2)
    for array in inputs.arrays.values():
        array[first.pages] = np.arange(2).reshape(2, 1, 1, 1) + 5
    second = pool.fork(first)
    assert second.length == first.length
    assert second.pages[0] == first.pages[0]
    assert second.pages[1] != first.pages[1]
    for array in inputs.arrays.values():
        np.testing.assert_array_equal(array[second.pages], array[first.pages])
    pool.release(first)
    assert pool.held == 2, "the shared page stays while somebody holds it"
    pool.release(second)
    assert pool.held == 0


def test_full_pages_are_shared_without_a_copy(pool: PagePool) -> None:
    first = sequence(pool, 2 * PAGE)
    second = pool.fork(first)
    assert second.pages == first.pages
    pool.extend(second, 2 * PAGE + 1)
    assert second.pages[:2] == first.pages
    assert pool.held == 3


def test_growth_keeps_what_pages_hold(pool: PagePool, inputs: Inputs) -> None:
    first = sequence(pool, 3)
    inputs.arrays["key_cache.0"][first.pages] = 7
    before = inputs.arrays["key_cache.0"]
    others = [sequence(pool, PAGE) for _ in range(before.shape[0])]
    after = inputs.arrays["key_cache.0"]
    assert after.shape[0] == 2 * before.shape[0]
    np.testing.assert_array_equal(after[first.pages], 7)
    assert inputs.arrays["value_cache.0"].dtype == np.uint16
    assert len({page for other in others for page in other.pages} | set(first.pages)) == len(others) + 1


def test_a_sequence_that_cannot_be_forked_leaves_no_page_held(pool: PagePool, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = [sequence(pool, PAGE + 1), *(sequence(pool, PAGE) for _ in range(62))]
    assert pool.held == 64

    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("slmdeploy.runtime.openvino_pages._buffer", full)
    with pytest.raises(ResourceError, match="no memory for keys and values"):
        pool.fork(first)
    pool.release(first)
    assert pool.held == 62
