"""A scorer that takes requests whole is asked group after group, and gives the same scores."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from slmdeploy.runtime import score_runs
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.score_runs import GroupedRun, begin_run
from slmdeploy.runtime.scoring import ScoreRun

PREFIX = np.array([0, 4, 9, 12])
ITEMS = [np.arange(size) + 30 for size in (3, 2, 6, 1)]


class WholeScorer:
    """Scores through a model and notes how many items it was asked for at once."""

    def __init__(self, model: Model) -> None:
        self.model, self.asked = model, list[int]()

    def score(self, prefix: npt.NDArray[np.int64], items: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        self.asked.append(len(items))
        return self.model.score_ids(prefix.tolist(), [item.tolist() for item in items])


def test_groups_of_items_come_in_order(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_runs, "RUN_TOKENS", 6)
    scorer = WholeScorer(model)
    run = begin_run(scorer, PREFIX, ITEMS)
    assert isinstance(run, GroupedRun)
    assert scorer.asked == []
    while not run.done:
        run.advance()
    assert sum(scorer.asked) == len(ITEMS)
    assert len(scorer.asked) == 3, "no group has more than 6 tokens unless one item does"
    expected = model.score_ids(PREFIX.tolist(), [item.tolist() for item in ITEMS])
    assert np.abs(run.scores - expected).max() < 1e-4


def test_the_scorer_of_score_onnx_has_pieces_of_its_own(model: Model) -> None:
    assert isinstance(begin_run(model.scorer, PREFIX, ITEMS), ScoreRun)
