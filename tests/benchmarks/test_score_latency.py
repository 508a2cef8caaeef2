"""The ways to score that the benchmark compares are ways to the same scores, and its chart is a sound SVG."""

import xml.etree.ElementTree as ET

import pytest

from benchmarks import score_latency
from benchmarks.score_latency import NAMES, chart, measure, table
from slmdeploy.runtime.model import Model, load
from tests.graphs import write_tiny_graph


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_tiny_graph(tmp_path_factory.mktemp("graphs") / "tiny"))


def test_all_ways_give_the_same_scores(model: Model) -> None:
    rows = measure(model, prefix_tokens=20, item_tokens=5, counts=[1, 3], rounds=1)
    assert [row["items"] for row in rows] == [1, 3]
    for row in rows:
        assert set(NAMES) <= row.keys()
        assert all(row[name] > 0 for name in NAMES)
        assert row["apart"] < 1e-4


def test_a_padded_batch_that_would_be_too_large_is_left_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_latency, "PADDED_TOKENS", 30)
    one, three = measure(model, prefix_tokens=20, item_tokens=5, counts=[1, 3], rounds=1)
    assert "padded" in one
    assert "padded" not in three
    assert "left out" in table([one, three]).splitlines()[2]


def test_the_chart_names_every_way_and_point() -> None:
    rows = [{"items": k, "apart": 0.0, **{name: k * (i + 1.5) for i, name in enumerate(NAMES)}} for k in (1, 4, 64)]
    root = ET.fromstring(chart(rows, "Scoring items"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = " ".join(element.text or "" for element in root.iter() if element.text)
    assert all(name in words for name in NAMES)
    marks = [element for element in root.iter() if "items:" in element.get("aria-label", "")]
    assert len(marks) == len(rows) * len(NAMES)
