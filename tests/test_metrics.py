"""Each metric is defined once; ratios follow their metric's direction."""

import pytest

from slmdeploy.metrics import METRICS, describe, known_names, with_ratios


def test_every_metric_has_a_definition_and_a_budget_can_name_it():
    assert all(metric.definition and metric.name == name for name, metric in METRICS.items())
    assert {"ttft_ms_p99", "tpot_ms_p50", "items_per_s", "auc_ratio", "bits_per_byte_ratio"} <= set(known_names())


def test_ratio_keeps_the_direction():
    assert describe("auc_ratio").better == "higher"
    assert describe("load_s_ratio").better == "lower"


@pytest.mark.parametrize("name", ["speed", "kl_to_baseline_ratio", "auc_ratio_ratio"])
def test_unknown_names_are_refused(name):
    assert name not in known_names()
    with pytest.raises(KeyError):
        describe(name)


def test_ratios_only_where_both_have_a_value_and_the_baseline_is_not_zero():
    found = with_ratios(
        {"auc": 0.9, "tpot_ms_p50": 2.0, "load_s": 1.0, "kl_to_baseline": 0.1},
        {"auc": 0.75, "load_s": 0.0, "kl_to_baseline": 0.2},
    )
    assert found == {"auc": 0.9, "tpot_ms_p50": 2.0, "load_s": 1.0, "kl_to_baseline": 0.1, "auc_ratio": 0.9 / 0.75}
    assert with_ratios({"auc": 0.9}, {}) == {"auc": 0.9}
