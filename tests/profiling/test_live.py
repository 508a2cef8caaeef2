"""verify-budget: a live server passes or fails by the rules of select, and what it cannot show is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slmdeploy.cli import app
from slmdeploy.errors import InfeasibleError, InputError, SpecError
from slmdeploy.profiling.live import verify_budget
from slmdeploy.profiling.live_http import Server
from slmdeploy.profiling.measure import Effort
from slmdeploy.specs import Workload, parse_budget
from tests.profiling.live_server import Script, line, serving, word_tokenizer

QUICK = Effort(rounds=2, seconds=1.0, limit_s=0.2, precision=0.05)
CHAT = Workload(name="chat", task="generate", prompt_tokens=8, new_tokens=3, requests=8)
LOADED = Workload(
    name="loaded", task="generate", scenario="server", rate_per_s=40.0, prompt_tokens=8, new_tokens=3, requests=40
)
RANK = Workload(name="rank", task="score", prefix_tokens=8, items=2, item_tokens=3, requests=8)
FAR = 1e9


def verified(script: Script, *limits: str, workloads: Any = (CHAT,), **options: Any) -> Any:
    """The report on a scripted server."""
    with serving(script) as url:
        return verify_budget(Server.at(url), workloads=workloads, budget=parse_budget(*limits), effort=QUICK, **options)


def test_a_server_within_every_limit_passes() -> None:
    report = verified(
        Script(), f"ttft_ms_p50<={FAR}", f"loaded:tpot_ms_p50<={FAR}", "requests_per_s>=0", workloads=(CHAT, LOADED)
    )
    assert report.passed
    assert [one.result for one in report.verdicts] == ["met"] * 3
    assert report.model == "tiny"
    assert report.failures == ()
    assert report.to_dict()["passed"] is True
    assert report.workloads["loaded"]["metrics"]["requests_per_s"] > 0
    assert "queue_ms_p50" not in report.workloads["loaded"]["metrics"]


def test_a_limit_is_held_against_the_unfavourable_end_of_its_interval() -> None:
    report = verified(Script(), "ttft_ms_p50<=1e-6", f"e2e_ms_p50<={FAR}")
    assert not report.passed
    missed, met = report.verdicts
    assert (missed.result, met.result) == ("missed", "met")
    assert missed.end >= missed.value > 0
    assert "ttft_ms_p50 <= 1e-06 is missed" in report.reasons[0]
    low, high = report.workloads["chat"]["intervals"]["ttft_ms_p50"]
    assert missed.end == max(high, missed.value) >= low


def test_refused_requests_fail_whatever_the_latencies_are() -> None:
    report = verified(Script(status=429, status_from=4), f"e2e_ms_p50<={FAR}")
    assert not report.passed
    assert report.verdicts[0].result == "met"
    assert "got no answer, the first because /v1/completions answered 429" in report.reasons[0]
    assert len(report.failures) == 1


def test_what_a_server_does_not_show_is_not_checked() -> None:
    report = verified(
        Script(),
        f"ttft_ms_p50<={FAR}",
        "auc>=0.9",
        "tpot_ms_p50_ratio<=0.5",
        "queue_ms_p50<=1",
        "e2e_ms_p50@elsewhere<=1",
    )
    assert report.passed
    reasons = {one.constraint.split()[0]: one.reason for one in report.unchecked}
    assert set(reasons) == {"auc", "tpot_ms_p50_ratio", "queue_ms_p50", "e2e_ms_p50@elsewhere"}
    assert "select checks it" in reasons["auc"]
    there = verified(Script(), "e2e_ms_p50@elsewhere<=1e-6", target="elsewhere")
    assert not there.passed


def test_times_between_tokens_are_unknown_where_an_event_has_several() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    token = {"choices": [{"text": "abc", "finish_reason": None}]}
    report = verified(
        Script([line(token), line(token), line(usage), b"data: [DONE]\n\n"]),
        f"itl_ms_p50<={FAR}",
        f"tpot_ms_p50<={FAR}",
    )
    assert [one.result for one in report.verdicts] == ["not measured", "met"]
    assert not report.passed


def test_scoring_needs_a_tokenizer_and_then_texts_are_sent(tmp_path: Path) -> None:
    script = Script()
    report = verified(script, f"score_ms_p50<={FAR}", workloads=(RANK,), tokenizer=word_tokenizer(tmp_path))
    assert report.passed
    assert {path for path, _ in script.seen} == {"/score"}
    assert all(len(body["items"]) == 2 for _, body in script.seen)
    with pytest.raises(InputError, match="--tokenizer"):
        verified(Script(), f"score_ms_p50<={FAR}", workloads=(RANK,))


def test_budgets_that_say_nothing_of_a_server_are_refused() -> None:
    with pytest.raises(InputError, match="no limit of this budget can be checked at a server"):
        verified(Script(), "auc>=0.9")
    with pytest.raises(SpecError, match="there is no metric 'ttft_ms_p5'"):
        verified(Script(), "ttft_ms_p5<=1")
    with pytest.raises(SpecError, match="no workload 'chatt' was measured"):
        verified(Script(), "chatt:ttft_ms_p50<=1")


RECIPE = """
name = "r"
tasks = ["generate"]
[model]
teacher = "none"
[data]
source = "stdlib"
[candidates]
profiles = ["cpu-fp32"]
[[workload]]
name = "chat"
task = "generate"
prompt_tokens = 8
new_tokens = 3
requests = 8
[budget]
constraints = ["ttft_ms_p50 <= LIMIT"]
"""


def test_the_command_prints_the_report_and_ends_as_select_does(tmp_path: Path) -> None:
    for limit, passes in (("1e9", True), ("1e-6", False)):
        (tmp_path / "r.toml").write_text(RECIPE.replace("LIMIT", limit))
        with serving(Script()) as url:
            options = ["--recipe", str(tmp_path / "r.toml"), "--limit", "0.2"]
            done = CliRunner().invoke(app, ["verify-budget", url, *options, "--json"])
            shown = CliRunner().invoke(app, ["verify-budget", url, *options])
        assert json.loads(done.stdout.splitlines()[-1])["passed"] is passes
        assert shown.stdout.startswith("passed: tiny at http" if passes else "failed: tiny at http")
        assert f"  {'met' if passes else 'missed'}: ttft_ms_p50 <= " in shown.stdout
        assert (type(done.exception) is InfeasibleError) is not passes
        if not passes:
            assert str(done.exception).startswith("the server does not keep the budget: ttft_ms_p50 <= 1e-06 is missed")
