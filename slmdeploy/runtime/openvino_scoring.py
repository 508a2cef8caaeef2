"""Scores items behind a shared prefix with a stateful OpenVINO model: the prefix once, then items as rows of a batch.

The states of the prefix are read by every row (`beam_idx`), so no second graph and no second set of weights is needed.
Items of like length go together; a batch is bounded by the keys and values that it makes, and the prefix is put back
for each batch, and for the next request with the same prefix, rather than computed anew. Knows nothing of texts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig, ScoreConfig
from .errors import CorruptArtifactError
from .openvino_decoding import StatefulModel, rows_behind, run_pieces
from .scoring import check_room

BATCH_PLACES = 1 << 15
"""Places of keys and values in a batch, the prefix counted for each row: 0.8 GB for a Qwen2.5-0.5B in float32."""
Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


class StatefulScorer:
    """A stateful model that gives the label logits of items."""

    def __init__(self, model: StatefulModel, config: RuntimeConfig, score: ScoreConfig) -> None:
        self._config, self._path = config, model.path
        self._labels = list(score.label_ids)
        self._request = model.request()
        self._prefix: Ids = np.zeros(0, np.int64)
        self._kept: dict[str, Any] = {}

    def score(self, prefix: Ids, items: Sequence[Ids]) -> Scores:
        """Label logits at the last token of each item behind the prefix, float32 [items, labels]."""
        check_room(prefix, items, self._config.max_length)
        if not np.array_equal(prefix, self._prefix):
            run_pieces(self._request, prefix, np.array([prefix.size - 1]))
            self._prefix, self._kept = prefix.copy(), self._request.kept()
        scores = np.empty((len(items), len(self._labels)), np.float32)
        for part in batches([item.size for item in items], prefix.size):
            self._request.forget()
            self._request.restore(self._kept)
            scores[part] = self._batch(prefix.size, [items[i] for i in part])
        if not np.isfinite(scores).all():
            raise CorruptArtifactError(f"{self._path} computes NaN or infinity; its weights are damaged.")
        return scores

    def _batch(self, past: int, items: list[Ids]) -> Scores:
        width = max(item.size for item in items)
        ids, mask = np.zeros((len(items), width), np.int64), np.zeros((len(items), past + width), np.int64)
        for i, item in enumerate(items):
            ids[i, : item.size], mask[i, : past + item.size] = item, 1
        last = np.array([i * width + item.size - 1 for i, item in enumerate(items)])
        logits = rows_behind(self._request, ids, mask, last, np.zeros(len(items), np.int32))
        labels: Scores = logits[:, self._labels]
        return labels


def batches(lengths: Sequence[int], past: int, places: int = BATCH_PLACES) -> Iterator[list[int]]:
    """Indices of items that are run together: of like length, the longest first, at most `places` places in a batch."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * (past + lengths[batch[0]]) > places:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
