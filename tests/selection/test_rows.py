"""Which rows can be chosen, what people read of them, and which sets of rows are refused."""

from dataclasses import replace

import pytest

from slmdeploy.errors import InputError
from slmdeploy.selection import Row
from slmdeploy.selection.rows import candidates, with_quality
from tests.selection.rows import FP32, INT4, INT8, ROWS


def test_candidates_are_in_an_order_of_their_own_without_the_baseline():
    teacher = replace(FP32, build="teacher", baseline=True)
    assert [row.build for row in candidates([*ROWS, teacher])] == ["fp32", "int4", "int8"]


def test_a_label_has_the_target_only_where_the_rows_are_of_several():
    here, there = replace(INT8, target="here"), replace(INT4, target="there")
    assert [row.name for row in candidates([here, replace(there, target="here")])] == ["int4", "int8"]
    assert [row.name for row in candidates([here, there])] == ["int4@there", "int8@here"]


def test_a_build_twice_on_one_target_is_refused_and_on_two_is_not():
    with pytest.raises(InputError, match="int8 on here is in the measurements more than once"):
        candidates([replace(INT8, target="here")] * 2)
    assert len(candidates([replace(INT8, target="here"), replace(INT8, target="there")])) == 2


def test_two_builds_of_one_name_are_refused():
    one, two = replace(INT8, target="here", content_key="a" * 64), replace(INT8, target="there", content_key="b" * 64)
    with pytest.raises(InputError, match=r"two different builds of the name int8 .*aaaaaaaaaaaa and bbbbbbbbbbbb"):
        candidates([one, two])
    assert len(candidates([one, replace(two, content_key="a" * 64)])) == 2


def test_an_estimate_has_the_quality_that_was_measured_of_its_build():
    figures = {"auc": 0.9, "auc_ratio": 0.99, "tpot_ms_p50": 1.0}
    measured = Row("a", figures, {"auc": (0.8, 0.95), "tpot_ms_p50": (0.9, 1.1)}, content_key="k")
    guess = Row("a", {"tpot_ms_p50": 5.0}, target="t", source="estimated", content_key="k")
    _, filled = with_quality([measured, guess])
    assert filled.metrics == {"tpot_ms_p50": 5.0, "auc": 0.9, "auc_ratio": 0.99}
    assert filled.intervals == {"auc": (0.8, 0.95)}
    known = replace(guess, metrics={"auc": 0.7})
    assert with_quality([measured, known])[1].metrics["auc"] == 0.7


def test_quality_is_taken_of_the_same_build_alone():
    guess = Row("a", {"tpot_ms_p50": 5.0}, source="estimated", content_key="k")
    others = [Row("b", {"auc": 0.9}, content_key="l"), Row("c", {"auc": 0.9})]
    assert with_quality([guess, *others]) == [guess, *others]
    unmeasured = Row("d", {"tpot_ms_p50": 1.0}, target="t", content_key="l")
    assert with_quality([*others, unmeasured])[2] == unmeasured


def test_an_interval_has_its_value_in_it():
    row = Row("a", {"auc": 0.9, "tpot_ms_p50": 1.0}, {"auc": (0.91, 0.95)})
    assert row.interval("auc") == (0.9, 0.95)
    assert row.interval("tpot_ms_p50") == (1.0, 1.0)


def test_the_workloads_are_those_of_the_figures():
    assert Row("a", {"auc": 0.9, "chat:tpot_ms_p50": 1.0}).workloads() == {"chat"}
