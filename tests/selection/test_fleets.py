"""How many replicas a load takes: against theory, against the extremes, and what cannot be answered."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmdeploy.errors import InputError
from slmdeploy.selection import fleets
from slmdeploy.selection.fleets import LARGEST_LINE, Service, check, fewest, limit_under_load
from slmdeploy.selection.rows import Load, Point
from slmdeploy.specs import parse_constraint


def service(samples, *limits, task="score", **more):
    """A workload's service under limits; ``more`` are samples besides those of the task."""
    base = {"score": "score_ms", "generate": "e2e_ms"}[task]
    load = Load(task, "single-stream", {base: tuple(map(float, samples)), **more})
    return Service(load, [limit_under_load(parse_constraint(text), task) for text in limits])


def test_without_load_a_request_takes_its_service_time():
    (alone,) = service([10.0] * 100, "score_ms_p99<=50").alone()
    assert (alone.value, alone.low, alone.high) == (10.0, 10.0, 10.0)
    (waiting,) = service([10.0] * 100, "queue_ms_p99<=50").alone()
    assert waiting.high == 0.0


def test_as_many_as_the_work_keeps_busy_and_not_many_more():
    size = fewest(service([10.0] * 100, "score_ms_p99<=30"), 1000.0)
    assert size is not None
    assert 11 <= size.replicas <= 12
    assert size.groups == 1
    assert 1000.0 <= size.holds_up_to_per_s < 1200.0


def test_one_replica_fewer_or_a_higher_rate_breaks_the_limit():
    served = service(np.linspace(5, 25, 200), "score_ms_p99<=40")
    size = fewest(served, 200.0)
    assert size is not None
    assert not served.broken(served.simulate(200.0, size.replicas))
    assert served.broken(served.simulate(200.0, size.replicas - 1))
    assert not served.broken(served.simulate(size.holds_up_to_per_s, size.replicas))
    assert served.broken(served.simulate(size.holds_up_to_per_s * 1.02, size.replicas))


def test_the_99th_percentile_of_one_in_m_m_1_is_found():
    shares = (np.arange(2000) + 0.5) / 2000
    served = service(-10.0 * np.log1p(-shares), "score_ms_p99<=1000")
    (simulated,) = served.simulate(50.0, 1)
    assert simulated.low < 20.0 * math.log(100) < simulated.high


def test_a_limit_below_the_service_time_is_held_by_no_number():
    assert fewest(service([10.0] * 100, "score_ms_p99<=9"), 1.0) is None


def test_every_limit_counts():
    loose, tight = "score_ms_p50<=100", "score_ms_p99<=16"
    one, both = fewest(service([10.0] * 100, loose), 500.0), fewest(service([10.0] * 100, loose, tight), 500.0)
    assert one is not None
    assert both is not None
    assert both.replicas > one.replicas


def test_a_large_fleet_is_split_into_lines():
    size = fewest(service([10.0] * 100, "score_ms_p99<=30"), 20_000.0)
    assert size is not None
    assert size.groups == 200 // LARGEST_LINE
    assert size.replicas % size.groups == 0
    assert 200 < size.replicas < 230


def test_waiting_that_was_measured_is_no_service():
    waited = service([15.0] * 100, "score_ms_p99<=30", queue_ms=(5.0,) * 100)
    assert waited.mean_s == pytest.approx(0.010)


def test_the_first_token_waits_too():
    served = service([100.0] * 100, "ttft_ms_p99<=60", "e2e_ms_p99<=150", task="generate", ttft_ms=(20.0,) * 100)
    first, last = served.simulate(5.0, 1)
    assert last.value - first.value == pytest.approx(80.0)


@pytest.mark.parametrize(
    "text", ["score_ms_p99>=1", "tpot_ms_p99<=1", "e2e_ms_p99<=1", "size_bytes<=1", "ttft_ms_p50<=1"]
)
def test_a_limit_that_replicas_do_not_help_with_is_refused(text):
    with pytest.raises(InputError, match="limit score_ms_p99 or queue_ms_p99"):
        limit_under_load(parse_constraint(text), "score")


def test_too_few_or_unpaired_requests_are_refused():
    with pytest.raises(InputError, match="99 requests are too few for the percentile: measure 100"):
        service([10.0] * 99, "score_ms_p99<=30")
    with pytest.raises(InputError, match="no score_ms of single requests"):
        service([], "score_ms_p50<=30")
    with pytest.raises(InputError, match="no score_ms of single requests"):
        service([10.0] * 100, "score_ms_p50<=30", queue_ms=(1.0,))


def test_the_curve_is_compared_where_it_was_not_saturated():
    points = (Point(50.0, {"score_ms_p50": 10.0, "score_ms_p99": 50.0}), Point(99.0, {"score_ms_p99": 900.0}))
    load = Load("score", "server", {"score_ms": (10.0,) * 100}, points)
    (found,) = check(Service(load, [limit_under_load(parse_constraint("score_ms_p99<=80"), "score")]), load)
    assert (found.metric, found.rate_per_s, found.measured) == ("score_ms_p99", 50.0, 50.0)
    assert found.error == pytest.approx(found.simulated / 50.0 - 1)


@settings(deadline=None, max_examples=8)
@given(st.lists(st.floats(1, 20), min_size=10, max_size=20), st.integers(1, 300), st.floats(21, 90))
def test_a_higher_rate_or_a_tighter_limit_never_takes_fewer(samples, rate, limit):
    with pytest.MonkeyPatch.context() as patch:  # the order holds draw by draw, so few draws show it
        patch.setattr(fleets, "REQUESTS", 300)
        patch.setattr(fleets, "RUNS", 4)
        sizes = [
            fewest(service(samples, f"score_ms_p90<={limit * share}"), rate * times)
            for share, times in ((1.0, 1.0), (1.0, 1.5), (0.95, 1.0))
        ]
    base, faster, tighter = (math.inf if size is None else size.replicas for size in sizes)
    assert faster >= base
    assert tighter >= base
