"""Wording: names and numbers as people read them, and never a digit that changes what they say."""

import pytest

from slmdeploy.metrics import known_names
from slmdeploy.reporting.wording import GROUPS, amount, base_of, group, number, seconds, share, span, title, unit


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.12345, "0.123"),
        (10.02, "10.0"),
        (99.96, "100"),
        (1234.5, "1,234"),
        (1.2e8, "1.20e+08"),
        (-5e-5, "-5.00e-05"),
    ],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_a_rounded_number_is_near_the_exact_one() -> None:
    for power in range(-6, 9):
        for lead in (1.0, 1.4567, 9.996):
            value = lead * 10.0**power
            assert float(number(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("score_ms_p50", 9.571, "9.57 ms"),
        ("size_bytes", 8_849_000, "8.85 MB"),
        ("tokens_per_s", 2204.1, "2,204/s"),
        ("auc", 0.88342, "0.8834"),
        ("auc_ratio", 0.991, "×0.991"),
        ("load_s", 0.1016, "0.102 s"),
    ],
)
def test_amounts_have_units(metric: str, value: float, shown: str) -> None:
    assert amount(metric, value) == shown


def test_every_metric_has_a_title_and_a_group() -> None:
    for metric in known_names():
        assert title(metric) != metric
        assert group(metric) in GROUPS
    assert title("ttft_ms_p999") == "TTFT p99.9"
    assert title("auc_ratio") == "AUC to baseline"


def test_percentiles_are_told_from_names() -> None:
    assert base_of("ttft_ms_p999") == ("ttft_ms", 99.9)
    assert base_of("top1_agreement") == ("top1_agreement", None)
    assert base_of("auc_p42") == ("auc_p42", None)


def test_intervals_durations_and_shares() -> None:
    assert span("size_bytes", (1e6, 2e6)) == "1.00 – 2.00"
    assert span("auc", None) == ""
    assert [seconds(value) for value in (0.44, 23, 435, 7500)] == ["0.4 s", "23 s", "7 min 15 s", "2 h 5 min"]
    assert (share(0.05), share(0.005)) == ("5 %", "0.5 %")
    assert unit("kl_to_fp32") == ""
