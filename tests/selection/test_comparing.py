"""What is better beyond noise, what is a tie, and what the Pareto front keeps."""

import pytest

from slmdeploy.errors import InputError
from slmdeploy.selection import Row, choose, cost, differ, pareto_front
from slmdeploy.specs import parse_budget
from tests.selection.rows import ROWS, reasons


def test_a_difference_may_be_beyond_noise_although_the_intervals_overlap():
    def row(name, score, tpot, size):
        metrics = {"score_ms_p50": score, "tpot_ms_p50": tpot}
        return Row(name, metrics | {"size_bytes": size}, {m: (0.9 * v, 1.1 * v) for m, v in metrics.items()})

    fast, slower, near = row("fast", 10.0, 1.0, 9.0), row("slower", 10.0, 1.3, 5.0), row("near", 10.0, 1.15, 5.0)
    assert choose([fast, slower], parse_budget()).chosen == "fast"
    assert choose([fast, near], parse_budget()).chosen == "near"


def test_quality_compares_on_the_same_records_whatever_the_sampling_interval():
    def row(name, auc, size):
        return Row(name, {"auc": auc, "size_bytes": size}, {"auc": (auc - 0.1, auc + 0.1)})

    best, near, worse = row("best", 0.9, 9.0), row("near", 0.8995, 5.0), row("worse", 0.89, 1.0)
    assert choose([best, near, worse], parse_budget(objective="quality")).chosen == "near"
    assert choose([best, worse], parse_budget(objective="quality")).chosen == "best"


def test_two_tasks_weigh_alike_and_only_what_all_have_counts():
    one = Row("one", {"tpot_ms_p50": 1.0, "score_ms_p50": 30.0, "size_bytes": 1.0})
    two = Row("two", {"tpot_ms_p50": 2.0, "score_ms_p50": 10.0, "size_bytes": 1.0})
    half = Row("half", {"tpot_ms_p50": 3.0, "size_bytes": 1.0})
    assert choose([one, two], parse_budget()).chosen == "two"
    assert choose([one, two, half], parse_budget()).chosen == "one"
    with pytest.raises(InputError, match="objective 'throughput' needs items_per_s or tokens_per_s"):
        choose([one, two], parse_budget(objective="throughput"))


def test_cost_turns_what_is_better_when_higher():
    slow, fast = (cost(Row("a", {"tokens_per_s": value}), ["tokens_per_s"]) for value in (10.0, 20.0))
    assert fast.log < slow.log
    assert differ(fast, slow)
    assert not differ(slow, slow)


def test_noise_does_not_win_over_a_row_that_is_better_in_mean_and_size():
    leader = Row("leader", {"tpot_ms_p50": 1.0, "size_bytes": 9.0})
    steady = Row("steady", {"tpot_ms_p50": 1.2, "size_bytes": 4.0}, {"tpot_ms_p50": (1.19, 1.21)})
    noisy = Row("noisy", {"tpot_ms_p50": 1.3, "size_bytes": 5.0}, {"tpot_ms_p50": (0.9, 1.7)})
    assert choose([leader, noisy], parse_budget()).chosen == "noisy"
    selection = choose([leader, steady, noisy], parse_budget())
    assert selection.chosen == "leader"
    assert "but beaten by another in both mean and size" in reasons(selection)["noisy"]


def test_of_what_is_equal_the_better_in_other_figures_is_taken():
    def row(name, auc):
        return Row(name, {"size_bytes": 5.0, "auc": auc, "tpot_ms_p50": 1.0})

    assert choose([row("a", 0.8), row("b", 0.9)], parse_budget(objective="smallest")).chosen == "b"
    assert choose([row("a", 0.9), row("b", 0.9)], parse_budget(objective="smallest")).chosen == "a"


def test_the_pareto_front_keeps_what_nothing_beats():
    worse = Row("worse", {"tpot_ms_p50": 5.0, "auc": 0.85})
    blind = Row("blind", {"tpot_ms_p50": 1.0})
    twin = Row("twin", dict(ROWS[1].metrics))
    front = pareto_front([*ROWS, worse, blind, twin], "tpot_ms_p50", "auc")
    assert [row.build for row in front] == ["int4", "int8", "twin", "fp32"]
