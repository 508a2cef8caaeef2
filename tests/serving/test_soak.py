"""A short soak: mixed and hostile requests leave no slot taken and no answer wrong; memory is flat in the long one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import Soak

ROOT = Path(__file__).parents[2]


def test_mixed_and_hostile_requests_leave_nothing_behind(url: str) -> None:
    soak = Soak(url, long_words=200)
    soak.learn(scores=True)
    assert all(not str(text).startswith("status") for text in soak.expected.values())
    soak.run(48, clients=4, seed=0)
    assert soak.problems == []
    assert len(soak.asked) == 10
    assert soak.calm() == {"running": 0.0, "queued": 0.0, "kv_tokens_used": 0.0}


def test_a_wrong_answer_would_be_seen(url: str) -> None:
    soak = Soak(url, long_words=200)
    soak.learn(scores=True)
    soak.expected |= {key: "nothing of the kind" for key in soak.expected if key != "scores"}
    soak.expected["scores"] = [9.0, 9.0, 9.0]
    soak.run(12, clients=2, seed=1)
    assert any("the answer is wrong" in problem for problem in soak.problems)


@pytest.mark.slow
def test_a_thousand_requests_and_memory_is_flat(decoder: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", str(decoder), "--requests", "1000", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["requests"] == 1000
    assert not any(report["held"].values())
