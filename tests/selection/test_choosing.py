"""The choice: limits are hard, preferences are not, reasons are given, noise is no reason; properties of all that."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmdeploy.errors import InputError, SpecError
from slmdeploy.selection import OBJECTIVES, Pair, Row, choose
from slmdeploy.selection.comparing import FRONT
from slmdeploy.specs import parse_budget
from tests.selection.rows import FP32, INT4, INT8, ROWS, reasons


@pytest.mark.parametrize(
    ("objective", "budget", "chosen"),
    [
        ("fastest", [], "int4"),
        ("fastest", ["auc>=0.85"], "int8"),
        ("fastest", ["auc>=0.9"], "fp32"),
        ("quality", [], "fp32"),
        ("quality", ["size_bytes<=1e2"], "int8"),
        ("smallest", ["tpot_ms_p50<=5"], "int4"),
    ],
)
def test_best_of_the_feasible(objective, budget, chosen):
    selection = choose(ROWS, parse_budget(*budget, objective=objective))
    assert selection.chosen == chosen
    assert selection.feasible
    assert {*reasons(selection), chosen} == {"fp32", "int8", "int4"}


def test_rejection_says_value_limit_and_distance():
    selection = choose(ROWS, parse_budget("auc>=0.85", "tpot_ms_p50<=5"))
    assert reasons(selection)["fp32"] == "tpot_ms_p50 <= 5 is missed: 10, 100.0% outside"
    assert reasons(selection)["int4"] == "auc >= 0.85 is missed: 0.8, 5.9% outside"


def test_baseline_is_never_chosen():
    teacher = Row("baseline", {"tpot_ms_p50": 0.1, "size_bytes": 1.0}, baseline=True)
    assert choose([teacher, *ROWS], parse_budget()).chosen == "int4"
    with pytest.raises(InputError, match="no measured build"):
        choose([teacher], parse_budget())


def test_the_answer_is_a_build_and_a_target():
    here = replace(INT8, target="x86-64-avx2", path="builds/int8")
    there = replace(INT8, target="arm64-dotprod", metrics=INT8.metrics | {"tpot_ms_p50": 3.0})
    selection = choose([here, there], parse_budget())
    assert (selection.chosen, selection.chosen_target) == ("int8", "arm64-dotprod")
    (beaten,) = selection.rejections
    assert (beaten.build, beaten.target) == ("int8", "x86-64-avx2")
    limited = choose([here, there], parse_budget("tpot_ms_p50@arm64-dotprod<=2"))
    assert (limited.chosen_target, limited.chosen_path) == ("x86-64-avx2", "builds/int8")


def test_a_difference_from_fp32_counts_on_one_target_and_one_source_alone():
    fp32 = replace(FP32, target="a", metrics=FP32.metrics | {"tpot_ms_p50": 1.0})
    slow = replace(INT8, target="b")
    assert choose([fp32, slow], parse_budget("tpot_ms_p50@a<=0.5")).chosen == "int8"
    assert choose([fp32, replace(slow, target="a", source="estimated")], parse_budget("size_bytes<=100")).feasible
    assert not choose([fp32, replace(slow, target="a")], parse_budget("size_bytes<=100")).feasible


def test_an_estimate_is_called_one_wherever_it_stands():
    guess = replace(INT4, source="estimated")
    chosen = choose([INT8, guess], parse_budget())
    assert (chosen.chosen, chosen.chosen_source) == ("int4", "estimated")
    assert chosen.reason.startswith("estimated, not measured: fastest of 2 feasible")
    assert reasons(choose([INT8, guess], parse_budget("auc>=0.85")))["int4"].startswith("estimated: auc >= 0.85")


def test_on_a_tie_the_measured_one_wins():
    measured = Row("measured", {"tpot_ms_p50": 2.1, "size_bytes": 9.0}, {"tpot_ms_p50": (1.9, 2.3)})
    guess = Row("guess", {"tpot_ms_p50": 2.0, "size_bytes": 1.0}, source="estimated")
    selection = choose([measured, guess], parse_budget())
    assert (selection.chosen, selection.ties) == ("measured", (Pair("guess", None),))
    assert reasons(selection)["guess"].startswith(
        "estimated: feasible, equal to measured within noise, but not measured"
    )


def test_preferences_choose_among_the_feasible_and_forbid_nothing():
    assert choose(ROWS, parse_budget(preferences=("auc>=0.85",))).chosen == "int8"
    none_within = choose(ROWS, parse_budget("auc>=0.85", preferences=("tpot_ms_p50<=2", "size_bytes<=60")))
    assert none_within.chosen == "int8"
    assert "fastest of 1 over the preferences by 166.7%, of 2 feasible" in none_within.reason
    assert "feasible, but over the preferences by 966.7%" in reasons(none_within)["fp32"]
    unmeasured = choose(ROWS, parse_budget(preferences=("items_per_s>=1",)))
    assert unmeasured.chosen == "int4"
    assert "of 3 without a figure for every preference, of 3 feasible" in unmeasured.reason


def test_preferences_are_kept_before_the_objective_counts():
    selection = choose(ROWS, parse_budget(preferences=("auc>=0.85", "tpot_ms_p50<=5"), objective="smallest"))
    assert selection.chosen == "int8"
    assert "smallest of 1 within every preference, of 3 feasible" in selection.reason


def test_differences_within_noise_are_ties_broken_by_size():
    def row(name, tpot, size):
        return Row(name, {"tpot_ms_p50": tpot, "size_bytes": size}, {"tpot_ms_p50": (tpot - 0.3, tpot + 0.3)})

    selection = choose([row("a", 2.0, 50.0), row("b", 2.2, 40.0), row("c", 3.0, 10.0)], parse_budget())
    assert selection.chosen == "b"
    assert selection.ties == (Pair("a", None),)
    assert "equal within noise to a (of which a has the best mean" in selection.reason
    assert "taken as measured before estimated, then the smallest on disk" in selection.reason
    assert reasons(selection)["a"].startswith("feasible, equal to b within noise, but larger")


def test_an_objective_that_not_every_candidate_has_is_refused():
    lacking = Row("lacking", {"size_bytes": 1.0})
    with pytest.raises(InputError, match=r"objective 'throughput' needs items_per_s or tokens_per_s .* fp32"):
        choose(ROWS, parse_budget(objective="throughput"))
    with pytest.raises(InputError, match=r"and lacking \(measured\) lacks what the others have"):
        choose([*ROWS, lacking], parse_budget())


def test_names_that_do_not_exist_are_refused_with_the_nearest():
    row = Row("a", {"tpot_ms_p50": 1.0, "chat:tpot_ms_p50": 1.0}, target="x86-64-avx2")
    for text, why in (
        ("tpott_ms_p50<=1", "no metric 'tpott_ms_p50': did you mean 'tpot_ms_p50'"),
        ("chaat:tpot_ms_p50<=1", "no workload 'chaat' was measured: did you mean 'chat'"),
        ("tpot_ms_p50@x86-64-avx<=1", "of a target 'x86-64-avx': did you mean 'x86-64-avx2'"),
    ):
        for budget in (parse_budget(text), parse_budget(preferences=(text,))):
            with pytest.raises(SpecError, match=why):
                choose([row], budget)
    assert choose([row], parse_budget("chat:tpot_ms_p50@x86-64-avx2<=1")).feasible


def test_the_front_is_kept_whatever_the_budget_says():
    worse = Row("worse", {"tpot_ms_p50": 11.0, "size_bytes": 500.0, "auc": 0.85})
    failed = Row("failed", {"tpot_ms_p50": 1.0, "size_bytes": 50.0, "auc": 0.5}, gates_failed=("kl",))
    selection = choose([*ROWS, worse, failed], parse_budget("auc>=0.89"))
    table = {one.build: (one.on_front, one.feasible) for one in selection.candidates}
    assert table == {
        "fp32": (True, True),
        "int8": (True, True),
        "int4": (True, False),
        "worse": (False, False),
        "failed": (True, False),
    }
    assert selection.candidates[0].figures.keys() == {"tpot_ms_p50", "auc", "size_bytes"}
    (verdict,) = next(one for one in selection.candidates if one.build == "fp32").verdicts
    assert (verdict.constraint, verdict.result, verdict.value) == ("auc >= 0.89", "met", 0.9)


# No deadline: a busy machine is no failure.
PROPERTY = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
NAMES = ("tpot_ms_p50", "size_bytes", "auc", "tokens_per_s", "rss_peak_bytes")
VALUES = st.integers(1, 6).map(float)


@st.composite
def drawn_rows(draw):
    rows = []
    for index in range(draw(st.integers(1, 5))):
        metrics = draw(st.fixed_dictionaries(dict.fromkeys(NAMES, VALUES)))
        noise = draw(st.fixed_dictionaries(dict.fromkeys(NAMES, st.sampled_from((0.0, 0.1, 0.5)))))
        intervals = {name: (value * (1 - noise[name]), value * (1 + noise[name])) for name, value in metrics.items()}
        source = draw(st.sampled_from(("measured", "measured", "estimated")))
        rows.append(Row(f"build{index % 3}", metrics, intervals, target=f"target{index // 3}", source=source))
    return rows


LIMITS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(("<=", ">=")), VALUES), max_size=3).map(
    lambda drawn: ["".join(map(str, parts)) for parts in drawn]
)
GOALS = st.sampled_from(("fastest", "throughput", "smallest", "quality"))


def row_of(rows, selection):
    return next(row for row in rows if (row.build, row.target) == (selection.chosen, selection.chosen_target))


def proven(row, metric, operator):
    """The value of a metric and the unfavourable end of its interval."""
    low, high = row.interval(metric)
    return row.metrics[metric], high if operator == "<=" else low


@PROPERTY
@given(drawn_rows(), LIMITS, LIMITS, GOALS)
def test_chosen_is_proven_feasible_and_more_constraints_never_help(rows, limits, more, objective):
    budget = parse_budget(*limits, objective=objective)
    selection = choose(rows, budget)
    if selection.feasible:
        row = row_of(rows, selection)
        assert all(
            limit.holds(end) for limit in budget.constraints for end in proven(row, limit.metric, limit.operator)
        )
    else:
        assert not choose(rows, parse_budget(*limits, *more, objective=objective)).feasible
        assert selection.nearest_miss is not None


@PROPERTY
@given(drawn_rows(), LIMITS, st.integers(0, 2), VALUES, GOALS)
def test_loosening_a_limit_never_makes_a_feasible_budget_infeasible(rows, limits, which, by, objective):
    budget = parse_budget(*limits, objective=objective)
    loosened = [
        limit.moved(limit.limit + (by if limit.operator == "<=" else -by)) if index == which else limit
        for index, limit in enumerate(budget.constraints)
    ]
    looser = budget.model_copy(update={"constraints": tuple(loosened)})
    assert choose(rows, looser).feasible >= choose(rows, budget).feasible


@PROPERTY
@given(drawn_rows(), LIMITS, GOALS)
def test_tightening_to_what_the_choice_proves_keeps_the_budget_feasible(rows, limits, objective):
    budget = parse_budget(*limits, objective=objective)
    selection = choose(rows, budget)
    if selection.feasible:
        row = row_of(rows, selection)
        tight = tuple(limit.moved(proven(row, limit.metric, limit.operator)[1]) for limit in budget.constraints)
        assert choose(rows, budget.model_copy(update={"constraints": tight})).feasible


@PROPERTY
@given(drawn_rows(), LIMITS, LIMITS, GOALS)
def test_preferences_never_change_feasibility(rows, limits, soft, objective):
    hard = choose(rows, parse_budget(*limits, objective=objective))
    both = choose(rows, parse_budget(*limits, objective=objective, preferences=tuple(soft)))
    assert [one.feasible for one in hard.candidates] == [one.feasible for one in both.candidates]
    assert hard.feasible == both.feasible


@PROPERTY
@given(drawn_rows(), LIMITS, GOALS)
def test_the_choice_is_never_dominated(rows, limits, objective):
    selection = choose(rows, parse_budget(*limits, objective=objective))
    if not selection.feasible:
        return
    feasible = {(one.build, one.target) for one in selection.candidates if one.feasible}
    chosen = row_of(rows, selection)

    def figures(row):
        names = {*FRONT, *OBJECTIVES[objective]} & row.metrics.keys()
        return [row.metrics[name] * (-1 if name in ("auc", "tokens_per_s") else 1) for name in sorted(names)]

    for row in rows:
        if (row.build, row.target) in feasible and row.source == chosen.source:
            better = [one - other for one, other in zip(figures(row), figures(chosen), strict=True)]
            assert max(better) > 0 or not any(better)


@PROPERTY
@given(drawn_rows(), LIMITS, LIMITS, GOALS, st.randoms())
def test_order_of_rows_is_irrelevant(rows, limits, soft, objective, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    budget = parse_budget(*limits, objective=objective, preferences=tuple(soft))
    assert choose(rows, budget) == choose(shuffled, budget)


@PROPERTY
@given(drawn_rows(), LIMITS)
def test_what_is_said_to_admit_a_build_does(rows, limits):
    budget = parse_budget(*limits)
    selection = choose(rows, budget)

    def with_moves(moves):
        moved = {move.constraint: move.value for move in moves}
        limits = tuple(limit.moved(moved.get(str(limit), limit.limit)) for limit in budget.constraints)
        return choose(rows, budget.model_copy(update={"constraints": limits}))

    assert with_moves(selection.relaxation).feasible
    assert all(with_moves([move]).feasible for move in selection.alone)
