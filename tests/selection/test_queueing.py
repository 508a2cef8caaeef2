"""The simulated queue against what queueing theory knows: M/M/1, M/D/1 and M/M/c, and its own ordering."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmdeploy.selection.queueing import WARM_UP, Draws, percentile, waits_ms

RUNS, REQUESTS = 40, 5000


def exponential(mean_ms):
    """Samples whose distribution is nearly exponential: its quantiles at the middle of equal shares."""
    shares = (np.arange(20_000) + 0.5) / 20_000
    return -mean_ms * np.log1p(-shares)


def simulated(service_ms, rate_per_s, servers):
    """Mean wait in ms, and four standard errors of it over the runs."""
    draws = Draws.make(len(service_ms), runs=RUNS, requests=REQUESTS, seed=7)
    means = waits_ms(draws, np.asarray(service_ms), rate_per_s, servers).mean(axis=1)
    return means.mean(), 4 * means.std(ddof=1) / math.sqrt(RUNS)


def erlang_c(servers, offered):
    """Probability that a request waits in M/M/c with ``offered`` = rate x mean service."""
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) / (1 - offered / servers)
    return last / (sum(terms) + last)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_m_m_1_waits_as_known(load):
    wait, error = simulated(exponential(10.0), load * 100, 1)
    assert abs(wait - 10.0 * load / (1 - load)) < error + 0.01 * wait


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_m_d_1_waits_half_of_that(load):
    wait, error = simulated([10.0], load * 100, 1)
    assert abs(wait - 10.0 * load / (2 * (1 - load))) < error + 0.01 * wait


@pytest.mark.parametrize(("servers", "load"), [(2, 0.5), (2, 0.8), (5, 0.8), (12, 0.9)])
def test_m_m_c_waits_by_erlang_c(servers, load):
    wait, error = simulated(exponential(10.0), load * servers * 100, servers)
    known = erlang_c(servers, load * servers) * 10.0 / (servers * (1 - load))
    assert abs(wait - known) < error + 0.01 * known


def test_a_percentile_of_the_time_in_m_m_1_is_as_known():
    draws = Draws.make(20_000, runs=RUNS, requests=REQUESTS, seed=3)
    service = exponential(10.0)
    waits = waits_ms(draws, service, 50.0, 1)
    served = service[draws.picks][:, int(REQUESTS * WARM_UP) :]
    value, low, high = percentile(waits + served, 99)
    assert low < 20.0 * math.log(100) < high
    assert low <= value <= high


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=9), st.floats(1, 400), st.integers(1, 6), st.integers(0, 99))
def test_more_servers_or_a_lower_rate_never_make_a_request_wait_longer(service, rate, servers, seed):
    draws = Draws.make(len(service), runs=2, requests=60, seed=seed)
    times = np.asarray(service)
    waits = waits_ms(draws, times, rate, servers)
    assert np.all(waits_ms(draws, times, rate, servers + 1) <= waits + 1e-6)
    assert np.all(waits_ms(draws, times, rate / 2, servers) <= waits + 1e-6)


def test_draws_are_the_same_for_the_same_seed():
    one, same, other = (Draws.make(5, runs=2, requests=9, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.gaps, same.gaps)
    assert np.array_equal(one.picks, same.picks)
    assert not np.array_equal(one.gaps, other.gaps)
    assert one.picks.min() >= 0
    assert one.picks.max() < 5
