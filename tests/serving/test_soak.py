"""A short soak: mixed and hostile requests leave no slot taken and no answer wrong; memory is flat in the long one."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import soak as benchmark
from benchmarks.servers.greedy import Greedy
from benchmarks.servers.mixed import NEW_TOKENS, Soak

ROOT = Path(__file__).parents[2]


def test_mixed_and_hostile_requests_leave_nothing_behind(url: str, decoder: Path) -> None:
    judge = Greedy(decoder)
    soak = Soak(url, lambda prompt, text, whole: judge.accepts(prompt, text, NEW_TOKENS, whole), long_words=200)
    soak.learn(scores=True)
    assert soak.scores is not None
    assert len(soak.scores) == 3
    soak.run(56, clients=4, seed=0)
    assert soak.problems == []
    assert len(soak.asked) == 11
    assert soak.calm() == {"running": 0.0, "queued": 0.0, "kv_tokens_used": 0.0}


def test_a_wrong_answer_would_be_seen(url: str) -> None:
    soak = Soak(url, lambda prompt, text, whole: False, long_words=200)
    soak.learn(scores=True)
    soak.scores = [9.0, 9.0, 9.0]
    soak.run(12, clients=2, seed=1)
    assert {"left: the answer is wrong", "score: the answer is wrong"} <= set(soak.problems)


def test_what_was_held_opened_and_grown_is_a_problem_each() -> None:
    soak = Soak("http://127.0.0.1:1", lambda *_: True)
    flat = [(float(second), 100_000_000) for second in range(50)]
    calm = {"running": 0.0, "queued": 0.0}
    assert benchmark.judged(soak, benchmark.Ended(flat, (9, 9), calm, 1.0))[1] == []
    leaking = [(second, size + int(second * 1e6)) for second, size in flat]
    growth, problems = benchmark.judged(soak, benchmark.Ended(leaking, (9, 12), calm | {"running": 2.0}, 1.0))
    assert growth.slope_bytes_per_s == pytest.approx(1e6)
    assert [problem.split()[0] for problem in problems] == ["memory", "12", "running"]


def test_results_say_where_and_whether_it_passed() -> None:
    soak = Soak("http://127.0.0.1:1", lambda *_: True, problems=["score: the answer is wrong"])
    flat = [(float(second), 100_000_000) for second in range(500)]
    ended = benchmark.Ended(flat, (9, 9), {"running": 0.0}, 8.3)
    results = benchmark.results_of(soak, ended, "int4", Namespace(threads=1, clients=8))
    assert results["passed"] is False
    assert results["problems"] == ["score: the answer is wrong"]
    assert len(results["memory_bytes"]) <= 60
    assert {"made", "commit", "machine", "uncommitted_changes"} <= set(results)
    json.dumps(results, allow_nan=False)


@pytest.mark.slow
def test_a_thousand_requests_and_memory_is_flat(decoder: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", str(decoder), "--threads", "1", "--every", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["requests"] == 1000
    assert report["passed"] is True
