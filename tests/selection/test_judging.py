"""One row against one limit: met, not proven or missed, by the unfavourable end; and what may never ship."""

from dataclasses import replace

import pytest

from slmdeploy.selection import Row, choose
from slmdeploy.selection.judging import excess, judge
from slmdeploy.specs import parse_budget, parse_constraint
from tests.selection.rows import FP32, INT4, ROWS, reasons

ROW = Row(
    "a", {"tpot_ms_p50": 10.0, "auc": 0.9, "chat:tpot_ms_p50": 4.0}, {"tpot_ms_p50": (9.0, 12.0), "auc": (0.85, 0.95)}
)


@pytest.mark.parametrize(
    ("text", "result", "end", "needed"),
    [
        ("tpot_ms_p50<=12", "met", 12.0, None),
        ("tpot_ms_p50<=11", "not proven", 12.0, 12.0),
        ("tpot_ms_p50<=9.5", "missed", 12.0, 12.0),
        ("tpot_ms_p50>=9", "met", 9.0, None),
        ("tpot_ms_p50>=9.5", "not proven", 9.0, 9.0),
        ("auc>=0.9", "not proven", 0.85, 0.85),
        ("auc>=0.91", "missed", 0.85, 0.85),
        ("chat:tpot_ms_p50<=4", "met", 4.0, None),
        ("items_per_s>=1", "not measured", None, None),
    ],
)
def test_the_unfavourable_end_decides(text, result, end, needed):
    (verdict,) = judge(ROW, [parse_constraint(text)])
    assert (verdict.result, verdict.end, verdict.needed) == (result, end, needed)


def test_not_proven_rejects_with_its_own_sentence():
    selection = choose([ROW], parse_budget("tpot_ms_p50<=11"))
    assert not selection.feasible
    assert reasons(selection)["a"] == (
        "tpot_ms_p50 <= 11 is not proven: 10, but its 95 % interval reaches 12: measure longer, or loosen it to 12"
    )
    guess = replace(ROW, source="estimated")
    assert "measure it there, or loosen" in reasons(choose([guess], parse_budget("tpot_ms_p50<=11")))["a"]
    missed = choose([ROW], parse_budget("tpot_ms_p50<=9"))
    assert reasons(missed)["a"] == "tpot_ms_p50 <= 9 is missed: 10 (its 95 % interval reaches 12), 33.3% outside"


def test_a_value_outside_its_own_interval_widens_it():
    (verdict,) = judge(Row("a", {"auc": 0.8}, {"auc": (0.85, 0.9)}), [parse_constraint("auc>=0.82")])
    assert verdict.result == "missed"


def test_what_would_be_needed_is_rounded_outwards():
    row = Row("a", {"tpot_ms_p50": 1.23456, "auc": 0.87654321})
    upper, lower = judge(row, [parse_constraint("tpot_ms_p50<=1"), parse_constraint("auc>=0.9")])
    assert (upper.needed, lower.needed) == (1.235, 0.8765)


def test_a_limit_of_a_target_is_for_its_rows_alone():
    limits = [parse_constraint("auc@x>=0.99")]
    assert judge(ROW, limits) == ()
    (verdict,) = judge(Row("a", ROW.metrics, target="x"), limits)
    assert verdict.result == "missed"


def test_excess_is_the_sum_of_shares_of_the_limits():
    limits = [parse_constraint("tpot_ms_p50<=5"), parse_constraint("auc>=1"), parse_constraint("tpot_ms_p50<=20")]
    assert excess(ROW, limits) == pytest.approx(1.1)
    assert excess(ROW, [parse_constraint("items_per_s>=1")]) == float("inf")


def test_failed_gate_and_slower_than_fp32_are_rejected():
    failed = Row("bad", {"tpot_ms_p50": 1.0, "size_bytes": 1.0}, gates_failed=("kl",))
    slow = Row("slow", {"tpot_ms_p50": 12.0, "size_bytes": 1.0}, precision="int4", graph="g")
    elsewhere = Row("other", {"tpot_ms_p50": 12.0, "size_bytes": 1.0}, precision="int4", graph="another")
    why = reasons(choose([failed, slow, elsewhere, FP32], parse_budget()))
    assert why["bad"] == "outside its own gates: kl"
    assert why["slow"].startswith("slower than fp32, the fp32 build of the same graph: 12 against 10")
    assert why["other"].startswith("feasible, not the fastest")


def test_slower_within_noise_is_not_slower():
    noisy = Row(
        "w8", {"tpot_ms_p50": 10.5, "size_bytes": 1.0}, intervals={"tpot_ms_p50": (9.0, 12.0)}, precision="x", graph="g"
    )
    assert choose([noisy, FP32], parse_budget()).chosen == "w8"


def test_an_unmeasured_metric_rejects():
    selection = choose(ROWS, parse_budget("items_per_s>=1"))
    assert set(reasons(selection).values()) == {"items_per_s was not measured"}
    assert not selection.feasible
    assert selection.nearest_miss is None
    assert "no limit would help" in selection.reason


def test_a_far_miss_is_told_as_a_multiple():
    assert "10, 100 times the limit" in reasons(choose(ROWS, parse_budget("tpot_ms_p50<=0.1")))["fp32"]
    assert "2, 20 times the limit" in reasons(choose([INT4], parse_budget("tpot_ms_p50<=0.1")))["int4"]
