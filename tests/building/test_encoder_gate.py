"""encoder_gate.py: figures of known outputs, gates at their limits, faults of padding, and speed on a fake clock."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from slmdeploy.building import encoder_gate
from slmdeploy.building.encoder_gate import (
    EncoderComparison,
    Quality,
    cosine,
    judge,
    largest_difference,
    parity_gate,
    random_row,
    speed_gate,
)
from slmdeploy.runtime.encoder_config import Embedding, EncoderConfig, Labels
from slmdeploy.runtime.encoding import Row
from slmdeploy.specs import Gate

ROWS = [Row((1, 2), (0, 0)), Row((3,), (0,)), Row((4, 5, 6), (0, 0, 0))]
EMBEDDING = Embedding(2, "mean", normalized=False, prompts={}, default_prompt=None)


def config(labels: int = 0) -> EncoderConfig:
    return EncoderConfig(
        tasks=("classify",) if labels else ("embed",),
        inputs=("input_ids", "attention_mask", "token_type_ids"),
        vocab_size=50,
        max_length=16,
        pad_token_id=1,
        embedding=None if labels else EMBEDDING,
        labels=Labels(tuple(map(str, range(labels))), per_token=False, activation="softmax") if labels else None,
        threads=1,
        spinning=False,
        precision="fp32",
    )


class Fake:
    """Answers with the given arrays, or with one number per row that its tokens add up to."""

    def __init__(self, answers: Sequence[Sequence[float]] = (), *, leaks: bool = False, seconds: float = 0.0) -> None:
        self.answers = [np.array(answer, np.float32) for answer in answers]
        self.leaks, self.seconds = leaks, seconds

    def rows(self, rows: Sequence[Row], name: str) -> list[NDArray[np.float32]]:
        Clock.now += self.seconds * len(rows)
        if self.answers:
            return self.answers
        places = max(len(row.ids) for row in rows) if self.leaks else 0
        return [np.array([sum(row.ids) + places, 1], np.float32) for row in rows]


class Clock:
    now = 0.0


def test_cosines_of_vectors() -> None:
    reference = EncoderComparison(Fake([[1, 0], [0, 2], [3, 4]]), ROWS, "sentence_embedding")
    found = reference.quality(Fake([[2, 0], [0, 1], [4, 3]]))
    assert (found.rows, found.min_cosine, found.logit_difference) == (3, pytest.approx(0.96), None)
    assert found.mean_cosine == pytest.approx((1 + 1 + 0.96) / 3)
    assert found.loss == pytest.approx(0.04 / 3)
    zero, one = np.zeros(2, np.float32), np.ones(2, np.float32)
    assert (cosine(zero, zero), cosine(zero, one)) == (1.0, 0.0)


def test_labels_and_logits() -> None:
    reference = EncoderComparison(Fake([[2, 0], [0, 4], [1, 0]]), ROWS, "logits")
    found = reference.quality(Fake([[1, 0], [0, 4], [0, 0.5]]))
    assert found.label_agreement == pytest.approx(2 / 3)
    assert found.logit_difference == found.loss == pytest.approx(1 / 4)
    one_label = EncoderComparison(Fake([[0.5], [-0.5], [0.1]]), ROWS, "logits")
    assert one_label.quality(Fake([[0.4], [-0.1], [-0.1]])).label_agreement == pytest.approx(2 / 3)


def test_gates_hold_at_their_limits_and_never_for_what_is_no_number() -> None:
    limits = Gate(min_cosine=0.9, max_logit_difference=0.1, min_top1=0.5)
    assert {name: gate["passed"] for name, gate in judge(Quality(1, 0.9, 0.95), limits).items()} == {"min_cosine": True}
    gates = judge(Quality(1, logit_difference=0.2, label_agreement=0.5), limits)
    assert {name: gate["passed"] for name, gate in gates.items()} == {
        "label_agreement": True,
        "logit_difference": False,
    }
    broken = judge(Quality(1, float("nan"), float("nan")), limits)["min_cosine"]
    assert not broken["passed"]
    assert broken["value"] is None
    assert Quality(1, float("nan"), float("nan")).loss == float("inf")


def test_a_batch_that_changes_with_its_padding_fails_parity() -> None:
    rungs, gate = parity_gate(Fake(), config())
    assert gate["passed"]
    assert [rung["name"] for rung in rungs] == [
        "padded batch: last_hidden_state",
        "padded batch: sentence_embedding",
    ]
    assert not parity_gate(Fake(leaks=True), config(labels=2))[1]["passed"]
    assert largest_difference(Fake(), Fake(leaks=True), config()) > 0.02


def test_speed_is_a_ratio_of_medians_and_one_of_the_two_has_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_gate.time, "perf_counter", lambda: Clock.now)
    ratios, gate = speed_gate(Fake(seconds=2.0), Fake(seconds=1.0), config())
    assert ratios == {"single_ratio": pytest.approx(0.5), "batch_ratio": pytest.approx(0.5)}
    assert gate["passed"]
    assert not speed_gate(Fake(seconds=1.0), Fake(seconds=1.0), config())[1]["passed"]


def test_random_rows_have_no_padding_and_both_types() -> None:
    row = random_row(np.random.default_rng(0), 16, config())
    assert 1 not in row.ids
    assert set(row.types) == {0, 1}
    assert max(row.ids) < 50
