"""The selector: budgets are hard, reasons are given, noise is no reason, and an infeasible budget is explained."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmdeploy.artifacts import open_artifact, writing
from slmdeploy.errors import CorruptArtifactError, InputError, SpecError
from slmdeploy.selection import Row, choose, pareto_front, select
from slmdeploy.specs import parse_budget

FP32 = Row("fp32", {"tpot_ms_p50": 10.0, "size_bytes": 400.0, "auc": 0.90}, precision="fp32", graph="g")
INT8 = Row("int8", {"tpot_ms_p50": 4.0, "size_bytes": 100.0, "auc": 0.89}, precision="int8", graph="g")
INT4 = Row("int4", {"tpot_ms_p50": 2.0, "size_bytes": 60.0, "auc": 0.80}, precision="int4", graph="g")
ROWS = [FP32, INT8, INT4]


def reasons(selection):
    return {rejection.build: rejection.reason for rejection in selection.rejections}


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


def test_infeasible_names_binding_constraint_nearest_miss_and_relaxation():
    selection = choose(ROWS, parse_budget("auc>=0.895", "tpot_ms_p50<=3.9"))
    assert not selection.feasible
    assert selection.nearest_miss == "int8"
    assert selection.binding == "tpot_ms_p50 <= 3.9"
    assert {(move.constraint, move.value) for move in selection.relaxation} == {
        ("auc >= 0.895", 0.89),
        ("tpot_ms_p50 <= 3.9", 4.0),
    }
    assert {(move.constraint, move.build) for move in selection.alone} == {
        ("auc >= 0.895", "int4"),
        ("tpot_ms_p50 <= 3.9", "fp32"),
    }


def test_baseline_is_never_chosen():
    teacher = Row("baseline", {"tpot_ms_p50": 0.1, "size_bytes": 1.0}, baseline=True)
    assert choose([teacher, *ROWS], parse_budget()).chosen == "int4"
    with pytest.raises(InputError, match="no measured build"):
        choose([teacher], parse_budget())


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


def test_unmeasured_metric_rejects_and_unknown_one_is_an_error():
    selection = choose(ROWS, parse_budget("items_per_s>=1"))
    assert set(reasons(selection).values()) == {"items_per_s was not measured"}
    assert not selection.feasible
    assert selection.nearest_miss is None
    with pytest.raises(SpecError, match="did you mean 'tpot_ms_p50'"):
        choose(ROWS, parse_budget("tpot_ms_p5<=1"))


def test_differences_within_noise_are_broken_by_size():
    def row(name, tpot, size):
        return Row(name, {"tpot_ms_p50": tpot, "size_bytes": size}, {"tpot_ms_p50": (tpot - 0.3, tpot + 0.3)})

    selection = choose([row("a", 2.0, 50.0), row("b", 2.2, 40.0), row("c", 3.0, 10.0)], parse_budget())
    assert selection.chosen == "b"
    assert "equal within noise to a" in selection.reason
    assert reasons(selection)["a"].startswith("feasible, equal to b within noise, but larger")


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


def test_a_far_miss_is_told_as_a_multiple():
    assert "10, 100 times the limit" in reasons(choose(ROWS, parse_budget("tpot_ms_p50<=0.1")))["fp32"]


def test_two_tasks_weigh_alike_and_objective_needs_a_metric():
    one = Row("one", {"tpot_ms_p50": 1.0, "score_ms_p50": 30.0, "size_bytes": 1.0})
    two = Row("two", {"tpot_ms_p50": 2.0, "score_ms_p50": 10.0, "size_bytes": 1.0})
    assert choose([one, two], parse_budget()).chosen == "two"
    with pytest.raises(InputError, match="objective 'throughput' needs items_per_s or tokens_per_s"):
        choose([one, two], parse_budget(objective="throughput"))


def test_pareto_front_keeps_what_nothing_beats():
    worse = Row("worse", {"tpot_ms_p50": 5.0, "auc": 0.85})
    blind = Row("blind", {"tpot_ms_p50": 1.0})
    assert pareto_front([*ROWS, worse, blind], "tpot_ms_p50", "auc") == ["int4", "int8", "fp32"]


# No deadline: a busy machine is no failure.
PROPERTY = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
NAMES = ("tpot_ms_p50", "size_bytes", "auc", "tokens_per_s")
VALUES = st.integers(1, 6).map(float)
ROW_LISTS = st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, VALUES)), min_size=1, max_size=5).map(
    lambda drawn: [Row(f"build{index}", metrics) for index, metrics in enumerate(drawn)]
)
CONSTRAINTS = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(("<=", ">=")), VALUES), max_size=3).map(
    lambda drawn: ["".join(map(str, parts)) for parts in drawn]
)
OBJECTIVES = st.sampled_from(("fastest", "throughput", "smallest", "quality"))


@PROPERTY
@given(ROW_LISTS, CONSTRAINTS, CONSTRAINTS, OBJECTIVES)
def test_chosen_is_feasible_and_more_constraints_never_help(rows, constraints, more, objective):
    budget = parse_budget(*constraints, objective=objective)
    selection = choose(rows, budget)
    if selection.feasible:
        metrics = {row.build: row.metrics for row in rows}[selection.chosen]
        assert all(constraint.holds(metrics[constraint.metric]) for constraint in budget.constraints)
    else:
        assert not choose(rows, parse_budget(*constraints, *more, objective=objective)).feasible
        assert selection.nearest_miss is not None


@PROPERTY
@given(ROW_LISTS, CONSTRAINTS, OBJECTIVES, st.randoms())
def test_order_of_rows_is_irrelevant(rows, constraints, objective, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    budget = parse_budget(*constraints, objective=objective)
    assert choose(rows, budget) == choose(shuffled, budget)


@PROPERTY
@given(ROW_LISTS, CONSTRAINTS)
def test_relaxation_makes_the_nearest_miss_feasible(rows, constraints):
    budget = parse_budget(*constraints)
    selection = choose(rows, budget)
    moved = {move.constraint: move.value for move in selection.relaxation}
    relaxed = tuple(
        constraint.model_copy(update={"limit": moved.get(str(constraint), constraint.limit)})
        for constraint in budget.constraints
    )
    assert choose(rows, budget.model_copy(update={"constraints": relaxed})).feasible


def measurement(folder, rows):
    with writing(folder, kind="measurement", plan={}, inputs={}) as draft:
        (draft.path / "measurement.json").write_text(json.dumps({"rows": rows}))
    return folder


def entry(name, tpot, **changes):
    row = {
        "build": name,
        "path": f"builds/{name}",
        "role": "candidate",
        "precision": "int8",
        "graph": None,
        "gates": {"kl": {"passed": True}},
        "passed": True,
        "metrics": {"tpot_ms_p50": tpot, "size_bytes": 1},
        "intervals": {},
    }
    return row | changes


def test_verb_reads_measurements_and_writes_the_selection(tmp_path):
    one = measurement(
        tmp_path / "m1", [entry("a", 2.0), entry("b", 1.0, gates={"kl": {"passed": False}}, passed=False)]
    )
    two = measurement(tmp_path / "m2", [entry("c", 3.0)])
    selection = select([one, two], budget=parse_budget(), out=tmp_path / "s")
    assert (selection.chosen, selection.chosen_path) == ("a", "builds/a")
    assert reasons(selection)["b"] == "outside its own gates: kl"
    written = open_artifact(tmp_path / "s", "selection")
    assert json.loads((written.path / "selection.json").read_text())["chosen"] == "a"


def test_verb_writes_an_infeasible_outcome_too(tmp_path):
    folder = measurement(tmp_path / "m", [entry("a", 2.0)])
    assert not select([folder], budget=parse_budget("tpot_ms_p50<=1"), out=tmp_path / "s").feasible
    assert json.loads((tmp_path / "s" / "selection.json").read_text())["binding"] == "tpot_ms_p50 <= 1"


def test_verb_refuses_a_build_measured_twice_and_a_broken_file(tmp_path):
    folders = [measurement(tmp_path / name, [entry("a", 2.0)]) for name in ("m1", "m2")]
    with pytest.raises(InputError, match="a is in more than one measurement"):
        select(folders, budget=parse_budget())
    with pytest.raises(CorruptArtifactError, match="measure again"):
        select([measurement(tmp_path / "m3", [{"build": "a"}])], budget=parse_budget())
