"""The verb `select`: many files, one outcome, written; prices of targets; and what-ifs beside it."""

import json

import pytest

from slmdeploy.artifacts import open_artifact
from slmdeploy.errors import InputError, OutputExistsError, SpecError
from slmdeploy.selection import prices, select, what_if
from slmdeploy.selection.selecting import changed
from slmdeploy.specs import Target, parse_budget, parse_change
from tests.selection.rows import entry, measurement, reasons

SOURCE = {"price_per_hour_usd": "made up"}


def test_it_reads_measurements_and_writes_the_selection(tmp_path):
    failed = entry("b", 1.0, gates={"kl": {"passed": False}}, passed=False)
    files = [
        measurement(tmp_path / "1.json", entry("a", 2.0), failed),
        measurement(tmp_path / "2.json", entry("c", 3.0)),
    ]
    selection = select(files, budget=parse_budget(), out=tmp_path / "s")
    assert (selection.chosen, selection.chosen_path) == ("a", "builds/a")
    assert reasons(selection)["b"] == "outside its own gates: kl"
    written = open_artifact(tmp_path / "s", "selection")
    assert json.loads((written.path / "selection.json").read_text()) == json.loads(json.dumps(selection.to_dict()))
    with pytest.raises(OutputExistsError):
        select(files, budget=parse_budget(), out=tmp_path / "s")
    assert select(files, budget=parse_budget(), out=tmp_path / "s", force=True) == selection


def test_an_infeasible_outcome_is_written_too(tmp_path):
    file = measurement(tmp_path / "m.json", entry("a", 2.0))
    assert not select([file], budget=parse_budget("tpot_ms_p50<=1"), out=tmp_path / "s").feasible
    assert json.loads((tmp_path / "s" / "selection.json").read_text())["binding"] == "tpot_ms_p50 <= 1"


def test_a_build_measured_twice_is_refused(tmp_path):
    files = [measurement(tmp_path / name, entry("a")) for name in ("1.json", "2.json")]
    with pytest.raises(InputError, match="a is in the measurements more than once"):
        select(files, budget=parse_budget())


def test_prices_of_targets_count_and_given_ones_go_before(tmp_path, monkeypatch):
    cpu = Target(name="here", summary="", kind="cpu", engines=("onnxruntime",), price_per_hour_usd=1.0, sources=SOURCE)
    monkeypatch.setattr(prices, "list_targets", lambda: [cpu, cpu.model_copy(update={"name": "elsewhere"})])
    answered = {"requests_per_s": 10.0, "size_bytes": 1}
    rows = [entry("a", target="here", metrics=answered), entry("a", target="there", metrics=answered)]
    file = measurement(tmp_path / "m.json", *rows)
    budget = parse_budget(objective="cheapest")
    with pytest.raises(InputError, match="target there has no price"):
        select([file], budget=budget)
    assert select([file], budget=budget, prices={"there": 0.5}).chosen_target == "there"
    assert select([file], budget=budget, prices={"there": 0.5, "here": 0.1}).chosen_target == "here"


def test_a_what_if_selects_again(tmp_path):
    file = measurement(
        tmp_path / "m.json", entry("a", 2.0), entry("b", 3.0, metrics={"tpot_ms_p50": 3.0, "size_bytes": 0.5})
    )
    budget = parse_budget("tpot_ms_p50<=1", objective="smallest")
    assert not select([file], budget=budget).feasible
    assert what_if([file], budget=budget, changes=[parse_change("tpot_ms_p50=2")]).chosen == "a"
    assert what_if([file], budget=budget, changes=[parse_change("tpot_ms_p50=4")]).chosen == "b"


@pytest.mark.parametrize(
    ("text", "constraints", "preferences"),
    [
        ("auc=0.8", ["auc >= 0.8", "chat:tpot_ms_p50 <= 5"], ["size_bytes <= 100"]),
        ("auc<=0.8", ["auc >= 0.9", "chat:tpot_ms_p50 <= 5", "auc <= 0.8"], ["size_bytes <= 100"]),
        ("chat:tpot_ms_p50=6", ["auc >= 0.9", "chat:tpot_ms_p50 <= 6"], ["size_bytes <= 100"]),
        ("tpot_ms_p50=6", ["auc >= 0.9", "chat:tpot_ms_p50 <= 5", "tpot_ms_p50 <= 6"], ["size_bytes <= 100"]),
        ("auc@t=0.8", ["auc >= 0.9", "chat:tpot_ms_p50 <= 5", "auc@t >= 0.8"], ["size_bytes <= 100"]),
        ("size_bytes=9", ["auc >= 0.9", "chat:tpot_ms_p50 <= 5"], ["size_bytes <= 9"]),
    ],
)
def test_a_change_replaces_the_limit_of_its_name_or_is_added(text, constraints, preferences):
    budget = parse_budget("auc>=0.9", "chat:tpot_ms_p50<=5", preferences=("size_bytes<=100",))
    found = changed(budget, [parse_change(text)])
    assert [str(limit) for limit in found.constraints] == constraints
    assert [str(limit) for limit in found.preferences] == preferences


def test_a_change_of_an_unknown_metric_is_refused():
    with pytest.raises(SpecError, match="what-if: there is no metric 'aux': did you mean 'auc'"):
        changed(parse_budget(), [parse_change("aux=1")])
