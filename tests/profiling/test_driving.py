"""Latencies of known queues: a session of fixed service time under Poisson arrivals is an M/D/1 queue."""

import numpy as np
import pytest

from slmdeploy.profiling.arrivals import Clients, Scheduled, poisson
from slmdeploy.profiling.driving import drive
from slmdeploy.profiling.worker import FakeSession, answer_together


def run(source, session, **options):
    return drive(
        source,
        lambda together: answer_together(session, together, session.clock),
        clock=session.clock,
        sleep=session.sleep,
        **options,
    )


def score(items):
    return {"op": "score", "prefix_ids": [1], "item_ids": [[2]] * items}


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_an_m_d_1_queue_waits_as_long_as_pollaczek_and_khinchine_say(load):
    service, n = 0.01, 30_000
    arrivals = poisson(load / service, n, [7])
    records = run(Scheduled(arrivals, [score(1)] * n), FakeSession(item_s=service))
    waits = np.array([record["begin_s"] - record["arrival_s"] for record in records])
    # Mean wait of M/D/1: rho * service / (2 * (1 - rho)).
    assert waits.mean() == pytest.approx(load * service / (2 * (1 - load)), rel=0.08)
    assert (waits < 1e-9).mean() == pytest.approx(1 - load, abs=0.02)  # arrivals that find nobody (PASTA)
    served = np.array([record["end_s"] - record["begin_s"] for record in records])
    assert served == pytest.approx(np.full(n, service))


def test_a_stall_is_charged_to_everyone_who_waited_for_it():
    class Stalling(FakeSession):
        def score_ids(self, prefix_ids, item_ids):
            self.now += 1.0 if not self.seen else 0.0
            return super().score_ids(prefix_ids, item_ids)

    records = run(Scheduled([0.0, 0.1, 0.2, 0.3], [score(1)] * 4), Stalling(item_s=0.01))
    latencies = [record["end_s"] - record["arrival_s"] for record in records]
    # A load generator that waited for each answer would have seen one slow request and three fast ones.
    assert latencies == pytest.approx([1.01, 0.92, 0.83, 0.74])


def test_clients_in_a_closed_loop_share_one_session():
    records = run(Clients([score(1)] * 12, 4), FakeSession(item_s=0.01))
    assert [record["end_s"] - record["arrival_s"] for record in records[4:]] == pytest.approx([0.04] * 8)
    assert records[-1]["end_s"] == pytest.approx(0.12)


def test_what_waits_when_time_is_up_is_recorded_as_unanswered():
    records = run(Scheduled([0.0] * 10, [score(1)] * 10), FakeSession(item_s=1.0), limit_s=2.5)
    assert [bool(record.get("unanswered")) for record in records] == [False] * 3 + [True] * 7
    assert records[-1]["end_s"] == pytest.approx(3.0)


def test_encoded_rows_are_batched_and_finish_together():
    session = FakeSession(item_s=0.01)
    requests = [{"op": "encode", "rows": [[n]]} for n in range(4)]
    records = run(Scheduled([0.0] * 4, requests), session, batch=3)
    assert [record["end_s"] for record in records] == pytest.approx([0.03, 0.03, 0.03, 0.04])


def test_generations_are_batched_where_the_session_can():
    class Batching(FakeSession):
        def stream_batch_ids(self, prompts, *, slots, max_new_tokens, ignore_eos):
            for token in range(max_new_tokens):
                self.now += 0.1
                for row in range(len(prompts)):
                    yield row, token

    requests = [{"op": "generate", "prompt_ids": [1], "new_tokens": new} for new in (2, 3)]
    together = run(Scheduled([0.0, 0.0], requests), Batching(), batch=2)
    assert [len(record["stamps_ms"]) for record in together] == [2, 3]
    assert [record["end_s"] for record in together] == pytest.approx([0.2, 0.3])
    alone = run(Scheduled([0.0, 0.0], requests), FakeSession(prefill_s=0.1, step_s=0.1), batch=2)
    assert [record["end_s"] for record in alone] == pytest.approx([0.2, 0.5])
