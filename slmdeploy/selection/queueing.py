"""A queue simulated: Poisson arrivals, measured service times, one line in front of several servers (M/G/c, FIFO).

The draws are made once and do not depend on rate or servers, so more servers or a lower rate never make any request
wait longer (common random numbers), and the search for the fewest servers is a search in an ordered set. Knows nothing
of builds, budgets or prices.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WARM_UP = 0.1
"""Share of each run that does not count, because the queue starts empty."""


@dataclass(frozen=True)
class Draws:
    """What chance decides in ``runs`` runs: gaps of a Poisson process of rate 1, and which sample serves each request.

    ``gaps``: float [runs, requests]. ``picks``: int [runs, requests], indices into the samples.
    """

    gaps: Array
    picks: NDArray[np.int64]

    @classmethod
    def make(cls, samples: int, *, runs: int, requests: int, seed: int) -> Self:
        """Draw for a workload with ``samples`` measured requests.

        Each run picks from a bootstrap resample of its own, so the spread over runs holds what is unsure about the
        measured distribution besides what is unsure about the simulation.
        """
        random = np.random.default_rng(seed)
        gaps = random.exponential(1.0, (runs, requests))
        resamples = random.integers(0, samples, (runs, samples))
        places = random.integers(0, samples, (runs, requests))
        return cls(gaps, np.take_along_axis(resamples, places, axis=1))


def waits_ms(draws: Draws, service_ms: Array, rate_per_s: float, servers: int) -> Array:
    """How long each request waits before it is served, float [runs, requests], the warm-up left out.

    Each request takes the server that is free first, which is first come, first served in one line (Kiefer and
    Wolfowitz 1955, On the theory of queues with many servers).
    """
    arrivals = np.cumsum(draws.gaps, axis=1) * (1e3 / rate_per_s)
    services = service_ms[draws.picks]
    runs, requests = arrivals.shape
    free_at = np.zeros((runs, servers))
    waits = np.empty((requests, runs))
    every = np.arange(runs)
    for i, (arrival, service) in enumerate(zip(arrivals.T, services.T, strict=True)):
        server = free_at.argmin(axis=1)
        begin = np.maximum(arrival, free_at[every, server])
        waits[i] = begin - arrival
        free_at[every, server] = begin + service
    return waits.T[:, int(requests * WARM_UP) :]


def percentile(times: Array, percent: float) -> tuple[float, float, float]:
    """Percentile ``percent`` over all runs of ``times`` [runs, requests], and the 95 % interval from one per run."""
    per_run = np.percentile(times, percent, axis=1)
    low, high = np.percentile(per_run, (2.5, 97.5))
    return float(np.percentile(times, percent)), float(low), float(high)
