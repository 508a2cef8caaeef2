"""Open loops keep to their times, closed loops to their clients; Poisson arrivals are what they say."""

import numpy as np
import pytest

from slmdeploy.profiling.arrivals import Clients, Scheduled, poisson

REQUESTS = [{"op": "x", "n": n} for n in range(6)]


def test_an_open_loop_is_moved_by_no_answer():
    source = Scheduled([0.0, 1.0, 1.0, 4.0], REQUESTS)
    assert source.due(0.5) == [(0.0, REQUESTS[0])]
    source.answered(0.9)
    assert source.next_arrival() == 1.0
    assert source.due(3.0) == [(1.0, REQUESTS[1]), (1.0, REQUESTS[2])]
    assert source.due(9.0) == [(4.0, REQUESTS[3])]
    assert source.next_arrival() is None


def test_each_client_waits_for_its_answer():
    source = Clients(REQUESTS[:3], 2)
    assert source.due(0.0) == [(0.0, REQUESTS[0]), (0.0, REQUESTS[1])]
    assert source.next_arrival() is None
    source.answered(2.5)
    assert source.due(2.5) == [(2.5, REQUESTS[2])]
    source.answered(3.0)
    assert source.due(9.0) == []


def test_more_clients_than_requests():
    assert len(Clients(REQUESTS[:2], 5).due(0.0)) == 2


def test_poisson_gaps_are_exponential_independent_and_seeded():
    n, rate = 4000, 50.0
    times = poisson(rate, n, [1, 2])
    assert times == poisson(rate, n, [1, 2])
    assert times != poisson(rate, n, [1, 3])
    gaps = np.diff([0.0, *times])
    # Kolmogorov-Smirnov against the exponential: 1.63 / sqrt(n) is the bound that 1 % of true samples exceed.
    ranks = np.sort(1 - np.exp(-gaps * rate))
    grid = np.arange(n) / n
    assert max(np.abs(ranks - grid).max(), np.abs(ranks - grid - 1 / n).max()) < 1.63 / np.sqrt(n)
    # Memoryless: neighbouring gaps do not tell of each other; of independent ones it is within 3 / sqrt(n).
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 3 / np.sqrt(n)
    # Counts in windows have their mean as variance: an index of dispersion of 1, within 4 standard errors.
    counts = np.histogram(times, bins=400, range=(0, times[-1]))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=4 * np.sqrt(2 / 400))
