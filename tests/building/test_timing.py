"""timing.py: the rounds of a measurement, and fewer of them for what is slow."""

import itertools

import pytest

from slmdeploy.building import timing


def test_all_rounds_of_what_is_quick() -> None:
    assert list(timing.turns(2, 5)) == [False, False, True, True, True, True, True]


@pytest.mark.parametrize(("seconds", "counted"), [(0.1, 7), (4.0, 5), (60.0, 3)])
def test_rounds_end_after_ten_seconds_but_not_before_the_third(
    monkeypatch: pytest.MonkeyPatch, seconds: float, counted: int
) -> None:
    clock = itertools.count(0.0, seconds)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert sum(timing.turns(1, 7)) == counted
