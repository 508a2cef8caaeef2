"""Charts: each is there when its data is, says in words and table what it draws, and flags what is not plain fact."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from slmdeploy.reporting.charts import Chart, _curve, _front, sections
from slmdeploy.reporting.records import Row, Run
from slmdeploy.reporting.wording import amount


def chart(run: Run, anchor: str, at: int = 0) -> Chart:
    return next(section for section in sections(run) if section.anchor == anchor).charts[at]


def marks(found: Chart) -> list[ET.Element]:
    return [one for one in ET.fromstring(found.svg).iter("g") if one.get("class", "").startswith("mark")]


def spoken(found: Chart) -> list[str]:
    return [mark.get("aria-label", "") for mark in marks(found)]


def test_a_run_with_everything_has_every_section(run: Run) -> None:
    assert [section.anchor for section in sections(run)] == ["trade-off", "latency", "load", "items", "sensitivity"]


def test_without_quality_the_trade_off_is_with_size(run: Run) -> None:
    kept = ("tpot_ms_p50", "size_bytes", "rss_peak_bytes")
    rows = [row.model_copy(update={"metrics": {name: row.metrics[name] for name in kept}}) for row in run.rows]
    found = chart(replace(run, measurement=run.measurement.model_copy(update={"rows": rows})), "trade-off")
    assert found.title == "TPOT p50 against Size on disk"
    assert "Size on disk (MB, lower is better)" in found.svg
    assert "budget: size_bytes &lt;= 2e+07" in found.svg


def test_differences_of_no_account_do_not_fill_the_picture(run: Run) -> None:
    metrics = [row.metrics | {"auc": 0.88 + at * 1e-6} for at, row in enumerate(run.rows)]
    rows = [row.model_copy(update={"metrics": other}) for row, other in zip(run.rows, metrics, strict=True)]
    same = replace(run, measurement=run.measurement.model_copy(update={"rows": rows}), selection=None)
    found = chart(same, "trade-off", 1)
    places = [float(mark.get("transform", "").split(" ")[1].rstrip(")")) for mark in marks(found)]
    assert max(places) - min(places) < 2
    names = [text for text in ET.fromstring(found.svg).findall("text") if "name" in text.get("class", "")]
    assert len(names) >= 2


def test_a_row_without_the_quality_is_named(run: Run) -> None:
    less = {name: value for name, value in run.rows[-1].metrics.items() if name != "bits_per_byte"}
    rows = [*run.rows[:-1], run.rows[-1].model_copy(update={"metrics": less})]
    found = chart(replace(run, measurement=run.measurement.model_copy(update={"rows": rows})), "trade-off")
    assert "Without Bits per byte: cpu-int8-split@x86-64-amx." in found.caption
    assert len(found.data.rows) == 5


def test_what_was_not_measured_has_no_chart(run: Run) -> None:
    bare = [row.model_copy(update={"workloads": {}}) for row in run.rows]
    poor = replace(run, measurement=run.measurement.model_copy(update={"rows": bare}), sensitivities=())
    assert [section.anchor for section in sections(poor)] == ["trade-off"]


def test_the_trade_off_shows_estimates_noise_the_choice_and_the_budget(run: Run) -> None:
    found = chart(run, "trade-off")
    drawn = ET.fromstring(found.svg)
    said = spoken(found)
    assert sum("(estimated)" in words for words in said) == 1
    assert sum("(noisy)" in words for words in said) == 1
    assert [mark.get("aria-label", "").split(" ")[0] for mark in marks(found) if "hollow" in mark.get("class", "")] == [
        "cpu-int8-split@x86-64-amx"
    ]
    ringed = [mark for mark in marks(found) if mark.find("circle[@class='ring']") is not None]
    assert [mark.get("aria-label", "").split(" ")[0] for mark in ringed] == ["cpu-int8-split"]
    limits = [group.get("aria-label") for group in drawn.findall("g[@class='limit']")]
    assert limits == ["budget: tpot_ms_p50_ratio <= 0.25", "budget: bits_per_byte_ratio <= 1.15"]


def test_a_mark_says_the_figures_that_the_measurement_has(run: Run) -> None:
    row = run.rows[1]
    (said,) = (words for words in spoken(chart(run, "trade-off")) if words.startswith("cpu-fp32"))
    for metric in ("tpot_ms_p50", "bits_per_byte", "rss_peak_bytes"):
        assert amount(metric, row.metrics[metric]) in said


def test_area_is_memory(run: Run) -> None:
    def height(found: Chart) -> float:
        (mark,) = (m for m in marks(found) if m.get("aria-label", "").startswith("cpu-fp32 ("))
        path = mark.find("path")
        assert path is not None
        return max(float(word) for word in re.findall(r"[-.\d]+", path.get("d", "")))

    def with_memory(baseline: float) -> Run:
        rows = [row.model_copy(update={"metrics": row.metrics | {"rss_peak_bytes": 1e8 if at else baseline}})
                for at, row in enumerate(run.rows)]  # fmt: skip
        return replace(run, measurement=run.measurement.model_copy(update={"rows": rows}))

    areas = [height(chart(with_memory(baseline), "trade-off", 1)) ** 2 for baseline in (4e8, 1e8)]
    assert areas[1] / areas[0] == pytest.approx(6.0 / (0.6 + 5.4 / 4), rel=0.1)
    assert "Area: peak memory." in chart(run, "trade-off", 1).caption


def test_what_is_far_away_is_left_out_and_named(run: Run) -> None:
    assert "Outside the picture: baseline." in chart(run, "trade-off").caption
    assert [row[0] for row in chart(run, "trade-off").data.rows] == run.labels


@pytest.mark.parametrize(
    ("better", "expected"),
    [
        ("bits_per_byte", [(1.0, 5.0), (2.0, 5.0), (2.0, 4.0), (4.0, 4.0), (4.0, 1.0)]),
        ("auc", [(1.0, 5.0), (3.0, 5.0), (3.0, 9.0)]),
    ],
)
def test_the_front_is_a_staircase_of_those_that_none_beats(run: Run, better: str, expected: list) -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 9.0), (4.0, 1.0)]
    rows: list[Row] = [run.rows[1].model_copy(update={"metrics": {"tpot_ms_p50": x, better: y}}) for x, y in points]
    assert _front(rows, "tpot_ms_p50", better) == expected


def test_percentiles_of_a_line_are_those_of_the_samples() -> None:
    samples = np.random.default_rng(0).lognormal(0.0, 0.5, 1000)
    points = dict(_curve(samples.tolist()))
    assert max(points) == pytest.approx(99.9)
    assert all(value == pytest.approx(np.percentile(samples, percent)) for percent, value in points.items())


def test_distributions_flag_noise_and_wide_intervals(run: Run) -> None:
    states = {row[0]: row[-1] for row in chart(run, "latency", 2).data.rows}
    assert states["cpu-int8"] == "noisy, not settled"
    assert states["cpu-fp32"] == "steady"


def test_load_and_items_have_a_point_for_each_measured_one(run: Run) -> None:
    assert len(marks(chart(run, "load"))) == 5 * 5
    items = chart(run, "items")
    assert len(marks(items)) == 5 * 2 * 7
    lines = list(ET.fromstring(items.svg).iter("polyline"))
    assert sum("dashed" in line.get("class", "") for line in lines) == 5


def test_sensitivity_has_a_bar_for_each_part(run: Run) -> None:
    found = chart(run, "sensitivity")
    assert len(marks(found)) == 2
    assert found.data.rows[0] == ("lm_head", "int4 block 128", "int8 block 128", "0.00850")
    assert "3 as int4 block 128, 2 as int8 block 128" in found.caption


def test_marks_of_each_chart_belong_to_a_row(run: Run) -> None:
    for section in sections(run):
        for found in section.charts:
            assert {int(mark.get("data-series", "-1")) for mark in marks(found)} <= set(run.series)


def test_the_baselines_colour_is_no_builds(run: Run) -> None:
    without = replace(run, measurement=run.measurement.model_copy(update={"rows": run.rows[1:]}))
    assert (run.series, without.series) == ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    assert "mark base" not in chart(without, "latency").svg
    assert "mark base" in chart(run, "latency").svg
