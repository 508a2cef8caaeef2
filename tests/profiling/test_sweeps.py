"""Curves have the points that they should, at the loads and sizes that they say."""

import pytest

from slmdeploy.profiling.measure import Runner
from slmdeploy.profiling.sweeps import LOADS, item_counts, points, sweep
from slmdeploy.profiling.worker import FakeSession
from slmdeploy.specs import Workload
from tests.profiling.fakes import Local, run

SCORE = Workload(name="s", task="score", prefix_tokens=4, items=32, item_tokens=2, sweep=True)


def swept(workload: Workload, session: FakeSession):
    outcome = run(workload, a=session)[0]["a"]
    steps: list[str] = []
    sweep(Runner("a", Local(session)), workload, outcome, vocab_size=64, seed=0, done=steps.append)
    assert len(steps) == points(workload)
    return outcome


def test_latency_grows_with_the_number_of_items() -> None:
    outcome = swept(SCORE, FakeSession(item_s=0.001))
    assert item_counts(SCORE) == [1, 4, 16, 32]
    assert [point["items"] for point in outcome.items_curve] == [1, 4, 16, 32]
    times = [point["metrics"]["score_ms_p50"] for point in outcome.items_curve]
    assert times == pytest.approx([1, 4, 16, 32], rel=1e-3)
    assert outcome.curve == []


def test_latency_grows_with_the_load_of_the_candidate_itself() -> None:
    server = SCORE.model_copy(update={"items": 10, "scenario": "server", "rate_per_s": 5.0})
    outcome = swept(server, FakeSession(item_s=0.001))
    assert [point["rate_per_s"] for point in outcome.curve] == pytest.approx([100 * share for share in LOADS], rel=0.01)
    tails = [point["metrics"]["score_ms_p90"] for point in outcome.curve]
    assert tails[0] < tails[-1]
    assert all(point["unanswered"] == 0 for point in outcome.curve)


def test_no_sweep_no_points() -> None:
    assert points(SCORE.model_copy(update={"sweep": False})) == 0
