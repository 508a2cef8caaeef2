"""What was measured of a build, for its package: the rows of a measurement with its content key, and their options.

The manifest holds every figure with its interval; the README those that people ask for. Knows nothing of how they were
measured nor of whether they are good.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmdeploy.artifacts import open_artifact
from slmdeploy.errors import InputError
from slmdeploy.metrics import PERCENTILES
from slmdeploy.selection import Row, read_rows

_TOLD = ("_p50", "_p99")
_PERCENTILES = tuple(f"_{name}" for name in PERCENTILES)


def rows_of(measurement: Path, build: Path) -> tuple[Row, ...]:
    """The rows of ``measurement`` that are of ``build``, one for each target; InputError where it has none."""
    key = open_artifact(build, "build").content_key
    rows = tuple(row for row in read_rows(measurement) if row.content_key == key)
    if not rows:
        raise InputError(f"{measurement} has no figures of {build}: measure it with slmdeploy profile")
    return rows


def session_options(rows: Sequence[Row]) -> dict[str, Any]:
    """The session options that `profile --search` found (`threads`, `spinning`, `prefill_chunk`), none without one."""
    searched = next((row.searched for row in rows if row.searched is not None), {})
    return {name: value for name, value in searched.items() if value is not None}


def peak_bytes(rows: Sequence[Row]) -> int:
    """The most resident memory that any of the measured rows had, 0 where none says."""
    return max((int(row.metrics.get("rss_peak_bytes", 0)) for row in rows if not row.estimated), default=0)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The figures as a manifest holds them."""
    return [
        {
            "target": row.target,
            "source": row.source,
            "metrics": dict(row.metrics),
            "intervals": {name: list(interval) for name, interval in row.intervals.items()},
        }
        for row in rows
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: a table for each target, of medians, 99th percentiles and what is no percentile."""
    return [line for row in rows for line in _section(row)]


def _section(row: Row) -> Iterator[str]:
    yield f"## {row.source.capitalize()} on {row.target or 'the machine that measured it'}"
    yield ""
    yield "With 95 % intervals where there are some; docs/measurement.md of slmdeploy defines each figure."
    yield ""
    yield "| figure | value | interval |"
    yield "|---|---|---|"
    for name, value in sorted(row.metrics.items()):
        if name.endswith(_TOLD) or not name.endswith(_PERCENTILES):
            yield f"| {name} | {_number(value)} | {_interval(row.intervals, name)} |"
    yield ""


def _interval(intervals: Mapping[str, tuple[float, float]], name: str) -> str:
    return f"{_number(intervals[name][0])} to {_number(intervals[name][1])}" if name in intervals else ""


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
