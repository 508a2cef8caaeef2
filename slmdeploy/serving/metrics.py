"""Figures for Prometheus: latencies as histograms by the profiler's names, and what the engine counts itself.

A latency is what metrics.py defines it to be, measured here between the request's arrival at the server and the moment
its tokens reach the event loop, and in milliseconds although Prometheus prefers seconds: `slmdeploy_ttft_ms` and a
budget's `ttft_ms_p99` are then one quantity. Each server has a registry of its own. Knows no endpoint.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from slmdeploy.metrics import LATENCIES
from slmdeploy.runtime.requests import EngineStats

PREFIX = "slmdeploy_"
BUCKETS_MS = (1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 1500, 2500, 5000, 10000, 30000, 60000)
"""From a step of a small model to a deadline; between neighbours a percentile is uncertain by half of the gap."""
OF_DECODER = ("queue_ms", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "score_ms")
OF_ENCODER = ("queue_ms", "encode_ms", "score_ms")
"""What each kind of server measures."""


class Figures:
    """The registry of one server, with these latencies."""

    def __init__(self, latencies: Sequence[str] = OF_DECODER) -> None:
        self.registry = CollectorRegistry()
        self._latencies = {
            name: Histogram(PREFIX + name, _sentence(LATENCIES[name]), buckets=BUCKETS_MS, registry=self.registry)
            for name in latencies
        }
        self._requests = Counter(
            PREFIX + "requests", "Requests answered, by path and status.", ("path", "status"), registry=self.registry
        )
        self._ready = Gauge(PREFIX + "ready", "1 while new requests are taken.", registry=self.registry)
        self._in_flight = Gauge(
            PREFIX + "http_in_flight", "Requests between arrival and the end of their answer.", registry=self.registry
        )

    def latency(self, name: str, milliseconds: float) -> None:
        """A latency of LATENCIES."""
        self._latencies[name].observe(milliseconds)

    def answered(self, path: str, status: int) -> None:
        """A request that has ended; `path` is a route's, never what a client wrote."""
        self._requests.labels(path, str(status)).inc()

    def in_flight(self, change: int) -> None:
        """A request more or fewer."""
        self._in_flight.inc(change)

    def watch_ready(self, ready: Callable[[], bool]) -> None:
        """Read readiness when asked."""
        self._ready.set_function(lambda: float(ready()))

    def watch_engine(self, stats: Callable[[], EngineStats]) -> None:
        """Read the engine's own figures when asked."""
        self.registry.register(EngineCollector(stats))

    def watch_queue(self, queued: Callable[[], int], running: Callable[[], int]) -> None:
        """Of an encoder, which has no engine: requests that wait, and those in the batch that runs."""
        for name, help_text, read in (
            ("queued", _QUEUED, queued),
            ("running", _RUNNING, running),
        ):
            Gauge(PREFIX + name, help_text, registry=self.registry).set_function(read)


_QUEUED = "Requests accepted and not begun."
_RUNNING = "Requests begun and not ended."
_GAUGES = {
    "queued": _QUEUED,
    "running": _RUNNING,
    "kv_tokens_used": "Places of keys and values set aside for running sequences.",
    "kv_tokens_capacity": "Places of keys and values that there are.",
    "cache_tokens_used": "Tokens in the prefix cache.",
    "cache_tokens_capacity": "Tokens that the prefix cache holds at most.",
}
_COUNTERS = {
    "engine_requests": ("requests", "Requests accepted by the engine."),
    "engine_steps": ("steps", "Steps of the engine."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts and prefixes."),
    "prefix_cache_hit_tokens": ("cache_hit_tokens", "Tokens of prompts and prefixes found in the prefix cache."),
    "prefix_cache_miss_tokens": ("cache_miss_tokens", "Tokens of prompts and prefixes that had to be computed."),
    "generated_tokens": ("generated_tokens", "New tokens."),
    "drafted_tokens": ("drafted_tokens", "Tokens guessed by the draft or looked up."),
    "accepted_tokens": ("accepted_tokens", "Guesses that saved a step of decoding."),
    "scored_items": ("scored_items", "Items scored."),
    "engine_failed_requests": ("failed_requests", "Requests that ended with an error."),
}


class EngineCollector(Collector):
    """The engine's figures as they are at the moment of asking."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        stats = self._stats()
        yield GaugeMetricFamily(PREFIX + "engine_healthy", "1 while the engine computes.", float(stats.healthy))
        for name, help_text in _GAUGES.items():
            yield GaugeMetricFamily(PREFIX + name, help_text, getattr(stats, name))
        for name, (attribute, help_text) in _COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, help_text, getattr(stats, attribute))
        yield _batch_sizes(stats)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the engine may not have begun."""
        return ()


def _batch_sizes(stats: EngineStats) -> Metric:
    """Steps of decoding by the number of sequences in them, cumulative as Prometheus has it."""
    total, buckets = 0, []
    for size in sorted(stats.batch_sizes):
        total += stats.batch_sizes[size]
        buckets.append((str(float(size)), float(total)))
    weighted = float(sum(size * count for size, count in stats.batch_sizes.items()))
    return HistogramMetricFamily(
        PREFIX + "batch_size",
        "Sequences in a step of decoding.",
        buckets=[*buckets, ("+Inf", float(total))],
        sum_value=weighted,
    )


def _sentence(definition: str) -> str:
    return definition[:1].upper() + definition[1:] + ", in milliseconds."


@dataclass
class Stopwatch:
    """The times of one choice, from the arrival of its request; milliseconds."""

    figures: Figures
    started: float
    first: float | None = None
    last: float = 0.0
    tokens: int = field(default=0)

    def token(self) -> None:
        """A token has come."""
        now = time.monotonic()
        if self.first is None:
            self.first = now
            self.figures.latency("ttft_ms", 1e3 * (now - self.started))
        else:
            self.figures.latency("itl_ms", 1e3 * (now - self.last))
        self.last = now
        self.tokens += 1

    def done(self) -> None:
        """The choice has ended; one without a token has no latencies."""
        if self.first is None:
            return
        self.figures.latency("e2e_ms", 1e3 * (self.last - self.started))
        if self.tokens > 1:
            self.figures.latency("tpot_ms", 1e3 * (self.last - self.first) / (self.tokens - 1))
