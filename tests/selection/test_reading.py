"""Measurements from folders and files: what is read, and how hostile, foreign and outdated ones are refused."""

import json

import pytest

from slmdeploy.artifacts import writing
from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.selection import read_rows
from slmdeploy.selection.reading import LARGEST_BYTES, read_measurements
from tests.selection.rows import entry, measurement

SERVER = {
    "task": "score",
    "scenario": "server",
    "hot": False,
    "requests": 3,
    "metrics": {"score_ms_p99": 9.0},
    "intervals": {"score_ms_p99": [8.0, 10.0]},
    "samples": {"score_ms": [5.0, 6.0, 9.0], "queue_ms": [0.0, 1.0, 0]},
    "curve": [{"rate_per_s": 10, "metrics": {"score_ms_p99": 12.5}, "intervals": {}, "requests": 100}],
}


def test_a_file_and_a_folder_give_the_same_rows(tmp_path):
    file = measurement(tmp_path / "m.json", entry("a"), entry("teacher", role="baseline", precision=None))
    with writing(tmp_path / "m", kind="measurement", plan={}, inputs={}) as draft:
        (draft.path / "measurement.json").write_bytes(file.read_bytes())
    rows = read_rows(file)
    assert rows == read_rows(tmp_path / "m")
    assert [(row.build, row.baseline, row.metrics["tpot_ms_p50"]) for row in rows] == [
        ("a", False, 2.0),
        ("teacher", True, 2.0),
    ]


def test_figures_of_workloads_are_addressed_by_their_names(tmp_path):
    (row,) = read_rows(measurement(tmp_path / "m.json", entry("a", workloads={"rank-server-10": SERVER}, target="t")))
    assert row.metrics["rank-server-10:score_ms_p99"] == 9.0
    assert row.interval("rank-server-10:score_ms_p99") == (8.0, 10.0)
    assert row.loads["rank-server-10"].samples["queue_ms"] == (0.0, 1.0, 0.0)
    assert row.loads["rank-server-10"].curve[0].rate_per_s == 10.0
    assert (row.target, row.source, row.loads["rank-server-10"].batch) == ("t", "measured", 1)


def test_gates_that_failed_are_named(tmp_path):
    gates = {"kl": {"passed": False}, "top1": {"passed": True}}
    rows = [entry("a", gates=gates, passed=False), entry("b", gates={}, passed=False), entry("c")]
    assert [row.gates_failed for row in read_rows(measurement(tmp_path / "m.json", *rows))] == [
        ("kl",),
        ("passed",),
        (),
    ]


def test_how_many_requests_were_answered_together_is_in_the_plan(tmp_path):
    plan = {"workloads": [{"name": "rank", "batch": 4}, {"name": "other"}], "seed": 0}
    (row,) = read_rows(measurement(tmp_path / "m.json", entry("a", workloads={"rank": SERVER}), plan=plan))
    assert row.loads["rank"].batch == 4
    with pytest.raises(CorruptArtifactError, match=r"plan.workloads.0.batch"):
        read_rows(measurement(tmp_path / "m.json", plan={"workloads": [{"name": "rank", "batch": 0}]}))


def test_another_schema_is_to_be_measured_again(tmp_path):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"machine": {}, "rows": [{"build": "a"}]}))
    with pytest.raises(InputError, match=r"old.json is a measurement of schema 1, not 2: measure again"):
        read_rows(old)
    with pytest.raises(InputError, match="schema 3, not 2"):
        read_rows(measurement(tmp_path / "m.json", schema=3))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is no measurement"),
        ("[1, 2]", "is no measurement"),
        ('{"schema": 2}', "rows: field required"),
        ('{"schema": 2, "rows": {"a": 1}}', "rows: "),
        ("[" * 100_000, "is no measurement"),
        ("\x00\xff", "is no measurement"),
    ],
)
def test_what_is_no_measurement_is_refused(tmp_path, content, why):
    file = tmp_path / "m.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=why):
        read_rows(file)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"metrics": {"auc": "high"}}, "rows.0.metrics.auc"),
        ({"metrics": {"auc": float("nan")}}, "rows.0.metrics.auc"),
        ({"metrics": {"auc": float("inf")}}, "rows.0.metrics.auc"),
        ({"metrics": {"auc": True}}, "rows.0.metrics.auc"),
        ({"metrics": {"auc": 10**400}}, "rows.0.metrics.auc"),
        ({"metrics": None}, "rows.0.metrics"),
        ({"intervals": {"auc": [1.0]}}, "rows.0.intervals.auc"),
        ({"intervals": {"auc": [2.0, 1.0]}}, "interval of auc of a ends below where it begins"),
        ({"build": ""}, "rows.0.build"),
        ({"build": "x" * 600}, "rows.0.build"),
        ({"role": "chosen"}, "rows.0.role"),
        ({"source": "guessed"}, "rows.0.source"),
        ({"passed": "yes"}, "rows.0.passed"),
        ({"workloads": {"w": SERVER | {"samples": {"score_ms": [-1.0]}}}}, "samples.score_ms"),
        ({"workloads": {"w": SERVER | {"curve": [{"rate_per_s": 0, "metrics": {}}]}}}, "rate_per_s"),
    ],
)
def test_a_hostile_row_is_one_sentence(tmp_path, change, where):
    file = measurement(tmp_path / "m.json", entry("a") | change)
    with pytest.raises(CorruptArtifactError) as refused:
        read_rows(file)
    assert str(file) in str(refused.value)
    assert where in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_too_large_or_not_there_is_refused(tmp_path):
    huge = tmp_path / "huge.json"
    with huge.open("wb") as stream:
        stream.truncate(LARGEST_BYTES + 1)
    with pytest.raises(CorruptArtifactError, match="larger than any measurement"):
        read_rows(huge)
    with pytest.raises(InputError, match="does not exist: give a folder"):
        read_rows(tmp_path / "nowhere.json")


def test_a_build_that_changed_since_it_was_measured_is_refused(tmp_path):
    with writing(tmp_path / "build", kind="build", plan={}, inputs={}) as draft:
        (draft.path / "model.onnx").write_bytes(b"graph")
    key = json.loads((tmp_path / "build" / "manifest.json").read_text())["content_key"]
    path = str(tmp_path / "build")
    same = measurement(tmp_path / "same.json", entry("a", path=path, content_key=key))
    assert [row.build for row in read_measurements([same])] == ["a"]
    other = measurement(tmp_path / "other.json", entry("a", path=path, content_key="0" * 64))
    with pytest.raises(InputError, match=r"build is not the build that was measured as a .*: measure it again"):
        read_measurements([other])


@pytest.mark.parametrize("path", ["", "\x00", "x" * 5000, "/nowhere/at/all"])
def test_a_path_that_leads_nowhere_is_no_obstacle(tmp_path, path):
    file = measurement(tmp_path / "m.json", entry("a", path=path, content_key="0" * 64))
    assert [row.path for row in read_measurements([file])] == [path]
