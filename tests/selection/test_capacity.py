"""The verb `plan`: rates, which workload and rows count, what is left out, headroom and costs."""

import json

import pytest

from slmdeploy.errors import InputError
from slmdeploy.selection import fleets
from slmdeploy.selection.capacity import Demand, parse_rate, plan
from slmdeploy.specs import parse_constraint
from tests.selection.rows import entry, measurement


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Short simulations: what is looked at here does not hang on their last digit."""
    monkeypatch.setattr(fleets, "REQUESTS", 2000)
    monkeypatch.setattr(fleets, "RUNS", 8)


def loads(ms=10.0, scenario="single-stream", task="score", n=100, **more):
    """One measured workload whose every request took ``ms``."""
    base = {"score": "score_ms", "generate": "e2e_ms"}[task]
    return {"task": task, "scenario": scenario, "metrics": {}, "samples": {base: [ms] * n}} | more


def planned(file, *limits, rate="100/s", peak=1.0, headroom=0.0, **options):
    demand = Demand(parse_rate(rate), peak, headroom)
    return plan([file], demand=demand, limits=[parse_constraint(text) for text in limits], **options)


@pytest.mark.parametrize(
    ("text", "per_s"),
    [("1200/s", 1200.0), ("72000/min", 1200.0), (" 3.6e3 / h ", 1.0), ("100e6/day", 1157.4074)],
)
def test_rates_are_per_second_minute_hour_or_day(text, per_s):
    assert parse_rate(text) == pytest.approx(per_s)


@pytest.mark.parametrize("text", ["1200", "/s", "many/s", "1200/week", "-5/s", "1.2.3/s"])
def test_another_form_of_rate_is_refused(text):
    with pytest.raises(InputError, match="is not of the form NUMBER/s"):
        parse_rate(text)


@pytest.mark.parametrize("wrong", [(0.0, 1.0, 0.0), (1.0, 0.5, 0.0), (1.0, 1.0, -0.1), (float("nan"), 1.0, 0.0)])
def test_a_demand_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(InputError, match="a rate is above 0"):
        Demand(*wrong)


def test_replicas_are_counted_for_the_peak_and_its_headroom(tmp_path):
    file = measurement(tmp_path / "m.json", entry("a", workloads={"rank": loads()}))
    plain = planned(file, "score_ms_p99<=40", rate="250/s")
    high = planned(file, "score_ms_p99<=40", rate="250/s", peak=2.0, headroom=0.5)
    (small,), (large,) = plain.fleets, high.fleets
    assert (high.demand.peak_per_s, high.demand.planned_per_s) == (500.0, 750.0)
    assert 3 <= small.replicas < 7.5 < large.replicas <= 10
    assert large.headroom >= 0.5
    assert large.busy == pytest.approx(5.0 / large.replicas)
    assert large.simulated[0].high <= 40
    assert json.loads(json.dumps(high.to_dict()))["planned_per_s"] == 750.0


def test_costs_are_of_all_replicas_over_the_mean_rate(tmp_path):
    rows = [entry("a", target=name, workloads={"rank": loads(ms)}) for name, ms in (("slow", 20.0), ("fast", 5.0))]
    file = measurement(tmp_path / "m.json", *rows)
    capacity = planned(file, "score_ms_p99<=80", peak=2.0, prices={"slow": 0.1, "fast": 1.0})
    assert [fleet.target for fleet in capacity.fleets] == ["slow", "fast"]
    slow = capacity.fleets[0]
    assert slow.usd_per_hour == pytest.approx(0.1 * slow.replicas)
    assert slow.usd_per_million_requests == pytest.approx(slow.usd_per_hour / 3600 / 100 * 1e6)
    unpriced = planned(file, "score_ms_p99<=80", prices={"slow": 0.1})
    assert [fleet.target for fleet in unpriced.fleets] == ["fast", "slow"]
    assert unpriced.fleets[0].usd_per_hour is None


def test_what_cannot_be_planned_is_left_out_with_its_reason(tmp_path):
    rows = [
        entry("good", workloads={"rank": loads()}),
        entry("guess", source="estimated", workloads={"rank": loads()}),
        entry("bad", gates={"kl": {"passed": False}}, passed=False, workloads={"rank": loads()}),
        entry("few", workloads={"rank": loads(n=20)}),
        entry("other"),
    ]
    capacity = planned(measurement(tmp_path / "m.json", *rows), "score_ms_p99<=40")
    assert [fleet.build for fleet in capacity.fleets] == ["good"]
    why = {row.build: row.reason for row in capacity.left_out}
    assert why.keys() == {"guess", "bad", "few", "other"}
    assert why["guess"].startswith("estimated")
    assert why["bad"] == "outside its own gates: kl"
    assert "too few" in why["few"]
    assert why["other"] == "workload rank was not measured"


def test_requests_that_were_answered_together_cannot_be_planned(tmp_path):
    together = {"workloads": [{"name": "rank", "batch": 8}]}
    file = measurement(tmp_path / "m.json", entry("a", workloads={"rank": loads()}), plan=together)
    with pytest.raises(InputError, match="up to 8 requests were answered together"):
        planned(file, "score_ms_p99<=40")


def test_a_limit_that_no_number_holds_is_an_outcome(tmp_path):
    rows = [entry("slow", workloads={"rank": loads(50.0)}), entry("quick", workloads={"rank": loads(5.0)})]
    file = measurement(tmp_path / "m.json", *rows)
    mixed = planned(file, "score_ms_p99<=40")
    assert [(fleet.build, fleet.replicas is None) for fleet in mixed.fleets] == [("quick", False), ("slow", True)]
    assert "no number of replicas helps: score_ms_p99 <= 40 is missed without any waiting: 50" in mixed.fleets[1].reason
    assert mixed.feasible
    assert not planned(file, "score_ms_p99<=4").feasible


def test_limits_may_name_the_workload_and_the_target(tmp_path):
    both = {"rank": loads(), "chat": loads(90.0, task="generate")}
    rows = [entry("a", target="x", workloads=both), entry("a", target="y", workloads=both)]
    file = measurement(tmp_path / "m.json", *rows)
    with pytest.raises(InputError, match="name one with --workload: chat, rank"):
        planned(file, "score_ms_p99<=40")
    capacity = planned(file, "chat:e2e_ms_p99<=400", "chat:e2e_ms_p90@x<=200", rate="1/s")
    assert capacity.workload == "chat"
    assert {fleet.target: len(fleet.simulated) for fleet in capacity.fleets} == {"x": 2, "y": 1}
    (left,) = planned(file, "e2e_ms_p90@x<=200", rate="1/s", workload="chat").left_out
    assert (left.target, left.reason) == ("y", "no limit is for its target")


def test_the_measured_curve_is_the_check(tmp_path):
    curve = [{"rate_per_s": 50.0, "metrics": {"score_ms_p99": 45.0}, "intervals": {}, "requests": 500}]
    file = measurement(tmp_path / "m.json", entry("a", workloads={"rank": loads(scenario="server", curve=curve)}))
    (fleet,) = planned(file, "score_ms_p99<=90").fleets
    assert [(one.rate_per_s, one.measured) for one in fleet.check] == [(50.0, 45.0)]


@pytest.mark.parametrize(
    ("limits", "options", "why"),
    [
        ([], {}, "needs at least one limit"),
        (["score_ms_p99<=40"], {"target": "z"}, "no target 'z' was measured: valid are x"),
        (["score_ms_p99<=40"], {"build": "b"}, "no build 'b' was measured: valid are a"),
        (
            ["score_ms_p99<=40"],
            {"workload": "ranks"},
            "no workload 'ranks' with request times was measured: did you mean 'rank'",
        ),
        (["score_ms_p99@z<=40"], {}, "no target 'z' was measured"),
        (["tpot_ms_p50<=40"], {}, "nothing that replicas help with"),
        (["score_ms_p999<=40"], {}, "nothing to plan with: a: 100 requests are too few"),
    ],
)
def test_what_is_asked_wrongly_is_refused(tmp_path, limits, options, why):
    file = measurement(tmp_path / "m.json", entry("a", target="x", workloads={"rank": loads()}))
    with pytest.raises(InputError, match=why):
        planned(file, *limits, **options)


def test_measurements_without_request_times_are_refused(tmp_path):
    file = measurement(tmp_path / "m.json", entry("a", workloads={"rank": loads(scenario="offline")}))
    with pytest.raises(InputError, match="of scenario single-stream or server: measure one"):
        planned(file, "score_ms_p99<=40")
