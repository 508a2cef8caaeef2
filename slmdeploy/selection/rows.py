"""What is chosen from: one row per (target, build) pair, with its figures and how sure they are.

A figure is a metric of slmdeploy/metrics.py, or ``workload:metric`` where it belongs to one workload. Knows nothing of
files (reading.py) nor of what a budget asks (judging.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from slmdeploy.errors import InputError
from slmdeploy.metrics import RATIO

Interval = tuple[float, float]
Source = Literal["measured", "estimated"]


@dataclass(frozen=True)
class Point:
    """One point of a latency-load curve: the offered rate, and what was measured under it."""

    rate_per_s: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Load:
    """What one workload gave besides its figures: per-request times in ms by name, and its latency-load curve.

    ``batch`` is how many requests were answered together at most.
    """

    task: str
    scenario: str
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    batch: int = 1


@dataclass(frozen=True)
class Row:
    """One build on one target. ``gates_failed`` are the names of its own gates that it is outside of.

    ``searched`` are the session options that it was measured with, where a search found them. ``price_per_hour_usd`` is
    that of its target, where it is known. ``label`` is what people read: the build's name, with the target's where the
    rows are of several.
    """

    build: str
    metrics: Mapping[str, float]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    path: str = ""
    precision: str = ""
    graph: str | None = None
    gates_failed: tuple[str, ...] = ()
    baseline: bool = False
    target: str | None = None
    source: Source = "measured"
    content_key: str | None = None
    searched: Mapping[str, int | bool | None] | None = None
    loads: Mapping[str, Load] = field(default_factory=dict)
    price_per_hour_usd: float | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """What people read of it."""
        return self.label or self.build

    @property
    def estimated(self) -> bool:
        """Whether its figures come from a model of the target instead of from the target."""
        return self.source == "estimated"

    def interval(self, figure: str) -> Interval:
        """The 95 % interval of a figure, its value included; the value itself where no interval was measured."""
        value = self.metrics[figure]
        low, high = self.intervals.get(figure, (value, value))
        return min(low, value), max(high, value)

    def workloads(self) -> set[str]:
        """The workloads that some figure of this row belongs to."""
        return {figure.rsplit(":", 1)[0] for figure in self.metrics if ":" in figure}


def candidates(rows: Sequence[Row]) -> list[Row]:
    """The rows that can be chosen, labelled, in an order of their own. The baseline never can.

    Raises InputError when there is none, when two are of the same target and build (it would not be clear which figures
    count), or when builds of one name have different content keys (they are not the same build).
    """
    found = sorted((row for row in rows if not row.baseline), key=lambda row: (row.build, row.target or ""))
    if not found:
        raise InputError("there is no measured build to choose from: run `slmdeploy profile` on at least one")
    for one, two in pairwise(found):
        if (one.build, one.target) == (two.build, two.target):
            where = f" on {one.target}" if one.target else ""
            raise InputError(f"{one.build}{where} is in the measurements more than once: give each measurement once")
    _refuse_namesakes(found)
    several = len({row.target for row in found}) > 1
    return [replace(row, label=f"{row.build}@{row.target}" if several and row.target else row.build) for row in found]


QUALITY = (
    *("bits_per_byte", "perplexity", "auc", "auc_per_query", "mrr_at_10", "ndcg_at_10", "accuracy", "exact_match"),
    *("kl_to_baseline", "top1_agreement", "kl_to_fp32", "top1_to_fp32"),
)
"""Metrics that belong to a build wherever it runs; so do their ratios to the baseline."""


def with_quality(rows: Sequence[Row]) -> list[Row]:
    """``rows``, where an estimated one that lacks a quality figure has the one measured of the same build elsewhere.

    A model of a target knows its speed and nothing of quality, which is the build's own (the same content key).
    """
    measured = {row.content_key: row for row in reversed(rows) if row.content_key and not row.estimated}
    return [
        _with_quality(row, measured[row.content_key]) if row.estimated and row.content_key in measured else row
        for row in rows
    ]


def _with_quality(row: Row, other: Row) -> Row:
    taken = {name for name in other.metrics if name.removesuffix(RATIO) in QUALITY} - set(row.metrics)
    metrics = {**row.metrics, **{name: other.metrics[name] for name in taken}}
    intervals = {**row.intervals, **{name: other.intervals[name] for name in taken & set(other.intervals)}}
    return replace(row, metrics=metrics, intervals=intervals)


def _refuse_namesakes(rows: Sequence[Row]) -> None:
    keys: dict[str, str] = {}
    for row in rows:
        if row.content_key and keys.setdefault(row.build, row.content_key) != row.content_key:
            raise InputError(
                f"the measurements hold two different builds of the name {row.build} (content keys "
                f"{keys[row.build][:12]} and {row.content_key[:12]}): measure the same build, or rename one"
            )
