"""Known service times give known metrics; candidates interleave; percentiles and intervals are what numpy says."""

import numpy as np
import pytest

from slmdeploy.profiling.measure import (
    affordable,
    bootstrap,
    cpu_ticks,
    measure,
    percentile,
    spread,
    steal_share,
    summarise,
    turns,
)
from slmdeploy.profiling.worker import FakeSession, answer
from slmdeploy.specs import Workload

GENERATE = Workload(name="g", task="generate", prompt_tokens=8, new_tokens=5, requests=10)
SCORE = Workload(name="s", task="score", prefix_tokens=8, items=4, item_tokens=2, requests=10)


class Local:
    """A client without a process; writes who was asked what into a shared log."""

    def __init__(self, session, log=None, name=""):
        self.session, self.log, self.name = session, log if log is not None else [], name

    def ask(self, op, **fields):
        self.log.append((self.name, op))
        return answer(self.session, {"op": op, **fields}, self.session.clock)


def run(workload, **sessions):
    clients = {name: Local(session) for name, session in sessions.items()}
    return measure(clients, workload, vocab_size=64, rounds=5, seconds=100.0, seed=0)


def test_single_stream_generate():
    outcome = run(GENERATE, a=FakeSession(prefill_s=0.05, step_s=0.002))["a"]
    for percent in (50, 90, 99):
        assert outcome.metrics[f"ttft_ms_p{percent}"] == pytest.approx(50)
        assert outcome.metrics[f"tpot_ms_p{percent}"] == pytest.approx(2)
        assert outcome.metrics[f"itl_ms_p{percent}"] == pytest.approx(2)
        assert outcome.metrics[f"e2e_ms_p{percent}"] == pytest.approx(58)
    assert outcome.intervals["ttft_ms_p50"] == pytest.approx((50, 50))
    assert outcome.requests == 10
    assert not outcome.noisy


def test_one_new_token_has_no_time_per_output_token():
    one = GENERATE.model_copy(update={"new_tokens": 1})
    metrics = run(one, a=FakeSession())["a"].metrics
    assert "tpot_ms_p50" not in metrics
    assert metrics["ttft_ms_p50"] == metrics["e2e_ms_p50"]


def test_single_stream_score():
    outcomes = run(SCORE, a=FakeSession(item_s=0.003), b=FakeSession(item_s=0.006))
    assert outcomes["a"].metrics["score_ms_p50"] == pytest.approx(12)
    assert outcomes["b"].metrics["score_ms_p99"] == pytest.approx(24)
    assert set(outcomes["a"].metrics) == {"score_ms_p50", "score_ms_p90", "score_ms_p99"}


def test_offline_gives_throughput_only():
    session = FakeSession(prefill_s=0.05, step_s=0.01, item_s=0.005)
    metrics = run(GENERATE.model_copy(update={"scenario": "offline"}), a=session)["a"].metrics
    assert metrics == {"tokens_per_s": pytest.approx(5 / 0.09)}
    assert run(SCORE.model_copy(update={"scenario": "offline"}), a=session)["a"].metrics == {
        "items_per_s": pytest.approx(200)
    }


def test_candidates_interleave_and_each_turn_opens_with_a_request_that_does_not_count():
    log = []
    clients = {name: Local(FakeSession(), log, name) for name in "ABC"}
    done = []
    score = SCORE.model_copy(update={"requests": 2})
    measure(clients, score, vocab_size=64, rounds=2, seconds=1.0, seed=0, done=done.append)
    assert log[:6] == [(name, "offline") for name in "AABBCC"]
    assert log[6:] == [(name, op) for name in "ABCABC" for op in ("offline", "score")]
    assert done == list("ABCABC")


def test_warm_up_shares_no_request_with_the_measurement():
    session = FakeSession()
    measure({"a": Local(session)}, GENERATE, vocab_size=64, rounds=5, seconds=100.0, seed=0)
    assert len(set(session.seen)) == len(session.seen) == 2 + 5 + 10


def test_a_slow_candidate_runs_fewer_of_the_same_requests():
    slow, fast = FakeSession(item_s=1.0), FakeSession(item_s=0.01)
    outcomes = measure(
        {"slow": Local(slow), "fast": Local(fast)},
        SCORE.model_copy(update={"requests": 40}),
        vocab_size=64,
        rounds=4,
        seconds=1.2,
        seed=0,
    )
    assert (outcomes["slow"].requests, outcomes["fast"].requests) == (4, 30)
    assert set(slow.seen) < set(fast.seen)


@pytest.mark.parametrize(
    ("request_ms", "wanted", "expected"), [(1000, 20, 5), (100, 20, 10), (1, 20, 20), (1000, 3, 3), (0, 20, 20)]
)
def test_affordable(request_ms, wanted, expected):
    assert affordable(request_ms, wanted, rounds=5, seconds=1.0) == expected


def test_turns_cover_every_request_once_in_order():
    seen = {"a": [], "b": []}
    for _, name, turn in turns(["a", "b"], {"a": 7, "b": 3}, 5):
        seen[name].extend(range(turn.start, turn.stop))
    assert seen == {"a": list(range(7)), "b": list(range(3))}


def test_percentile_spread_and_noise():
    values = np.random.default_rng(0).normal(100, 30, 200)
    assert percentile(values, 99) == np.percentile(values, 99)
    assert spread([1, 1, 1]) == 0
    replies = [{"ms": float(value), "label_logits": []} for value in values]
    assert summarise(SCORE, replies, 200).noisy
    assert not summarise(SCORE, [{"ms": 5.0 + 0.01 * index} for index in range(10)], 10).noisy


def test_bootstrap_of_a_mean_agrees_with_theory_and_is_seeded():
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = bootstrap(values, lambda drawn: drawn.mean(-1), 0)
    error = values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.3 * error)
    assert bootstrap(values, lambda drawn: drawn.mean(-1), 0) == (low, high)


def test_bootstrap_in_blocks_keeps_columns_together():
    pairs = np.stack([np.arange(1.0, 3001.0), 2 * np.arange(1.0, 3001.0)], 1)
    interval = bootstrap(pairs, lambda drawn: drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1), 0)
    assert interval == pytest.approx((0.5, 0.5))


def test_steal(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  10 0 10 80 0 0 0 5 0 0\ncpu0 1 2 3\n")
    before = cpu_ticks(stat)
    stat.write_text("cpu  20 0 20 150 0 0 0 15 0 0\n")
    assert steal_share(before, cpu_ticks(stat)) == pytest.approx(0.1)
    assert cpu_ticks(tmp_path / "missing") is None
    assert steal_share(None, None) is None
