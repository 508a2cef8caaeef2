"""Known service times give known metrics; candidates interleave; measuring ends when figures are certain."""

import numpy as np
import pytest

from slmdeploy.profiling import measure as module
from slmdeploy.profiling.journal import Journal
from slmdeploy.profiling.measure import Effort, Runner, is_narrow, measure, watched_percentiles
from slmdeploy.profiling.worker import FakeSession
from slmdeploy.specs import Workload
from tests.profiling.fakes import QUICK, Local, run

GENERATE = Workload(name="g", task="generate", prompt_tokens=8, new_tokens=5, requests=200)
SCORE = Workload(name="s", task="score", prefix_tokens=8, items=4, item_tokens=2, requests=200)


class Wavering(FakeSession):
    """Service times that differ from request to request."""

    def __init__(self, scale, **options):
        super().__init__(**options)
        self.generator, self.scale = np.random.default_rng(0), scale

    def score_ids(self, prefix_ids, item_ids):
        self.now += self.generator.exponential(self.scale)
        return super().score_ids(prefix_ids, item_ids)


def test_single_stream_generate():
    outcome = run(GENERATE, a=FakeSession(prefill_s=0.05, step_s=0.002))[0]["a"]
    for label in ("p50", "p90"):
        assert outcome.metrics[f"ttft_ms_{label}"] == pytest.approx(50, rel=1e-4)
        assert outcome.metrics[f"tpot_ms_{label}"] == pytest.approx(2, rel=1e-4)
        assert outcome.metrics[f"e2e_ms_{label}"] == pytest.approx(58, rel=1e-4)
    assert outcome.metrics["itl_ms_p50"] == pytest.approx(2, rel=1e-4)
    assert outcome.intervals["ttft_ms_p50"] == pytest.approx((50, 50), rel=1e-4)
    assert outcome.settled
    assert not outcome.noisy
    assert "queue_ms_p50" not in outcome.metrics
    assert "requests_per_s" not in outcome.metrics


def test_a_percentile_needs_a_request_beyond_it():
    metrics = run(GENERATE, a=FakeSession(prefill_s=0.05, step_s=0.002))[0]["a"].metrics
    assert "ttft_ms_p90" in metrics
    assert "ttft_ms_p999" not in metrics
    many = run(SCORE.model_copy(update={"requests": 2000}), a=FakeSession(item_s=1e-4), effort=QUICK)[0]["a"]
    assert many.requests >= 1000
    assert many.metrics["score_ms_p999"] == pytest.approx(0.4, rel=1e-4)


def test_one_new_token_has_no_time_per_output_token():
    metrics = run(GENERATE.model_copy(update={"new_tokens": 1}), a=FakeSession())[0]["a"].metrics
    assert "tpot_ms_p50" not in metrics
    assert metrics["ttft_ms_p50"] == metrics["e2e_ms_p50"]


def test_offline_gives_throughput_and_no_latency():
    offline = SCORE.model_copy(update={"scenario": "offline"})
    outcome = run(offline, a=FakeSession(item_s=0.005))[0]["a"]
    assert outcome.metrics["items_per_s"] == pytest.approx(200)
    assert outcome.metrics["requests_per_s"] == pytest.approx(50)
    assert outcome.intervals["items_per_s"] == pytest.approx((200, 200))
    assert not any(name.endswith("_ms_p50") for name in outcome.metrics)


def test_a_server_workload_counts_the_wait_and_the_goodput():
    server = SCORE.model_copy(update={"scenario": "server", "rate_per_s": 40.0, "goodput": {"score_ms": 25.0}})
    effort = Effort(rounds=4, seconds=5.0, limit_s=20.0)
    outcome = run(server, a=FakeSession(item_s=0.005), effort=effort)[0]["a"]  # 20 ms of service at a load of 0.8
    metrics = outcome.metrics
    assert metrics["queue_ms_p50"] > 0
    assert metrics["score_ms_p50"] == pytest.approx(metrics["queue_ms_p50"] + 20, rel=0.2)
    assert 0 < metrics["goodput_per_s"] < metrics["requests_per_s"] < 50
    assert outcome.unanswered == 0


def test_who_cannot_keep_up_is_ended_and_says_what_was_not_answered():
    server = SCORE.model_copy(update={"scenario": "server", "rate_per_s": 1000.0})
    outcome = run(server, a=FakeSession(item_s=0.05))[0]["a"]
    assert outcome.unanswered > outcome.requests / 2
    assert outcome.metrics["score_ms_p50"] > 200


def test_concurrent_clients_wait_for_each_other():
    concurrent = SCORE.model_copy(update={"scenario": "concurrent", "concurrency": 4})
    metrics = run(concurrent, a=FakeSession(item_s=0.005), effort=Effort(rounds=2, seconds=2.0))[0]["a"].metrics
    assert metrics["score_ms_p50"] == pytest.approx(80, rel=1e-3)
    assert metrics["requests_per_s"] == pytest.approx(50, rel=1e-2)


def test_hot_requests_share_their_prefix_and_cold_ones_do_not():
    for hot in (True, False):
        _, log = run(SCORE.model_copy(update={"hot": hot}), a=FakeSession())
        prefixes = {tuple(one["prefix_ids"]) for _, op, fields in log if op == "drive" for one in fields["requests"]}
        assert (len(prefixes) == 1) is hot


def test_candidates_interleave_and_each_turn_opens_with_a_request_that_does_not_count():
    found, log = run(SCORE, a=FakeSession(), b=FakeSession())
    sent = [(name, len(fields["requests"])) for name, op, fields in log if op == "drive"]
    assert [name for name, _ in sent[:4]] == ["a", "a", "b", "b"]  # warm-up, one by one
    assert [name for name, _ in sent[4:12]] == ["a", "a", "b", "b"] * 2
    assert [count for _, count in sent[4:12:2]] == [1, 1, 1, 1]
    assert found["a"].requests == sum(count for name, count in sent[5::2] if name == "a")


def test_no_request_comes_twice():
    _, log = run(SCORE, a=FakeSession())
    prefixes = [tuple(one["prefix_ids"]) for _, op, fields in log if op == "drive" for one in fields["requests"]]
    assert len(set(prefixes)) == len(prefixes)


def test_a_slow_candidate_runs_fewer_of_the_same_requests():
    found, _ = run(SCORE, fast=FakeSession(item_s=0.0005), slow=FakeSession(item_s=0.05))
    assert found["slow"].requests == 5  # one a round
    assert found["fast"].requests > 20


def test_what_is_not_certain_goes_on_until_it_is_or_time_is_up():
    patient = Effort(rounds=3, seconds=0.2, limit_s=60.0, precision=0.1)
    many = SCORE.model_copy(update={"requests": 5000})
    sizes = {"steady": 2.0, "wavering": 1.0}  # smaller, or the steady one would be all that is wanted
    found, _ = run(many, effort=patient, sizes=sizes, steady=FakeSession(item_s=0.001), wavering=Wavering(0.02))
    assert found["wavering"].settled
    assert found["wavering"].requests > 10 * 3
    assert is_narrow(found["wavering"].samples["score_ms"], 50.0, 0.1)
    hasty = Effort(rounds=3, seconds=0.2, limit_s=0.3, precision=0.01)
    assert not run(many, wavering=Wavering(0.02), effort=hasty)[0]["wavering"].settled


def test_the_watched_percentile_decides():
    patient = Effort(rounds=3, seconds=0.2, limit_s=60.0, precision=0.2)
    many = SCORE.model_copy(update={"requests": 5000})
    by_median = run(many, a=Wavering(0.01), effort=patient)[0]["a"].requests
    by_tail = run(many, a=Wavering(0.01), effort=patient, watch=["score_ms_p99"])[0]["a"]
    assert by_tail.requests > 3 * by_median
    assert by_tail.requests >= 500  # five beyond the 99th percentile


def test_who_is_beaten_in_speed_and_size_is_learned_no_more_about():
    effort = Effort(rounds=3, seconds=0.1, limit_s=2.0, precision=0.001)
    many = SCORE.model_copy(update={"requests": 5000})
    sessions = {"small": Wavering(0.001), "large": Wavering(0.05)}
    found, _ = run(many, effort=effort, sizes={"small": 1.0, "large": 2.0}, **sessions)
    assert found["large"].requests < found["small"].requests / 4
    found, _ = run(many, effort=effort, sizes={"small": 2.0, "large": 1.0}, small=Wavering(0.001), large=Wavering(0.05))
    assert sum(found["large"].samples["service_ms"]) > 800  # the slower one is smaller, so it may be wanted


def test_a_round_from_which_time_was_stolen_is_run_again(monkeypatch):
    ticks = iter([[0] * 8, [0, 0, 0, 50, 0, 0, 0, 50]] + [[0] * 8, [0, 0, 0, 100, 0, 0, 0, 0]] * 100)
    monkeypatch.setattr(module, "cpu_ticks", lambda: next(ticks))
    found, _ = run(SCORE, a=FakeSession())
    assert found["a"].repeated == 1
    assert found["a"].steal == 0.0


def test_turns_of_an_interrupted_run_are_not_run_again(tmp_path):
    with Journal(tmp_path / "j", "key") as journal:
        first, log = run(SCORE, a=FakeSession(), journal=journal)
    with Journal(tmp_path / "j", "key") as journal:
        again, shorter = run(SCORE, a=FakeSession(), journal=journal)
    assert again["a"].metrics == first["a"].metrics
    assert len(shorter) == 2 < len(log)  # the warm-up alone


def test_watched_percentiles_are_those_of_the_workload():
    assert watched_percentiles([], GENERATE) == [("e2e_ms", 50.0)]
    names = ["ttft_ms_p99", "tpot_ms_p50_ratio", "score_ms_p99", "auc", "other:e2e_ms_p90", "g:itl_ms_p999"]
    assert watched_percentiles(names, GENERATE) == [("ttft_ms", 99.0), ("tpot_ms", 50.0), ("itl_ms", 99.9)]
    assert watched_percentiles(["queue_ms_p99"], SCORE) == [("score_ms", 50.0)]


def test_the_batch_that_was_found_is_taken_where_many_wait_and_nowhere_else():
    for scenario, expected in (("offline", 4), ("single-stream", 1)):
        log = []
        runner = Runner("a", Local(FakeSession(), log, "a"), batch=4)
        measure([runner], GENERATE.model_copy(update={"scenario": scenario}), vocab_size=64, effort=QUICK, seed=0)
        assert max(fields["batch"] for _, op, fields in log if op == "drive") == expected
