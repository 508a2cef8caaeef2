"""The grammar of limits: what is read, how it is written again, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmdeploy.errors import InputError
from slmdeploy.specs import parse_budget, parse_change, parse_constraint

SLOWLY = settings(deadline=None)


@pytest.mark.parametrize(
    ("text", "written", "figure"),
    [
        ("tpot_ms_p50<=5", "tpot_ms_p50 <= 5", "tpot_ms_p50"),
        (" auc >= 0.95 ", "auc >= 0.95", "auc"),
        ("score-512-32x16:score_ms_p99 <= 80", "score-512-32x16:score_ms_p99 <= 80", "score-512-32x16:score_ms_p99"),
        ("auc@x86-64-avx2>=1e-1", "auc@x86-64-avx2 >= 0.1", "auc"),
        ("chat:ttft_ms_p95@my.target<=3", "chat:ttft_ms_p95@my.target <= 3", "chat:ttft_ms_p95"),
        ("size_bytes<=24562631", "size_bytes <= 24562631.0", "size_bytes"),
    ],
)
def test_a_limit_is_read_and_written(text, written, figure):
    limit = parse_constraint(text)
    assert (str(limit), limit.figure) == (written, figure)
    assert parse_constraint(str(limit)) == limit


@pytest.mark.parametrize(
    "text",
    [
        "fast",
        "auc",
        "auc=1",
        "auc<1",
        "auc<=",
        "<=1",
        "auc<=1.2.3",
        "auc<=nan",
        "auc<=1e999",
        ":auc<=1",
        "auc@<=1",
        "a b:auc<=1",
    ],
)
def test_another_form_is_refused(text):
    with pytest.raises(InputError, match="is not of the form metric<=number"):
        parse_constraint(text)


def test_a_change_may_leave_the_operator_to_the_limit_it_replaces():
    assert parse_change("chat:auc@t=1").model_dump() == {
        "metric": "auc",
        "limit": 1.0,
        "operator": None,
        "workload": "chat",
        "target": "t",
    }
    assert parse_change("auc>=1").operator == ">="
    for text in ("auc", "auc==1", "auc=high", "auc=1e999"):
        with pytest.raises(InputError, match="is not of the form metric=number"):
            parse_change(text)


def test_a_budget_counts_a_limit_once():
    budget = parse_budget("auc>=1", "auc >= 1.0", preferences=("auc>=2", "auc>=2"), objective="cheapest")
    assert [len(budget.constraints), len(budget.preferences), budget.objective] == [1, 1, "cheapest"]


@SLOWLY
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(("<=", ">=")))
def test_a_limit_is_written_as_it_is(limit, operator):
    constraint = parse_constraint(f"auc{operator}{limit!r}")
    assert parse_constraint(str(constraint)).limit == limit


@SLOWLY
@given(st.integers(-50, 50), st.integers(-50, 50), st.sampled_from(("<=", ">=")))
def test_a_value_is_outside_exactly_when_the_limit_does_not_hold(limit, value, operator):
    constraint = parse_constraint(f"auc{operator}{limit}")
    assert (constraint.outside(value) == 0) == constraint.holds(value)
