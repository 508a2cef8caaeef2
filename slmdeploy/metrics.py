"""Every metric that a measurement can hold, each defined where it is declared, and ratios to the baseline.

A metric has a unit and a direction; a budget names metrics from this list and no others. A latency or throughput metric
without a workload in its name belongs to the first workload of its task and scenario. Percentiles are linear between
order statistics. Scenario names are MLPerf's. Knows nothing of how a value is measured (profiling/) or judged
(selection.py), so that both can use it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PERCENTILES = (50, 90, 99)
RATIO = "_ratio"


@dataclass(frozen=True)
class Metric:
    """A named quantity; ``better`` says which direction is an improvement."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    definition: str


_LATENCIES = {
    "ttft_ms": "time from handing a prompt's token ids to the engine until the first new token (single-stream)",
    "tpot_ms": "time per output token of one request, (end to end - ttft) / (new tokens - 1) (single-stream)",
    "itl_ms": "time between two successive tokens, pooled over all requests (single-stream)",
    "e2e_ms": "time from handing a prompt's token ids to the engine until its last new token (single-stream)",
    "score_ms": "time to score one request: a prefix and all of its items (single-stream)",
    "encode_ms": "time to run one request's texts through an encoder, to vectors or labels (single-stream)",
}

_SINGLE = (
    Metric("tokens_per_s", "tokens/s", "higher", "new tokens of all requests sent back to back / wall time (offline)"),
    Metric("items_per_s", "items/s", "higher", "scored items of all requests sent back to back / wall time (offline)"),
    Metric("texts_per_s", "texts/s", "higher", "encoded texts of all requests sent back to back / wall time (offline)"),
    Metric("rss_peak_bytes", "bytes", "lower", "peak resident memory of the build's own process after the workloads"),
    Metric(
        "load_s", "s", "lower", "load and a smallest first request of each task; hashing included, Python's imports not"
    ),
    Metric(
        "size_bytes", "bytes", "lower", "files of the folder that running it reads: graph, weights, config, tokenizer"
    ),
    Metric(
        "bits_per_byte",
        "bits/byte",
        "lower",
        "-sum log2 p(completion | prompt) / UTF-8 bytes of the completion, test split",
    ),
    Metric(
        "auc",
        "",
        "higher",
        "area under the ROC curve pooled over all (query, item) pairs of the test split; a tie is half",
    ),
    Metric("auc_per_query", "", "higher", "mean over queries of the AUC of each query's own items; a tie is half"),
    Metric(
        "mrr_at_10",
        "",
        "higher",
        "mean over queries of 1 / rank of the best relevant item, 0 beyond 10; ties rank last",
    ),
    Metric("kl_to_baseline", "nats/token", "lower", "mean over completion positions of KL(baseline || build)"),
    Metric(
        "top1_agreement",
        "",
        "higher",
        "share of completion positions where build and baseline rank the same token first",
    ),
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *(
            Metric(f"{name}_p{percent}", "ms", "lower", f"percentile {percent} of the {definition}")
            for name, definition in _LATENCIES.items()
            for percent in PERCENTILES
        ),
        *_SINGLE,
    )
}

RELATIVE = ("kl_to_baseline", "top1_agreement")
"""Metrics that compare with the baseline already, so that they have no ratio."""


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
