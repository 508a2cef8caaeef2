"""Which charts a run has, and what they say: trade-off, latency by percentile, by load, by items, sensitivity.

Each chart is an SVG with its data as a table beside it, so nothing is told by a picture alone. A chart whose data was
not measured is not there. Knows metrics and rows; how a mark is drawn is svg.py's business.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slmdeploy.metrics import METRICS, PERCENTILES, RATIO
from slmdeploy.reporting.records import Interval, Measured, Row, Run, Table
from slmdeploy.reporting.svg import Axis, Kind, Plot, axis, bars
from slmdeploy.reporting.wording import amount, base_of, in_unit, number, span, title, unit
from slmdeploy.specs import Constraint, parse_constraint

_LATENCY = {"generate": "tpot_ms_p50", "score": "score_ms_p50", "encode": "encode_ms_p50"}
_QUALITY = {
    "generate": ("bits_per_byte", "perplexity", "kl_to_baseline", "kl_to_fp32", "size_bytes"),
    "score": ("auc", "ndcg_at_10", "mrr_at_10", "accuracy", "kl_to_fp32", "size_bytes"),
    "encode": ("accuracy", "auc", "ndcg_at_10", "kl_to_fp32", "size_bytes"),
}
_SERVICE = ("ttft_ms", "tpot_ms", "score_ms", "encode_ms")
_QUEUED = ("ttft_ms", "e2e_ms", "score_ms", "encode_ms")
_MOST_BARS = 16
_LEAST = 0.01


@dataclass(frozen=True)
class Chart:
    """A picture with a title, a sentence below it, and its data."""

    title: str
    caption: str
    svg: str
    data: Table


@dataclass(frozen=True)
class Section:
    """Charts of one kind."""

    anchor: str
    title: str
    lead: str
    charts: tuple[Chart, ...]


def sections(run: Run) -> list[Section]:
    """Every section of charts that the run has data for, in the order of a page."""
    rows = list(zip(run.series, run.labels, run.rows, strict=True))
    found = [
        Section("trade-off", "The trade-off", _TRADE_OFF, tuple(_trade_offs(run, rows))),
        Section("latency", "Latency by percentile", _PERCENTILES, tuple(_distributions(rows))),
        Section("load", "Latency against load", _LOAD, tuple(_by_load(rows))),
        Section("items", "Latency against the number of items", _ITEMS, tuple(_by_items(rows))),
        Section("sensitivity", "Per-layer sensitivity", _SENSITIVITY, tuple(_sensitivities(run, rows))),
    ]
    return [section for section in found if section.charts]


_TRADE_OFF = (
    "Latency against quality, or against size where no quality was measured. Each mark is a build; its area is its "
    "peak memory where that was measured, else its size on disk. The line joins the builds that no other beats in "
    "both; the shaded side of a limit is outside the budget. Hollow marks are estimates."
)
_PERCENTILES = (
    "The time that this share of requests took at most; each step to the right is another nine. Marks are percentiles "
    "with at least one request expected beyond them, with their 95 % interval."
)
_LOAD = "Requests arrive at random at the offered rate and wait their turn; the wait is in the figure."
_ITEMS = (
    "One request scores so many items behind one prefix. Hot: the prefix was kept from an earlier request (dashed)."
)
_SENSITIVITY = (
    "Parts that stayed in higher precision than the profile asks for, and what each costs when it alone is quantised."
)

Named = tuple[int, str, Row]


def _spoken(metric: str, value: float, interval: Interval | None) -> str:
    ends = span(metric, interval)
    return f"{title(metric)} {amount(metric, value)}" + (f" ({ends})" if ends else "")


def _source(row: Row) -> str:
    return "estimated" if row.estimated else "noisy" if row.noisy else row.source


# The trade-off


def _trade_offs(run: Run, rows: Sequence[Named]) -> Iterator[Chart]:
    for task, latency in _LATENCY.items():
        timed = [named for named in rows if latency in named[2].metrics]
        candidates = [row for _, _, row in timed if row.role == "candidate"]
        quality = next((q for q in _QUALITY[task] if any(q in row.metrics for row in candidates)), None)
        if quality:
            yield _trade_off(run, timed, latency, quality)


def _trade_off(run: Run, timed: Sequence[Named], latency: str, quality: str) -> Chart:
    rows = [named for named in timed if quality in named[2].metrics]
    memory = "rss_peak_bytes" if all("rss_peak_bytes" in row.metrics for _, _, row in rows) else "size_bytes"
    metrics = (latency, quality, memory)
    plot = _trade_off_plot(run, rows, latency, quality)
    inside = [named for named in rows if _inside(plot, named[2], latency, quality)]
    plot.path(_front([row for _, _, row in inside if row.role == "candidate"], latency, quality), "front")
    _mark_builds(plot, run, inside, metrics)
    data = tuple(
        (label, *(amount(m, row.metrics[m]) if m in row.metrics else "–" for m in metrics), _source(row))
        for _, label, row in rows
    )
    caption = [f"Area: {title(memory).lower()}."]
    caption += ["The ring is the build that was selected."] if run.selection and run.selection.chosen else []
    caption += [f"Outside the picture: {named[1]}." for named in rows if named not in inside]
    caption += [f"Without {title(quality)}: {named[1]}." for named in timed if named not in rows]
    columns = ("build", *map(title, metrics), "source")
    return Chart(f"{title(latency)} against {title(quality)}", " ".join(caption), plot.xml(), Table(columns, data))


def _trade_off_plot(run: Run, rows: Sequence[Named], latency: str, quality: str) -> Plot:
    """The empty picture with the limits of the budget in it."""
    limits = {metric: _limits(run, metric) for metric in (latency, quality)}
    x = _fitted(rows, latency, limits[latency], f"{title(latency)} ({unit(latency)})", "log")
    y = _fitted(rows, quality, limits[quality], f"{title(quality)} ({_unit_and_direction(quality)})", "linear")
    plot = Plot(f"{title(latency)} against {title(quality)}, one mark for each build", x, y)
    for which, metric in (("x", latency), ("y", quality)):
        for limit, value in limits[metric]:
            plot.limit(which, value, "above" if limit.operator == "<=" else "below", f"budget: {limit}")
    return plot


def _mark_builds(plot: Plot, run: Run, rows: Sequence[Named], metrics: tuple[str, str, str]) -> None:
    """A mark for each build, the large ones below the small ones, its name where there is room, the chosen first."""
    latency, quality, memory = metrics
    largest = max((row.metrics.get(memory, 0.0) for _, _, row in rows), default=0.0) or 1.0
    areas = {at: 0.6 + 5.4 * row.metrics.get(memory, 0.0) / largest for at, _, row in rows}
    for at, label, row in sorted(rows, key=lambda named: -named[2].metrics.get(memory, 0.0)):
        known = [_spoken(m, row.metrics[m], row.intervals.get(m)) for m in metrics if m in row.metrics]
        says = ", ".join([f"{label} ({_source(row)})", *known])
        ring = _is_chosen(run, row)
        plot.mark(_at(row, latency), _at(row, quality), at, says, hollow=row.estimated, area=areas[at], ring=ring)
    for at, label, row in sorted(rows, key=lambda named: not _is_chosen(run, named[2])):
        plot.name(_at(row, latency), _at(row, quality), at, label, area=areas[at])


def _is_chosen(run: Run, row: Row) -> bool:
    return run.selection is not None and run.selection.is_chosen(row)


def _inside(plot: Plot, row: Row, latency: str, quality: str) -> bool:
    return plot.x.holds(_at(row, latency)) and plot.y.holds(_at(row, quality))


def _at(row: Row, metric: str) -> float:
    """Where a row stands on the axis of a metric: its value in the unit that it is shown in."""
    return in_unit(metric, row.metrics[metric])


def _unit_and_direction(metric: str) -> str:
    return ", ".join(filter(None, (unit(metric), f"{METRICS[metric].better} is better")))


def _fitted(
    rows: Sequence[Named], metric: str, limits: Sequence[tuple[Constraint, float]], label: str, kind: Kind
) -> Axis:
    """An axis for the candidates, stretched to the limits and the baseline where these are not far away from them.

    Far is more than four times the candidates' own range: they would shrink to one spot. The axis reaches 1 % beyond
    them, so that no difference in the fifth digit fills the picture.
    """
    own = [_at(row, metric) for _, _, row in rows if row.role == "candidate"]
    own += [end for value in (min(own), max(own)) for end in (value * (1 - _LEAST), value * (1 + _LEAST))]
    tight = axis(label, own, kind)
    others = [_at(row, metric) for _, _, row in rows] + [value for _, value in limits]
    near = [value for value in others if value > 0 and -4 <= tight.place(value) <= 5]
    return axis(label, own + near, kind, room=0.12)


def _front(rows: Sequence[Row], latency: str, quality: str) -> list[tuple[float, float]]:
    """The staircase of the rows that no other beats in both metrics."""
    sign = 1 if METRICS[quality].better == "lower" else -1
    points = sorted((_at(row, latency), sign * _at(row, quality)) for row in rows)
    front: list[tuple[float, float]] = []
    for x, y in points:
        if not front or y < front[-1][1]:
            front += [(x, front[-1][1])] if front else []
            front.append((x, y))
    return [(x, sign * y) for x, y in front]


def _limits(run: Run, metric: str) -> list[tuple[Constraint, float]]:
    """The limits on ``metric`` in the unit of its axis: one on its ratio is so many times the baseline's value."""
    found, baseline = [], run.baseline
    for limit in map(parse_constraint, run.selection.budget if run.selection else ()):
        if limit.workload is None and limit.metric == metric:
            found.append((limit, in_unit(metric, limit.limit)))
        elif limit.workload is None and limit.metric == metric + RATIO and baseline and metric in baseline.metrics:
            found.append((limit, limit.limit * _at(baseline, metric)))
    return found


# Latency by percentile


def _distributions(rows: Sequence[Named]) -> Iterator[Chart]:
    for name, first in _workloads(rows).items():
        for base in _QUEUED if first.scenario in ("server", "concurrent", "trace") else _SERVICE:
            having = [named for named in rows if len(_samples(named[2], name, base)) > 1]
            if having:
                yield _distribution(having, name, first, base)


def _workloads(rows: Sequence[Named]) -> dict[str, Measured]:
    """Every workload by name, as its first row has it."""
    found: dict[str, Measured] = {}
    for _, _, row in rows:
        found = {**row.workloads, **found}
    return found


def _samples(row: Row, workload: str, base: str) -> Sequence[float]:
    return row.workloads[workload].samples.get(base, ()) if workload in row.workloads else ()


def _distribution(rows: Sequence[Named], workload: str, first: Measured, base: str) -> Chart:
    lines = {at: _curve(_samples(row, workload, base)) for at, _, row in rows}
    most = max(percent for points in lines.values() for percent, _ in points)
    values = [value for points in lines.values() for _, value in points]
    plot = Plot(
        f"{title(base)} of workload {workload} by percentile, one line for each build",
        Axis("percentile of requests", 0.0, most, "percentile"),
        axis(f"{title(base)} (ms)", values, "log"),
    )
    data = []
    for at, label, row in rows:
        plot.line(lines[at], at)
        measured = row.workloads[workload]
        for metric, percent in _percentiles(base, measured.metrics):
            value, ends = measured.metrics[metric], measured.intervals.get(metric)
            if ends and percent <= most and all(plot.y.low <= end <= plot.y.high for end in ends):
                plot.whisker(percent, *ends, at)
            if percent <= most:
                plot.mark(percent, value, at, f"{label}, {workload}: {_spoken(metric, value, ends)}")
            data.append((label, title(metric), amount(metric, value), span(metric, ends), _state(measured)))
    columns = ("build", "percentile", "time", "95 % interval (ms)", "state")
    about = f"{first.task}, {first.scenario}" + (", hot" if first.hot else "")
    return Chart(f"{title(base)}: {workload}", about, plot.xml(), Table(columns, tuple(data)))


def _state(measured: Measured) -> str:
    words = [word for word, holds in (("noisy", measured.noisy), ("not settled", not measured.settled)) if holds]
    return ", ".join(words) or "steady"


def _percentiles(base: str, metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(f"{base}_{label}", percent) for label, percent in PERCENTILES.items() if f"{base}_{label}" in metrics]


def _curve(samples: Sequence[float]) -> list[tuple[float, float]]:
    """Percentile and value at up to 80 places, close together where few requests are: up to one request beyond."""
    most = 100 * (1 - 1 / len(samples))
    nines = np.linspace(0.0, -np.log10(1 - most / 100), 80)
    percents = 100 * (1 - 10.0**-nines)
    return [(float(p), float(v)) for p, v in zip(percents, np.percentile(samples, percents), strict=True)]


# Latency against load, and against items


def _by_load(rows: Sequence[Named]) -> Iterator[Chart]:
    for name, first in _workloads(rows).items():
        having = [named for named in rows if name in named[2].workloads and named[2].workloads[name].curve]
        common = [{m for point in row.workloads[name].curve for m in point.metrics} for _, _, row in having]
        metric = _tail(set.intersection(*common)) if common else None
        if not metric:
            continue
        series = [(at, label, False, [(point.rate_per_s, point.metrics, point.intervals)
                                      for point in row.workloads[name].curve if metric in point.metrics])
                  for at, label, row in having]  # fmt: skip
        yield _lines(f"{title(metric)} under load: {name}", f"{first.task}, open-loop Poisson arrivals", metric,
                     "offered requests per second", series, lambda x: f"at {number(x)} requests/s")  # fmt: skip


def _by_items(rows: Sequence[Named]) -> Iterator[Chart]:
    names = [name for name, _ in _workloads(rows).items()]
    series = []
    for at, label, row in rows:
        for name in names:
            measured = row.workloads.get(name)
            if measured and measured.items_curve:
                how = "hot" if measured.hot else "cold"
                points = [(float(point.items), point.metrics, point.intervals) for point in measured.items_curve
                          if "score_ms_p50" in point.metrics]  # fmt: skip
                series.append((at, f"{label}, {how}", measured.hot, points))
    if any(points for _, _, _, points in series):
        yield _lines("Score p50 by items", "Solid: cold, dashed: hot.", "score_ms_p50", "items per request",
                     series, lambda x: f"{x:g} items")  # fmt: skip


Points = list[tuple[float, dict[str, float], dict[str, Interval]]]


def _lines(
    heading: str,
    caption: str,
    metric: str,
    across: str,
    series: Sequence[tuple[int, str, bool, Points]],
    says: Callable[[float], str],
) -> Chart:
    everywhere = [(x, metrics[metric]) for _, _, _, points in series for x, metrics, _ in points]
    x = axis(across, [x for x, _ in everywhere], "log")
    y = axis(f"{title(metric)} (ms)", [y for _, y in everywhere], "log")
    plot = Plot(f"{heading}, one line for each build", x, y)
    data = []
    for at, label, dashed, points in series:
        plot.line([(x, metrics[metric]) for x, metrics, _ in points], at, dashed=dashed)
        for x_value, metrics, intervals in points:
            value, ends = metrics[metric], intervals.get(metric)
            plot.mark(x_value, value, at, f"{label}, {says(x_value)}: {_spoken(metric, value, ends)}", area=0.6)
            data.append((label, number(x_value), amount(metric, value), span(metric, ends)))
    return Chart(
        heading, caption, plot.xml(), Table(("build", across, title(metric), "95 % interval (ms)"), tuple(data))
    )


def _tail(metrics: set[str]) -> str | None:
    """The farthest percentile up to 99 of the time that a whole request took."""
    for base in ("e2e_ms", "score_ms", "encode_ms"):
        found = [name for name in metrics if base_of(name)[0] == base and (base_of(name)[1] or 0) <= 99]
        if found:
            return max(found, key=lambda name: base_of(name)[1] or 0)
    return None


# Sensitivity


def _sensitivities(run: Run, rows: Sequence[Named]) -> Iterator[Chart]:
    for found in run.sensitivities:
        at = next((at for at, _, row in rows if row.profile == found.build or row.build == found.build), 1)
        entries = [
            (
                part,
                loss,
                f"{found.build}, {part}: alone {number(loss)} ({found.measure}), kept as {form} instead of {wanted}",
            )
            for part, wanted, form, loss in found.kept[:_MOST_BARS]
        ]
        heading = found.build + (f", {found.form}" if found.form else "")
        forms = ", ".join(f"{count} as {form}" for form, count in found.forms.items())
        rest = len(found.kept) - len(entries)
        caption = f"Parts by form: {forms}." + (f" {rest} smaller ones are in the table." if rest else "")
        data = tuple((part, wanted, form, number(loss)) for part, wanted, form, loss in found.kept)
        svg = bars(f"Loss of each part of {heading}", entries, at, f"{found.measure}, of this part alone")
        yield Chart(heading, caption, svg, Table(("part", "wanted", "has", "loss alone"), data))
