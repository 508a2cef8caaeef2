"""What simple methods reach on the same two tasks, so that the teacher's figures mean something (model card).

    python examples/teacher_baselines.py DATA

`bm25_scores` ranks items by the words that they share with the query; `ngram_bits_per_byte` predicts the test text
byte by byte from counts of the training text. Both see exactly the files that the teacher sees. Standard library and
numpy only.
"""

import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from slmdeploy.profiling.quality import auc, reciprocal_rank

Record = dict[str, Any]
ORDER = 6
"""Bytes of an n-gram: five of context and the one that is predicted."""
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def words(text: str) -> list[str]:
    """Lower-case words; identifiers are split at case changes and underscores: `getItem_at` gives get, item, at."""
    return [word.lower() for word in _WORD.findall(text)]


def bm25_scores(records: Sequence[Record], *, k1: float = 1.2, b: float = 0.75) -> list[list[float]]:
    """Okapi BM25 of every item for its record's prefix (Robertson and Zaragoza 2009).

    Document frequencies and the mean length are those of all items of ``records``. Words that every item has, such as
    those of a template, get a weight near zero by themselves.
    """
    documents = [[Counter(words(item)) for item in record["items"]] for record in records]
    flat = [document for group in documents for document in group]
    containing = Counter(word for document in flat for word in document)
    mean_length = sum(document.total() for document in flat) / len(flat)

    def score(query: Iterable[str], document: Counter[str]) -> float:
        norm = k1 * (1 - b + b * document.total() / mean_length)
        total = 0.0
        for word in query:
            if document[word]:
                rarity = math.log(1 + (len(flat) - containing[word] + 0.5) / (containing[word] + 0.5))
                total += rarity * document[word] * (k1 + 1) / (document[word] + norm)
        return total

    return [
        [score(words(record["prefix"]), document) for document in group]
        for record, group in zip(records, documents, strict=True)
    ]


def ngram_bits_per_byte(train: Iterable[str], test: Sequence[tuple[str, str]], *, order: int = ORDER) -> float:
    """Bits per byte of the completions of ``test`` (prompt, completion) under a byte n-gram model of ``train``.

    Interpolated Witten-Bell smoothing (Bell, Cleary and Witten 1990): each context mixes its counts with the next
    shorter one's in the proportion of how many different bytes it was followed by. The shortest one is uniform.
    """
    texts = [text.encode() for text in train]
    counts = [_count(texts, length) for length in range(order)]
    bits, size = 0.0, 0
    for prompt, completion in test:
        data = prompt.encode() + completion.encode()
        for place in range(len(prompt.encode()), len(data)):
            bits -= math.log2(_probability(counts, data, place))
            size += 1
    return bits / size


def _count(texts: Iterable[bytes], length: int) -> dict[bytes, Counter[int]]:
    table: dict[bytes, Counter[int]] = defaultdict(Counter)
    for text in texts:
        for place in range(length, len(text)):
            table[text[place - length : place]][text[place]] += 1
    return dict(table)


def _probability(counts: Sequence[dict[bytes, Counter[int]]], data: bytes, place: int) -> float:
    probability = 1 / 256
    for length, table in enumerate(counts):
        followers = table.get(data[place - length : place]) if length <= place else None
        if followers is None:
            break  # a context that was never seen has no longer one that was
        different = len(followers)
        probability = (followers[data[place]] + different * probability) / (followers.total() + different)
    return probability


def _read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare(data: Path) -> dict[str, float]:
    """The figures of both baselines on the test split of the data folder."""
    ranking = _read(data / "score.test.jsonl")
    scores = bm25_scores(ranking)
    labels = [record["labels"] for record in ranking]
    ranks = [reciprocal_rank(score, label) for score, label in zip(scores, labels, strict=True)]
    texts = [record["prompt"] + record["completion"] for record in _read(data / "generate.train.jsonl")]
    test = [(record["prompt"], record["completion"]) for record in _read(data / "generate.test.jsonl")]
    return {
        "bm25_auc": auc([*chain(*scores)], [*chain(*labels)]),
        "bm25_mrr_at_10": sum(ranks) / len(ranks),
        "ngram_bits_per_byte": ngram_bits_per_byte(texts, test),
    }


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]))))
