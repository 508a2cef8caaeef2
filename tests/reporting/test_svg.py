"""Drawing: values land where they belong, ticks are round and few, hostile words stay words, Tab has one place."""

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmdeploy.reporting.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Plot,
    axis,
    bars,
    css,
    legend_mark,
    shape,
)

HOSTILE = "<img src=x onerror=alert(1)> \"quoted\" & 'so'"


def plot() -> Plot:
    return Plot("a picture", Axis("x", 0.0, 10.0), Axis("y", 1.0, 100.0, "log"))


def test_the_corners_of_the_picture_are_the_ends_of_the_axes() -> None:
    assert plot().at(0.0, 1.0) == (LEFT, HEIGHT - BOTTOM)
    assert plot().at(10.0, 100.0) == (WIDTH - RIGHT, TOP)
    assert plot().at(5.0, 10.0)[1] == pytest.approx((TOP + HEIGHT - BOTTOM) / 2)


def test_each_nine_is_one_step_of_a_percentile_axis() -> None:
    percent = Axis("percentile", 0.0, 99.9, "percentile")
    assert [percent.place(value) for value in (0.0, 90.0, 99.0, 99.9)] == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])


@given(st.floats(1e-6, 1e9), st.floats(1.0001, 1e6), st.sampled_from(["linear", "log"]))
def test_ticks_are_few_told_apart_and_inside(low: float, factor: float, kind: str) -> None:
    found = axis("x", [low, low * factor], kind)  # type: ignore[arg-type]
    ticks = found.named_ticks()
    assert 2 <= len(ticks) <= 8
    assert all(found.low <= value <= found.high for value, _ in ticks)
    assert len({words for _, words in ticks}) == len(ticks)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-1.0, 3.0], [2.0, 2.0, 2.0]])
def test_an_axis_holds_its_values_whatever_they_are(values: list[float]) -> None:
    for kind in ("linear", "log"):
        found = axis("x", values, kind)  # type: ignore[arg-type]
        assert all(0 < found.place(value) < 1 for value in values)


def test_words_of_an_artifact_stay_words() -> None:
    drawn = plot()
    drawn.mark(1.0, 2.0, 1, HOSTILE)
    drawn.name(1.0, 2.0, 1, HOSTILE[:12])
    drawn.limit("x", 5.0, "above", HOSTILE)
    for text in (drawn.xml(), bars("x", [(HOSTILE, 1.0, HOSTILE)], 1, HOSTILE)):
        assert "<img" not in text
        root = ET.fromstring(text)
        assert {element.tag for element in root.iter()} <= {"svg", "g", "line", "text", "circle", "path", "rect"}
        assert HOSTILE in [element.get("aria-label") for element in root.iter()]


def test_tab_arrives_at_the_first_mark_alone() -> None:
    drawn = plot()
    for x in (1.0, 2.0, 3.0):
        drawn.mark(x, 5.0, 1, f"mark {x}")
    marks = [group for group in ET.fromstring(drawn.xml()) if group.get("tabindex")]
    assert [mark.get("tabindex") for mark in marks] == ["0", "-1", "-1"]


@pytest.mark.parametrize(
    ("which", "value", "beyond", "shaded", "line"),
    [("x", 5.0, "above", 0.5, True), ("x", 2.0, "below", 0.2, True), ("x", 99.0, "above", 0.0, False),
     ("x", -5.0, "above", 1.0, False), ("y", 10.0, "below", 0.5, True)],
)  # fmt: skip
def test_the_side_outside_a_limit_is_shaded(which: str, value: float, beyond: str, shaded: float, line: bool) -> None:
    drawn = plot()
    drawn.limit(which, value, beyond, "limit")
    (group,) = ET.fromstring(drawn.xml()).findall("g[@class='limit']")
    box = group.find("rect")
    assert box is not None
    size = float(box.get("width", "")) / (WIDTH - LEFT - RIGHT) * float(box.get("height", "")) / (HEIGHT - TOP - BOTTOM)
    assert size == pytest.approx(shaded, abs=1e-3)
    assert (group.find("line") is not None) == line


def test_names_do_not_cover_one_another() -> None:
    drawn = plot()
    for _ in range(9):
        drawn.name(5.0, 10.0, 1, "the same place")
    names = [text for text in ET.fromstring(drawn.xml()).findall("text") if "name" in text.get("class", "")]
    assert 1 <= len(names) <= 4
    assert len({(name.get("x"), name.get("y")) for name in names}) == len(names)


def test_series_have_a_colour_and_a_shape() -> None:
    assert css(0) == "base"
    assert len({(css(at), shape(at, 5.0)) for at in range(8)}) == 8
    assert "hollow" in legend_mark(3, hollow=True)
    assert "hollow" not in legend_mark(3, hollow=False)
