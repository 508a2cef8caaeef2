"""The scorer of a compiled plan, over a device that is the host's memory and phases that ONNX Runtime computes.

As in test_tensorrt_decoding.py: what is tested is ours, and nothing here says that TensorRT and a GPU run.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from slmdeploy.runtime import scoring
from slmdeploy.runtime.errors import InputError
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.tensorrt_scoring import TensorRTScorer
from tests.runtime.test_tensorrt_decoding import HostCall, HostDevice

RNG = np.random.default_rng(5)
PREFIX = RNG.integers(2, 200, 11)
ITEMS = [RNG.integers(2, 200, size) for size in (3, 1, 8, 5)]


class NamedCall(HostCall):
    """A phase that says when it ran, and which inputs were sent to it."""

    def __init__(self, session: ort.InferenceSession, device: HostDevice, name: str, ran: list[str]) -> None:
        super().__init__(session, device)
        self.name, self.ran = name, ran

    def run(self) -> None:
        self.ran.append(self.name)
        super().run()


@pytest.fixture
def opened(tiny: Path, model: Model) -> tuple[TensorRTScorer, list[str]]:
    device, ran = HostDevice(), list[str]()
    session = ort.InferenceSession(str(tiny / "score.onnx"))
    assert model.runtime.score is not None
    scorer = TensorRTScorer(
        tiny, model.runtime, model.runtime.score, lambda name: NamedCall(session, device, name, ran), device
    )
    return scorer, ran


def test_it_gives_the_scores_of_the_graph_whether_the_prefix_is_new_or_kept(
    opened: tuple[TensorRTScorer, list[str]], model: Model
) -> None:
    scorer, ran = opened
    expected = model.score_ids(PREFIX.tolist(), [item.tolist() for item in ITEMS])
    for _ in range(2):
        assert np.abs(scorer.score(PREFIX, ITEMS) - expected).max() < 1e-5
    assert ran == ["items", "items"]


def test_a_long_prefix_has_runs_of_its_own_in_its_own_phase(
    opened: tuple[TensorRTScorer, list[str]], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, ran = opened
    expected = model.score_ids(PREFIX.tolist(), [item.tolist() for item in ITEMS])
    monkeypatch.setattr(scoring, "RUN_TOKENS", 8)
    assert np.abs(scorer.score(PREFIX, ITEMS) - expected).max() < 1e-5
    assert ran[:2] == ["prefix", "prefix"]
    assert set(ran[2:]) == {"items"}
    shorter = model.score_ids(PREFIX[:6].tolist(), [ITEMS[0].tolist()])
    assert np.abs(scorer.score(PREFIX[:6], ITEMS[:1]) - shorter).max() < 1e-5


def test_an_item_that_the_plan_has_no_place_for_is_refused(opened: tuple[TensorRTScorer, list[str]]) -> None:
    with pytest.raises(InputError, match="Item 1 has 257 tokens, and a plan takes 256: shorten it"):
        opened[0].score(PREFIX, [ITEMS[0], np.full(257, 3)])
