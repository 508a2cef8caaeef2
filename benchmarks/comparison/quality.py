"""What a student keeps of its teacher, on the test split: bits per byte, AUC, and how near its predictions are.

The same definitions as `slmdeploy profile` (slmdeploy/metrics.py), on a seeded subset of the records that fit a token
budget. Works on anything that gives logits and scores: a checkpoint run by torch, or a build.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from slmdeploy.building.gate import log_softmax
from slmdeploy.checkpoint import Weights
from slmdeploy.exporting.eager import EagerModel
from slmdeploy.profiling.quality import Encoded, auc, divergence, encode, read_records

Floats = npt.NDArray[np.float32]
SEED = 5


class Answers(Protocol):
    """A model that is judged."""

    def logits(self, input_ids: Sequence[int]) -> Floats: ...

    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> Floats: ...


class Judge:
    """The records, and what the teacher says of them, asked once."""

    def __init__(self, teacher: Path, data: Path, *, tokens: int, score_tokens: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(teacher / "tokenizer.json"))
        texts = read_records(data / "generate.test.jsonl", {"prompt": str, "completion": str})
        queries = read_records(data / "score.test.jsonl", {"prefix": str, "items": list, "labels": list})
        pairs = [(record["prompt"], [record["completion"]]) for record in texts]
        self._texts = self._chosen(pairs, tokens)
        self._bytes = sum(len(texts[index]["completion"].encode()) for index in self._texts)
        self._queries = self._chosen([(record["prefix"], record["items"]) for record in queries], score_tokens)
        self._labels = np.concatenate([queries[index]["labels"] for index in self._queries])
        self._expected: list[Floats] = []
        model = EagerModel(teacher)
        self._expected = [self._predictions(model, *encoded) for encoded in self._texts.values()]

    def figures(self, checkpoint: Path) -> dict[str, Any]:
        """Of a checkpoint, with its number of parameters."""
        weights = Weights(checkpoint)
        parameters = sum(int(np.prod(weights.shape(name))) for name in weights)
        return self.of(EagerModel(checkpoint)) | {"parameters": parameters}

    def of(self, model: Answers) -> dict[str, float]:
        """bits_per_byte, KL in nats per token, share of equal top tokens, AUC."""
        nats, kl, same, positions = 0.0, 0.0, 0, 0
        for expected, (prompt, tails) in zip(self._expected, self._texts.values(), strict=True):
            found = self._predictions(model, prompt, tails)
            nats -= float(found[np.arange(len(tails[0])), tails[0]].sum(dtype=np.float64))
            one, equal, count = divergence(expected, found)
            kl, same, positions = kl + one, same + equal, positions + count
        scores = [model.score_ids(prefix, items) for prefix, items in self._queries.values()]
        margins = np.concatenate([both[:, 1] - both[:, 0] for both in scores])
        return {
            "bits_per_byte": nats / np.log(2) / self._bytes,
            "kl": kl / positions,
            "top1": same / positions,
            "auc": auc(margins, self._labels),
        }

    def _predictions(self, model: Answers, prompt: list[int], tails: list[list[int]]) -> Floats:
        """Log-probabilities [completion tokens, vocabulary]."""
        return log_softmax(model.logits([*prompt, *tails[0][:-1]])[len(prompt) - 1 :])

    def _chosen(self, texts: Sequence[tuple[str, list[str]]], tokens: int) -> dict[int, Encoded]:
        """A seeded draw of the texts that fit the context, up to so many tokens."""
        chosen: dict[int, Encoded] = {}
        spent = 0
        for index in np.random.default_rng(SEED).permutation(len(texts)).tolist():
            head, tails = encode(self._tokenizer, *texts[index])
            if len(head) + max(map(len, tails)) > 512 or not all(tails):
                continue
            spent += len(head) + sum(map(len, tails))
            if spent > tokens:
                break
            chosen[index] = (head, tails)
        return chosen
