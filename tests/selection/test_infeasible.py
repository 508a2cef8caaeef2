"""An infeasible budget is explained: what binds, what is nearest, and the smallest change that would help."""

from slmdeploy.selection import Pair, Row, choose
from slmdeploy.specs import parse_budget
from tests.selection.rows import ROWS, reasons


def test_it_names_the_binding_constraint_the_nearest_miss_and_what_to_move():
    selection = choose(ROWS, parse_budget("auc>=0.895", "tpot_ms_p50<=3.9"))
    assert not selection.feasible
    assert selection.nearest_miss == Pair("int8", None)
    assert selection.binding == "tpot_ms_p50 <= 3.9"
    assert {(move.constraint, move.value) for move in selection.relaxation} == {
        ("auc >= 0.895", 0.89),
        ("tpot_ms_p50 <= 3.9", 4.0),
    }


def test_the_smallest_change_that_is_enough_alone_comes_first():
    selection = choose(ROWS, parse_budget("auc>=0.895", "tpot_ms_p50<=3.9"))
    assert [(move.constraint, move.build, move.value) for move in selection.alone] == [
        ("auc >= 0.895", "int4", 0.8),
        ("tpot_ms_p50 <= 3.9", "fp32", 10.0),
    ]
    assert selection.reason.endswith("the smallest single change is auc >= 0.895 to 0.8")


def test_the_misses_of_each_candidate_are_told_furthest_first():
    selection = choose(ROWS, parse_budget("auc>=0.895", "tpot_ms_p50<=3.9"))
    int8 = next(one for one in selection.rejections if one.build == "int8")
    assert [miss.constraint for miss in int8.misses] == ["tpot_ms_p50 <= 3.9", "auc >= 0.895"]
    assert reasons(selection)["int8"].startswith("tpot_ms_p50 <= 3.9 is missed: 4, 2.6% outside; auc >= 0.895")


def test_a_limit_that_is_only_not_proven_binds_too():
    row = Row("a", {"tpot_ms_p50": 10.0}, {"tpot_ms_p50": (9.0, 12.3456)})
    selection = choose([row], parse_budget("tpot_ms_p50<=11"))
    assert selection.binding == "tpot_ms_p50 <= 11"
    assert [move.value for move in selection.alone] == [12.35]


def test_no_limit_helps_a_build_outside_its_gates():
    failed = Row("bad", {"tpot_ms_p50": 10.0}, gates_failed=("kl",))
    selection = choose([failed], parse_budget("tpot_ms_p50<=1"))
    assert (selection.binding, selection.alone, selection.nearest_miss) == (None, (), None)
    assert selection.reason.startswith("no limit would help")
    assert reasons(selection)["bad"].startswith("outside its own gates: kl; tpot_ms_p50 <= 1 is missed")
