"""ladder.py on a toy model whose every mistake can be switched on: the rung that should fail fails, and no other."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from slmdeploy.building.ladder import SELF_LIMIT, Alone, Rung, climb

VOCAB, LABELS = 11, (2, 7)
Floats = NDArray[np.float32]


class Toy:
    """Logits depend on the tokens so far and their number; `broken` names the way in which they go wrong."""

    def __init__(self, broken: str = "nothing", scale: float = 1.0, error: float = 0.5) -> None:
        self.broken, self.scale, self.error = broken, scale, error
        self.ids: list[int] = []

    def row(self, ids: Sequence[int], how: str) -> Floats:
        row = self.scale * np.cos(np.arange(VOCAB) + np.cumsum(ids)[-1] + len(ids)).astype(np.float32)
        return row + np.float32(self.error) if how == self.broken else row

    def logits(self, input_ids: Sequence[int]) -> Floats:
        return np.stack([self.row(input_ids[: i + 1], "logits") for i in range(len(input_ids))])

    def prefill(self, input_ids: Sequence[int]) -> Floats:
        self.ids = list(input_ids)
        return self.row(self.ids, "prefill")

    def decode(self, token: int) -> Floats:
        self.ids.append(token)
        return self.row(self.ids, "decode")

    def batch_logits(self, rows: Sequence[Sequence[int]]) -> list[Floats]:
        return [self.row(row, "batch") for row in rows]

    def batch_decode(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Floats]:
        pairs = zip(prompts, continuations, strict=True)
        return [
            np.stack([self.row([*prompt, *tokens[:n]], "together") for n in range(len(tokens) + 1)])
            for prompt, tokens in pairs
        ]

    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> Floats:
        return np.stack([self.row([*prefix_ids, *item], "score")[list(LABELS)] for item in item_ids])


def ladder(
    candidate: Toy, *, max_length: int = 200, labels: Sequence[int] | None = LABELS, batches: bool = True
) -> list[Rung]:
    reference = Toy(scale=candidate.scale)
    limits = {"label_ids": labels, "batches": batches, "limit": 1e-4}
    return list(climb(reference, candidate, vocab_size=VOCAB, max_length=max_length, **limits))


def test_equal_models_pass_every_rung() -> None:
    rungs = ladder(Toy())
    assert [rung.name for rung in rungs] == [
        "all logits, length 1",
        "all logits, length 21",
        "prefill of 21",
        "64 decode steps",
        "right-padded batch of 5, 1, 17, 12",
        "maximum length 200",
        "decoded together behind 5, 1, 17, 12",
        "3 items packed, one by one in the reference",
    ]
    assert all(rung.passed and rung.difference == 0 for rung in rungs)


@pytest.mark.parametrize(
    ("broken", "failing"),
    [
        ("logits", {0, 1}),
        ("prefill", {2, 5}),
        ("decode", {3, 5}),
        ("batch", {4}),
        ("together", {6}),
        ("score", {7}),
    ],
)
def test_a_fault_fails_its_rungs_and_no_others(broken: str, failing: set[int]) -> None:
    rungs = ladder(Toy(broken))
    assert {number for number, rung in enumerate(rungs) if not rung.passed} == failing
    assert all(rungs[number].max_abs_difference == pytest.approx(0.5) for number in failing)


def test_large_logits_are_compared_relative_to_the_largest() -> None:
    (first, *_) = ladder(Toy("logits", scale=1000.0, error=0.05))
    assert first.passed
    assert first.difference == pytest.approx(first.max_abs_difference / 1000, rel=0.3)
    assert not ladder(Toy("logits", error=0.05))[0].passed


def test_a_logit_that_is_not_a_number_fails_and_can_be_recorded() -> None:
    (first, *_) = ladder(Toy("logits", error=float("nan")))
    assert not first.passed
    assert first.as_dict()["difference"] is None


@pytest.mark.parametrize(("max_length", "steps"), [(8, "7 decode steps"), (2, "1 decode steps")])
def test_a_short_context_shortens_the_rungs(max_length: int, steps: str) -> None:
    names = [rung.name for rung in ladder(Toy(), max_length=max_length)]
    assert steps in names
    assert f"maximum length {max_length}" in names


def test_a_context_of_one_token_and_no_scores() -> None:
    assert [rung.name for rung in ladder(Toy(), max_length=1, labels=None)] == ["all logits, length 1"]


def test_a_model_that_decodes_one_sequence_at_a_time_has_no_rung_for_more() -> None:
    names = [rung.name for rung in ladder(Toy(), batches=False)]
    assert len(names) == 7
    assert not any("together" in name for name in names)


def test_a_model_against_itself_alone_finds_faults_of_caching_only() -> None:
    names = []
    for broken in ("logits", "decode"):
        model = Toy(broken)
        rungs = climb(Alone(model), model, vocab_size=VOCAB, max_length=90, label_ids=LABELS, limit=SELF_LIMIT)
        names.append([rung.name for rung in rungs if not rung.passed])
    assert "all logits, length 21" not in names[0]
    assert names[1] == ["64 decode steps", "maximum length 90"]
