"""verify-budget against the real server: a token an event, and scores are asked for as texts."""

from pathlib import Path

from slmdeploy.profiling.live import verify_budget
from slmdeploy.profiling.live_http import Server
from slmdeploy.profiling.measure import Effort
from slmdeploy.specs import Workload, parse_budget

QUICK = Effort(rounds=2, seconds=0.1, limit_s=0.2, precision=0.05)
CHAT = Workload(name="chat", task="generate", prompt_tokens=8, new_tokens=6, requests=6)
LOADED = Workload(
    name="loaded", task="generate", scenario="concurrent", concurrency=3, prompt_tokens=8, new_tokens=6, requests=9
)
RANK = Workload(name="rank", task="score", prefix_tokens=8, items=3, item_tokens=2, requests=6)


def test_the_server_keeps_a_wide_budget_and_misses_a_narrow_one(url: str, decoder: Path) -> None:
    wide = ("ttft_ms_p50<=1e6", "itl_ms_p50<=1e6", "loaded:e2e_ms_p50<=1e6", "rank:score_ms_p50<=1e6")
    report = verify_budget(
        Server.at(url),
        workloads=(CHAT, LOADED, RANK),
        budget=parse_budget(*wide, "chat:tpot_ms_p50<=1e-6"),
        tokenizer=decoder,
        effort=QUICK,
    )
    assert [one.result for one in report.verdicts] == ["met"] * 4 + ["missed"]
    assert report.failures == ()
    assert not report.passed
    assert report.workloads["loaded"]["unanswered"] == 0
