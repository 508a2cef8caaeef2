"""What `select` and `plan` print: the choice with its reasons, two side by side, fleets; exit codes and JSON."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slmdeploy.cli import app
from slmdeploy.errors import InfeasibleError
from slmdeploy.selection import fleets
from tests.selection.rows import entry, measurement

SCORE = {"task": "score", "scenario": "single-stream", "metrics": {}, "samples": {"score_ms": [10.0] * 100}}


def call(*arguments: str | Path) -> tuple[str, BaseException | None]:
    """What a command printed, and what it raised."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.stdout, done.exception


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    small = entry("small", metrics={"tpot_ms_p50": 4.0, "size_bytes": 10}, target="x86-64-avx2")
    quick = entry("[b]quick", metrics={"tpot_ms_p50": 2.0, "size_bytes": 20}, target="arm", source="estimated")
    return measurement(tmp_path / "m.json", small | {"workloads": {"rank": SCORE}}, quick)


def test_a_selection_is_printed_with_reasons_ties_and_front(measured: Path) -> None:
    printed, error = call("select", measured)
    assert error is None
    assert printed.splitlines()[:4] == [
        "selected: [b]quick on arm (estimated)",
        "  estimated, not measured: fastest of 2 feasible (tpot_ms_p50 2, size_bytes 20)",
        "rejected: small on x86-64-avx2",
        "  feasible, not the fastest: tpot_ms_p50 4, size_bytes 10",
    ]
    assert "Pareto front of tpot_ms_p50, size_bytes: [b]quick on arm, small on x86-64-avx2" in printed


def test_an_infeasible_one_says_what_would_admit_one_and_ends_with_3(measured: Path) -> None:
    printed, error = call("select", measured, "--budget", "tpot_ms_p50<=1.5", "--budget", "size_bytes<=12")
    assert isinstance(error, InfeasibleError)
    assert error.exit_code == 3
    assert "selected: none" in printed
    assert "feasible with all of these moved: size_bytes <= 12 → 20 ([b]quick on arm)" in printed
    assert "feasible with one of these alone moved: tpot_ms_p50 <= 1.5 → 4 (small on x86-64-avx2)" in printed


def test_preferences_prices_and_objective_reach_the_choice(tmp_path: Path) -> None:
    answered = {"requests_per_s": 10.0, "size_bytes": 1}
    rows = [entry("a", target=name, metrics=answered) for name in ("x", "y")]
    file = measurement(tmp_path / "m.json", *rows)
    options = ("--objective", "cheapest", "--price", "x=2", "--price", "y=1")
    printed, _ = call("select", file, *options)
    assert printed.startswith("selected: a on y")
    printed, _ = call("select", file, *options, "--prefer", "size_bytes@y<=0.5")
    assert printed.startswith("selected: a on x")


def test_a_what_if_is_shown_beside_what_was_asked(measured: Path) -> None:
    printed, error = call("select", measured, "--budget", "tpot_ms_p50<=1", "--what-if", "tpot_ms_p50=4")
    assert isinstance(error, InfeasibleError)
    (selected,) = [line for line in printed.splitlines() if line.startswith("selected")]
    assert [cell.strip() for cell in selected.split("│")] == ["selected", "none", "[b]quick on arm (estimated)"]


def test_json_has_both_selections(measured: Path) -> None:
    printed, _ = call("select", measured, "--budget", "tpot_ms_p50<=1", "--what-if", "tpot_ms_p50=4", "--json")
    found = json.loads(printed.splitlines()[-1])
    assert (found["chosen"], found["what_if"]["chosen"]) == (None, "[b]quick")


def test_a_plan_is_printed_with_size_headroom_and_cost(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "REQUESTS", 1000)
    arguments = ("plan", measured, "--rate", "6000/min", "--peak", "2", "--price", "x86-64-avx2=0.5")
    printed, error = call(*arguments, "--budget", "score_ms_p99<=60")
    assert error is None
    lines = printed.splitlines()
    assert lines[0] == "rank: 100 requests/s, 200 at the peak, planned for 240; score_ms_p99 <= 60"
    assert lines[1].endswith(" replicas: small on x86-64-avx2")
    assert "USD per million requests" in printed
    assert "left out: [b]quick on arm" in printed
    found = json.loads(call(*arguments, "--budget", "score_ms_p99<=60", "--json")[0].splitlines()[-1])
    assert lines[1].startswith(f"{found['fleets'][0]['replicas']} replicas")


def test_a_plan_that_no_number_holds_ends_with_3(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "REQUESTS", 1000)
    printed, error = call("plan", measured, "--rate", "1/s", "--budget", "score_ms_p99<=9")
    assert isinstance(error, InfeasibleError)
    assert "none: small on x86-64-avx2" in printed
    assert "no number of replicas helps" in printed
