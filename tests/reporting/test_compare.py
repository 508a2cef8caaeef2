"""Comparing: a true change is found, noise is not called one, and the corrected test keeps its promise on many."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmdeploy.errors import InputError
from slmdeploy.reporting.compare import compare, significant
from tests.reporting.fixtures import measurement

Write = Callable[..., Path]


@cache
def synthetic(slower: tuple[tuple[str, float], ...], seed: int) -> str:
    """A measurement as JSON, drawn once for all tests."""
    return json.dumps(measurement(slower=dict(slower), seed=seed))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a synthetic measurement, changed by a function of its rows."""

    def written(
        name: str,
        change: Callable[[list[dict[str, Any]]], None] | None = None,
        *,
        slower: float = 1.0,
        seed: int = 0,
    ) -> Path:
        content = json.loads(synthetic((("cpu-int8", slower),), seed))
        if change:
            change(content["rows"])
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    return written


def test_a_slower_build_is_a_regression_and_the_others_are_not(write: Write) -> None:
    found = compare(write("a"), write("b", slower=1.2, seed=50))
    assert {change.build for change in found.of("regression")} == {"cpu-int8"}
    worse = {change.metric: change.change for change in found.of("regression")}
    assert worse["continue:tpot_ms_p50"] == pytest.approx(0.2, abs=0.02)
    assert found.headline.startswith(f"{len(worse)} regressions, no improvements in ")
    back = compare(write("b", slower=1.2, seed=50), write("a"))
    assert {change.metric for change in back.of("improvement")} == set(worse)
    assert not back.of("regression")


def test_the_same_run_twice_is_equal(write: Write) -> None:
    found = compare(write("a"), write("b"))
    assert {change.outcome for change in found.changes} == {"equal"}


def test_other_requests_of_the_same_builds_are_no_change(write: Write) -> None:
    found = compare(write("a"), write("b", seed=50), threshold=0.0)
    assert len([change for change in found.changes if change.p is not None]) > 60
    assert not found.of("regression")
    assert not found.of("improvement")


def test_a_change_below_the_threshold_is_left_alone(write: Write) -> None:
    paths = write("a"), write("b", slower=1.2, seed=50)
    assert compare(*paths, threshold=0.5).of("regression") == []


def test_direction_is_that_of_the_metric(write: Write) -> None:
    def worse(rows: list[dict[str, Any]]) -> None:
        rows[1]["metrics"]["auc"], rows[1]["intervals"]["auc"] = 0.5, [0.49, 0.51]
        rows[2]["metrics"]["bits_per_byte"], rows[2]["intervals"]["bits_per_byte"] = 0.5, [0.49, 0.51]

    found = compare(write("a"), write("b", worse))
    assert [(change.build, change.metric) for change in found.of("regression")] == [("cpu-fp32", "auc")]
    assert [(change.build, change.metric) for change in found.of("improvement")] == [("cpu-int8", "bits_per_byte")]


def test_sizes_are_exact_and_what_has_no_interval_is_not_tested(write: Write) -> None:
    def larger(rows: list[dict[str, Any]]) -> None:
        rows[1]["metrics"] |= {"size_bytes": 30_000_000, "load_s": 9.0}

    found = {change.metric: change for change in compare(write("a"), write("b", larger)).changes
             if change.build == "cpu-fp32"}  # fmt: skip
    assert found["size_bytes"].outcome == "regression"
    assert found["load_s"].outcome == "not testable"


def test_a_percentile_with_few_requests_beyond_it_is_not_tested(write: Write) -> None:
    found = {change.metric: change.outcome for change in compare(write("a"), write("b", slower=3.0)).changes
             if change.build == "cpu-int8"}  # fmt: skip
    assert found["continue:tpot_ms_p95"] == "regression"
    assert found["continue:tpot_ms_p99"] == "not testable"


def test_a_lost_gate_is_a_regression(write: Write) -> None:
    def lose(rows: list[dict[str, Any]]) -> None:
        rows[1]["passed"] = False

    (found,) = compare(write("a"), write("b", lose)).of("regression")
    assert (found.build, found.metric) == ("cpu-fp32", "gates")
    (back,) = compare(write("b", lose), write("a")).of("improvement")
    assert back.metric == "gates"


def test_a_metric_that_was_0_has_no_relative_change(write: Write) -> None:
    def kl(value: float) -> Callable[[list[dict[str, Any]]], None]:
        def change(rows: list[dict[str, Any]]) -> None:
            rows[1]["metrics"]["kl_to_fp32"], rows[1]["intervals"]["kl_to_fp32"] = value, [value, value]

        return change

    (found,) = compare(write("a", kl(0.0)), write("b", kl(0.02))).of("regression")
    assert (found.metric, found.change, found.p) == ("kl_to_fp32", None, 0.0)


def test_notes_say_what_could_not_be_compared(write: Write) -> None:
    def other(rows: list[dict[str, Any]]) -> None:
        rows[4]["build"] = "cpu-int3"

    notes = compare(write("a"), write("b", other)).notes
    assert "Only in the first run: cpu-int4." in notes
    assert "Only in the second run: cpu-int3." in notes
    assert any(note.startswith("Noisy in either run: cpu-int8.") for note in notes)


def test_runs_without_a_common_build_are_refused(write: Write) -> None:
    def rename(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["build"] += " renamed"

    with pytest.raises(InputError, match="no build on the same target in common"):
        compare(write("a"), write("b", rename))


def test_the_procedure_of_benjamini_and_hochberg() -> None:
    # The worked example of their paper: 15 hypotheses, of which four are rejected at 5 %.
    p_values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719,
                0.6528, 0.7590, 1.0]  # fmt: skip
    assert significant(p_values) == 0.0095
    assert significant([0.2, 0.9]) < 0
    assert significant([]) < 0


def test_where_nothing_changed_alarms_are_as_rare_as_promised() -> None:
    rng = np.random.default_rng(0)
    alarms = sum(significant(list(rng.uniform(size=200))) >= 0 for _ in range(1000))
    assert alarms <= 70  # 5 % of 1000, and three standard errors


def test_the_complaint_names_the_worst(write: Write) -> None:
    found = compare(write("a"), write("b", slower=1.2, seed=50))
    assert "is worse than" in found.complaint
    assert "cpu-int8 continue:" in found.complaint
    assert found.complaint.endswith("more")
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["threshold"] == 0.05
