"""gate.py: definitions on known distributions, records of both outcomes, and where sequences come from."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from slmdeploy.building import gate, texts
from slmdeploy.building.gate import Comparison, Quality, judge, parity_gate, speed_gate
from slmdeploy.building.onnxruntime import open_folder
from slmdeploy.building.texts import sequences_for
from slmdeploy.errors import InputError, SpecError
from slmdeploy.runtime.model import Model, load
from slmdeploy.specs import Gate
from tests.building.small import write_graph
from tests.graphs import write_tiny_graph

HALVES, QUARTER = np.log([[0.5, 0.5]]).astype(np.float32), np.log([[0.25, 0.75]]).astype(np.float32)
LIMITS = Gate(max_kl=0.1, min_top1=0.9, max_ppl_ratio=1.1)


class Fixed:
    """Predicts one distribution everywhere."""

    def __init__(self, *probabilities: float) -> None:
        self._row = np.log(np.array(probabilities, np.float32))

    def logits(self, input_ids: Sequence[int]) -> NDArray[np.float32]:
        return np.tile(self._row + 3, (len(input_ids), 1))  # logits are log-probabilities up to a constant


def test_log_softmax_is_normalised_and_survives_large_logits() -> None:
    found = gate.log_softmax(np.array([[1000, 1000], [0, -1000]], np.float32))
    np.testing.assert_allclose(np.exp(found), [[0.5, 0.5], [1, 0]])


def test_kl_is_in_nats_from_the_reference_to_the_candidate() -> None:
    assert gate.kl_divergence(HALVES, QUARTER)[0] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert gate.kl_divergence(QUARTER, HALVES)[0] == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    assert gate.kl_divergence(HALVES, HALVES)[0] == 0


def test_top1_and_likelihood() -> None:
    same = gate.top1_agreement(np.array([[1, 2], [2, 1]], np.float32), np.array([[0, 9], [0, 9]], np.float32))
    assert same.tolist() == [True, False]
    assert gate.negative_log_likelihood(QUARTER, np.array([1]))[0] == pytest.approx(-np.log(0.75))


def test_quality_is_averaged_over_the_predicted_positions() -> None:
    quality = Comparison(Fixed(0.5, 0.5), [[0, 1, 1], [1, 0]]).quality(Fixed(0.25, 0.75))
    assert quality.positions == 3
    assert quality.kl == pytest.approx(0.5 * np.log(4 / 3), rel=1e-5)
    assert quality.top1_agreement == 0
    assert quality.ppl_ratio == pytest.approx(np.exp(np.mean(np.log([0.5 / 0.75, 0.5 / 0.75, 0.5 / 0.25]))), rel=1e-5)


def test_a_bound_on_tokens_leaves_sequences_out_but_never_the_first() -> None:
    comparison = Comparison(Fixed(0.5, 0.5), [[0, 1, 1, 0], [1, 0]])
    assert comparison.quality(Fixed(0.5, 0.5), tokens=1).positions == 3
    assert comparison.quality(Fixed(0.5, 0.5), tokens=6).positions == 4


def gated(reference: Fixed, candidate: Fixed, ids: list[list[int]]) -> tuple[Quality, dict[str, Any]]:
    quality = Comparison(reference, ids).quality(candidate)
    return quality, judge(quality, LIMITS)


def test_a_model_passes_against_itself_and_another_fails() -> None:
    quality, gates = gated(Fixed(0.6, 0.4), Fixed(0.6, 0.4), [[0, 1, 0]])
    assert quality == Quality(0.0, 1.0, 1.0, 2)
    assert all(entry["passed"] for entry in gates.values())
    _, gates = gated(Fixed(0.9, 0.1), Fixed(0.1, 0.9), [[0, 0, 0]])
    assert not any(entry["passed"] for entry in gates.values())


def test_the_limit_itself_passes() -> None:
    assert all(entry["passed"] for entry in judge(Quality(0.1, 0.9, 1.1, 5), LIMITS).values())


def test_a_model_that_computes_nan_fails_and_can_be_recorded() -> None:
    with np.errstate(invalid="ignore"):
        quality, gates = gated(Fixed(0.6, 0.4), Fixed(float("nan"), 0.4), [[0, 1]])
    assert not gates["kl"]["passed"]
    json.dumps([gates, quality.recorded()], allow_nan=False)


class Timed:
    """A model that lets a fake clock pass instead of computing."""

    def __init__(self, clock: list[float], prefill: float, step: float, score: float | None = None) -> None:
        self._clock, self._prefill, self._step, self._score = clock, prefill, step, score
        self.runtime = SimpleNamespace(max_length=512, vocab_size=10)
        self.tasks = ("generate",) if score is None else ("generate", "score")
        self.prompts: set[int] = set()

    def generate_ids(self, prompt: Sequence[int], *, max_new_tokens: int, ignore_eos: bool) -> Iterator[int]:
        self.prompts.add(len(prompt))
        self._clock[0] += self._prefill
        yield 0
        for _ in range(max_new_tokens - 1):
            self._clock[0] += self._step
            yield 0

    def score_ids(self, prefix: Sequence[int], items: Sequence[Sequence[int]]) -> None:
        assert [len(prefix), *map(len, items)] == [32] + [30] * 10
        self._clock[0] += self._score or 0


def race(monkeypatch: pytest.MonkeyPatch, own: tuple[float, ...], found: tuple[float, ...]) -> tuple[Any, Any]:
    clock = [0.0]
    monkeypatch.setattr(gate.time, "perf_counter", lambda: clock[0])
    models = [Timed(clock, *seconds) for seconds in (own, found)]
    outcome = speed_gate(cast(Model, models[0]), cast(Model, models[1]))
    assert models[1].prompts == {128}
    return outcome


def test_speed_is_time_over_time_per_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios, entry = race(monkeypatch, (1.0, 0.1, 4.0), (0.5, 0.2, 4.0))
    assert ratios == pytest.approx({"prefill_ratio": 0.5, "decode_ratio": 2.0, "score_ratio": 1.0})
    assert entry["passed"]
    assert entry["value"] == pytest.approx(0.5)


def test_a_build_that_is_faster_nowhere_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ratios, entry = race(monkeypatch, (1.0, 0.1), (1.5, 0.2))
    assert ratios["score_ratio"] is None
    assert not entry["passed"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_folder(write_graph(tmp_path_factory.mktemp("gate") / "graph", layers=1))


def write_data(folder: Path, **files: list[dict[str, Any]]) -> Path:
    for name, records in files.items():
        (folder / f"{name}.valid.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_without_data_the_reference_writes_the_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_TOKENS", 200)
    sequences, source = sequences_for(model, None)
    assert source == "self-generated"
    assert sequences == sequences_for(model, None)[0]
    assert {len(ids) for ids in sequences} == {64}
    assert all(ids[0] == 0 for ids in sequences)
    assert len({tuple(ids) for ids in sequences}) == len(sequences) == 3


def test_data_gives_its_validation_records_both_tasks_in_turn(model: Model, tmp_path: Path) -> None:
    data = write_data(
        tmp_path,
        generate=[{"prompt": "ab", "completion": "c"}],
        score=[{"prefix": "q", "items": ["xy", "z"], "labels": [1, 0]}] * 2,
    )
    sequences, source = sequences_for(model, data)
    assert source == "validation split"
    encode = model.tokenizer.encode
    expected = [encode("ab").ids + encode("c", add_special_tokens=False).ids]
    expected += [encode("q").ids + encode("xy", add_special_tokens=False).ids] * 2
    assert sequences == expected
    assert sequences[0][0] == 0


def test_long_records_are_cut_to_the_context(model: Model, tmp_path: Path) -> None:
    sequences, _ = sequences_for(model, write_data(tmp_path, generate=[{"prompt": "a" * 99, "completion": "b" * 99}]))
    assert [len(ids) for ids in sequences] == [64]


def test_data_without_a_usable_record_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no record"):
        sequences_for(model, tmp_path)


@pytest.mark.parametrize("record", [{"prompt": "a"}, {"prompt": 1, "completion": "b"}, ["a", "b"]])
def test_a_malformed_record_is_named(model: Model, tmp_path: Path, record: Any) -> None:
    data = write_data(tmp_path, generate=[{"prompt": "a", "completion": "b"}, record])
    with pytest.raises(SpecError, match=r"generate\.valid\.jsonl:2"):
        sequences_for(model, data)


def test_a_score_record_without_items_is_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"score\.valid\.jsonl:1"):
        sequences_for(model, write_data(tmp_path, score=[{"prefix": "q", "items": [], "labels": []}]))


def test_a_build_that_loses_its_cache_fails_the_parity_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_graph(tmp_path / "graph")
    model = load(tmp_path / "graph", threads=1)
    rungs, gate = parity_gate(model)
    assert gate["passed"]
    assert len(rungs) >= 5
    monkeypatch.setattr(model, "decode", lambda token: model.prefill([token]))
    rungs, gate = parity_gate(model)
    assert not gate["passed"]
    assert any(rung["passed"] for rung in rungs)
