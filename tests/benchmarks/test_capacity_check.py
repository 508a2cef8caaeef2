"""The check of `plan` against the load generator: one line before several drivers; in virtual time both agree."""

from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.capacity_check import Point, Shared, service_of, table
from slmdeploy.profiling.arrivals import Request, Scheduled, poisson
from slmdeploy.profiling.driving import Reply, drive

TIMES_MS = np.geomspace(4.0, 16.0, 200)


class Clock:
    """Virtual time, in which serving and sleeping take no real one."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def served(rate_per_s: float, n: int, seed: int) -> list[Reply]:
    """The records of ``n`` requests at Poisson times, each of which takes one of TIMES_MS of virtual time."""
    clock, random = Clock(), np.random.default_rng([seed, 1])  # not the stream that the arrivals come from

    def answer(asked: Sequence[Request]) -> list[Reply]:
        clock.now += float(random.choice(TIMES_MS)) / 1e3
        return [{} for _ in asked]

    source = Scheduled(poisson(rate_per_s, n, seed), [{}] * n)
    return drive(source, answer, clock=lambda: clock.now, sleep=clock.sleep)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_the_load_generator_and_the_simulation_agree_about_one_worker(share: float) -> None:
    rate = share / (np.mean(TIMES_MS) / 1e3)
    records = [record for seed in range(10) for record in served(rate, 4000, seed)[400:]]
    measured = np.percentile([(one["end_s"] - one["arrival_s"]) * 1e3 for one in records], (50, 90, 99))
    simulated = service_of([{"begin_s": 0.0, "end_s": ms / 1e3} for ms in TIMES_MS]).simulate(rate, 1)
    for found, one in zip(measured, simulated, strict=True):
        assert one.low < found < one.high
        assert one.value == pytest.approx(found, rel=0.1)


def test_drivers_of_one_line_get_one_request_each_the_longest_waiting_first() -> None:
    shared = Shared(Scheduled([0.0, 1.0, 2.0], [{"n": 0}, {"n": 1}, {"n": 2}]))
    assert shared.next_arrival() == 0.0
    assert shared.due(1.5) == [(0.0, {"n": 0})]
    assert shared.next_arrival() == 1.0
    assert shared.due(1.5) == [(1.0, {"n": 1})]
    assert shared.due(1.5) == []
    assert shared.next_arrival() == 2.0
    assert shared.due(2.0) == [(2.0, {"n": 2})]
    assert shared.next_arrival() is None


def test_the_table_has_the_errors_of_the_plan_and_of_the_queue_alone() -> None:
    points = [Point(1, 0.5, 50.0, "score_ms_p50", measured, 11.0, 10.0, 12.0, 10.0) for measured in (10.0, 10.0, 20.0)]
    said = table(points)
    assert "| 1 | 50% | 50 | score_ms_p50 | 10 | 11 (10 to 12) | +10% | +0% |" in said
    assert "Error of the plan: 10% in the median, 45% at most." in said
    assert "Error of the queue alone: 0% in the median, 50% at most." in said
