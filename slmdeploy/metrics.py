"""Every metric that a measurement can hold, each defined where it is declared, and ratios to the baseline.

A metric has a unit and a direction; a budget names metrics from this list and no others. Times run from a request's
arrival: in single-stream nothing waits, in the scenarios server, concurrent and trace the wait is in the figure. A
latency without a workload in its name belongs, with all of its percentiles, to the first workload that is
single-stream, or to the first of all; tokens, items and texts per second to the first that is offline, else concurrent;
requests and goodput per second to the first in which requests queue, else offline. Percentiles are linear between order
statistics. Knows nothing of how a value is measured (profiling/) or judged (selection/), so that both can use it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
"""Names and values. A percentile is given where at least one request is expected beyond it, the median always."""
RATIO = "_ratio"


@dataclass(frozen=True)
class Metric:
    """A named quantity; ``better`` says which direction is an improvement."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    definition: str


LATENCIES = {
    "ttft_ms": "time from a prompt's arrival until its first new token",
    "tpot_ms": "time per output token of one request, (end to end - ttft) / (new tokens - 1)",
    "itl_ms": "time between two successive tokens, pooled over all requests",
    "e2e_ms": "time from a prompt's arrival until its last new token",
    "score_ms": "time from the arrival of a prefix and all of its items until the last score",
    "encode_ms": "time from the arrival of a request's texts until the last vector or label",
    "queue_ms": "time from a request's arrival until work on it begins",
}

_SINGLE = (
    Metric("tokens_per_s", "tokens/s", "higher", "new tokens / wall time from first arrival to last answer"),
    Metric("items_per_s", "items/s", "higher", "scored items / wall time from first arrival to last answer"),
    Metric("texts_per_s", "texts/s", "higher", "encoded texts / wall time from first arrival to last answer"),
    Metric("requests_per_s", "requests/s", "higher", "answered requests / wall time from first arrival to last answer"),
    Metric(
        "goodput_per_s", "requests/s", "higher", "requests within the workload's goodput limits / the same wall time"
    ),
    Metric("rss_peak_bytes", "bytes", "lower", "peak resident memory of the build's own process after the workloads"),
    Metric(
        "kv_bytes",
        "bytes",
        "lower",
        "keys and values of the longest request of the workloads, as the build stores them",
    ),
    Metric("load_s", "s", "lower", "opening the build until it is ready; hashing included, Python's imports not"),
    Metric(
        "first_request_s", "s", "lower", "a smallest first request of each task, in which sessions open, after load_s"
    ),
    Metric(
        "size_bytes", "bytes", "lower", "files of the folder that running it reads: graph, weights, config, tokenizer"
    ),
    Metric(
        "energy_j_per_request",
        "J",
        "lower",
        "joules of the energy counters (RAPL, NVML) over a workload's turns / its requests, idle power included",
    ),
    Metric(
        "bits_per_byte",
        "bits/byte",
        "lower",
        "-sum log2 p(completion | prompt) / UTF-8 bytes of the completion, test split",
    ),
    Metric("perplexity", "", "lower", "exp of the mean negative log-likelihood of a completion's token, test split"),
    Metric(
        "auc", "", "higher", "area under the ROC curve pooled over all (query, item) pairs, test split; a tie is half"
    ),
    Metric("auc_per_query", "", "higher", "mean over queries of the AUC of each query's own items; a tie is half"),
    Metric(
        "mrr_at_10",
        "",
        "higher",
        "mean over queries of 1 / rank of the best relevant item, 0 beyond 10; ties rank last",
    ),
    Metric("ndcg_at_10", "", "higher", "mean over queries of DCG at 10 / ideal DCG at 10, gain 1; ties rank last"),
    Metric("accuracy", "", "higher", "share of (query, item) pairs whose more probable label is the right one"),
    Metric(
        "exact_match",
        "",
        "higher",
        "share of completions whose every token is the most probable one behind the true ones",
    ),
    Metric("kl_to_baseline", "nats/token", "lower", "mean over completion positions of KL(baseline || build)"),
    Metric(
        "top1_agreement",
        "",
        "higher",
        "share of completion positions where build and baseline rank the same token first",
    ),
    Metric(
        "kl_to_fp32",
        "nats/token",
        "lower",
        "mean over completion positions of KL(fp32 build of the same graph || build)",
    ),
    Metric(
        "top1_to_fp32",
        "",
        "higher",
        "share of positions where build and fp32 build of its graph rank the same token first",
    ),
    Metric(
        "cost_usd_per_million_requests",
        "USD",
        "lower",
        "price per hour / 3600 / (highest goodput_per_s, else requests_per_s, of a load curve) x 1e6; made by select",
    ),
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *(
            Metric(f"{name}_{label}", "ms", "lower", f"percentile {percent:g} of the {definition}")
            for name, definition in LATENCIES.items()
            for label, percent in PERCENTILES.items()
        ),
        *_SINGLE,
    )
}

RELATIVE = ("kl_to_baseline", "top1_agreement", "kl_to_fp32", "top1_to_fp32", "cost_usd_per_million_requests")
"""Metrics that compare already or that no baseline has, so that they have no ratio."""


def known_names() -> list[str]:
    """Every name that a budget may use: the metrics and their ratios to the baseline."""
    return [*METRICS, *(name + RATIO for name in METRICS if name not in RELATIVE)]


def describe(name: str) -> Metric:
    """The metric called ``name``; a ratio has its metric's direction. KeyError for a name not in `known_names`."""
    if not name.endswith(RATIO):
        return METRICS[name]
    base = METRICS[name.removesuffix(RATIO)]
    if base.name in RELATIVE:
        raise KeyError(name)
    return Metric(name, "x", base.better, f"{base.name} / the baseline's {base.name}")


def with_ratios(metrics: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """``metrics`` and, for each one that the baseline has too and is not 0 there, value / baseline's value.

    >>> with_ratios({"auc": 0.9, "load_s": 1.0}, {"auc": 0.75})
    {'auc': 0.9, 'load_s': 1.0, 'auc_ratio': 1.2}
    """
    shared = [name for name in metrics if baseline.get(name) and name not in RELATIVE]
    return {**metrics, **{name + RATIO: metrics[name] / baseline[name] for name in shared}}
