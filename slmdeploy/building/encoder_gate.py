"""How good is an encoder's build, is it faster than its own graph, and does a batch give what its rows give alone?

Quality compares outputs on the same rows: cosine of vectors, difference of logits, agreement of labels, each defined at
its field. Speed compares medians of interleaved rounds. A gate is recorded, never raised. Knows encoders only through
what they answer (`rows`), so tests use fakes and any engine can be judged.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slmdeploy.building.gate import finite
from slmdeploy.building.ladder import SELF_LIMIT, Rung
from slmdeploy.building.texts import SEED, SOURCE_DATA, read_pairs
from slmdeploy.errors import InputError
from slmdeploy.runtime.encoder_config import EncoderConfig
from slmdeploy.runtime.encoding import Row, RowCodec, Text
from slmdeploy.runtime.text import load_tokenizer
from slmdeploy.specs import Gate

Floats = npt.NDArray[np.float32]
SOURCE_RANDOM = "random tokens"
_ROWS, _ROW_TOKENS = 48, 128
_SPEED_TOKENS, _SPEED_ROWS = 128, 8
_PARITY_LENGTHS = (5, 1, 17, 12, 300)
_WARM_UP, _ROUNDS = 1, 7


class Encodes(Protocol):
    """Whatever gives an output of rows: an encoder of any engine."""

    def rows(self, rows: Sequence[Row], name: str) -> list[Floats]:
        """The output `name` of each row, padding left out."""


@dataclass(frozen=True)
class Quality:
    """How near a build is to its graph over ``rows`` texts; the figures of the other kind of encoder are None.

    min_cosine, mean_cosine: of the vectors of one text by both. logit_difference: the largest, as a share of the
    graph's largest logit where that is above 1. label_agreement: share of texts (tokens, for a classifier of tokens)
    that get the same label; with one label, of those on the same side of 0.
    """

    rows: int
    min_cosine: float | None = None
    mean_cosine: float | None = None
    logit_difference: float | None = None
    label_agreement: float | None = None

    @property
    def loss(self) -> float:
        """One number to rank by, 0 for equal outputs: 1 - mean cosine, or the logits' difference; NaN is the worst."""
        loss = 1 - self.mean_cosine if self.mean_cosine is not None else self.logit_difference
        assert loss is not None, "an encoder has vectors or logits"
        return math.inf if math.isnan(loss) else loss

    def recorded(self) -> dict[str, float | None]:
        """As a manifest holds it."""
        return {name: None if value is None else finite(value) for name, value in asdict(self).items()}


def output_of(config: EncoderConfig) -> str:
    """The output that quality is judged by."""
    return "sentence_embedding" if config.embedding else "logits"


class EncoderComparison:
    """Rows and what the reference says about them, computed once and compared with many candidates."""

    def __init__(self, reference: Encodes, rows: Sequence[Row], output: str) -> None:
        self._rows, self._output = rows, output
        self._expected = reference.rows(rows, output)

    def quality(self, candidate: Encodes) -> Quality:
        """The candidate's figures on all rows."""
        found = candidate.rows(self._rows, self._output)
        if self._output == "logits":
            expected_logits, found_logits = (
                np.concatenate([np.atleast_2d(row) for row in rows]) for rows in (self._expected, found)
            )
            return _logits_quality(len(self._rows), expected_logits, found_logits)
        cosines = [cosine(expected, got) for expected, got in zip(self._expected, found, strict=True)]
        return Quality(len(self._rows), min_cosine=float(np.min(cosines)), mean_cosine=float(np.mean(cosines)))


def cosine(one: Floats, other: Floats) -> float:
    """Cosine of the angle between two vectors; 1 for two zero vectors, 0 when only one is zero."""
    lengths = [float(np.linalg.norm(vector.astype(np.float64))) for vector in (one, other)]
    if not all(lengths):
        return float(not any(lengths))
    return float(one.astype(np.float64) @ other.astype(np.float64)) / (lengths[0] * lengths[1])


def _logits_quality(rows: int, expected: Floats, found: Floats) -> Quality:
    largest = max(1.0, float(np.abs(expected).max()))
    one_label = expected.shape[1] == 1
    labels = [(logits[:, 0] > 0) if one_label else logits.argmax(axis=1) for logits in (expected, found)]
    return Quality(
        rows,
        logit_difference=float(np.abs(expected - found).max()) / largest,
        label_agreement=float((labels[0] == labels[1]).mean()),
    )


def judge(quality: Quality, limits: Gate) -> dict[str, dict[str, Any]]:
    """The quality gates by name: value, limit, and whether it is within; a value that is not a number never is."""
    gates = {}
    for name, value, limit in (
        ("min_cosine", quality.min_cosine, limits.min_cosine),
        ("label_agreement", quality.label_agreement, limits.min_top1),
    ):
        if value is not None:
            gates[name] = {"passed": value >= limit, "value": finite(value), "limit": limit}
    if quality.logit_difference is not None:
        difference, limit = quality.logit_difference, limits.max_logit_difference
        gates["logit_difference"] = {"passed": difference <= limit, "value": finite(difference), "limit": limit}
    return gates


def parity_gate(
    encoder: Encodes, config: EncoderConfig, limit: float = SELF_LIMIT
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Each output of a padded batch against its rows alone: the rungs, and the gate on the worst of them."""
    rows, rungs = _unequal_rows(config), []
    for name in _outputs(config):
        alone = [encoder.rows([row], name)[0] for row in rows]
        largest, share = _distance(alone, encoder.rows(rows, name))
        rungs.append(Rung(f"padded batch: {name}", largest, share, limit, share <= limit))
    worst = max(rung.difference for rung in rungs)
    gate = {"passed": all(rung.passed for rung in rungs), "value": finite(worst), "limit": limit}
    return [rung.as_dict() for rung in rungs], gate


def largest_difference(reference: Encodes, candidate: Encodes, config: EncoderConfig) -> float:
    """Of any output of a padded batch, as a share of the output's largest magnitude where that is above 1."""
    rows = _unequal_rows(config)
    return max(_distance(reference.rows(rows, name), candidate.rows(rows, name))[1] for name in _outputs(config))


def _outputs(config: EncoderConfig) -> list[str]:
    return ["last_hidden_state", "sentence_embedding"] if config.embedding else ["logits"]


def _unequal_rows(config: EncoderConfig) -> list[Row]:
    random = np.random.default_rng(SEED)
    return [random_row(random, min(length, config.max_length), config) for length in _PARITY_LENGTHS]


def _distance(expected: Sequence[Floats], found: Sequence[Floats]) -> tuple[float, float]:
    """Largest difference of two lists of arrays, and its share of the largest magnitude where that is above 1."""
    one, other = (np.concatenate([np.ravel(array) for array in arrays]) for arrays in (expected, found))
    largest = float(np.abs(one - other).max())
    return largest, largest / max(1.0, float(np.abs(one).max()))


def speed_gate(
    reference: Encodes, candidate: Encodes, config: EncoderConfig
) -> tuple[dict[str, float], dict[str, Any]]:
    """Time of ``candidate`` over time of ``reference``, below 1 is faster, and the gate: it must be in one of the two.

    single: one row of 128 tokens; batch: 8 of them; each shortened to the model's length.
    """
    random = np.random.default_rng(SEED)
    length = min(_SPEED_TOKENS, config.max_length)
    rows = [random_row(random, length, config) for _ in range(_SPEED_ROWS)]
    work = {"single_ratio": rows[:1], "batch_ratio": rows}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in work}
    for turn in range(_WARM_UP + _ROUNDS):
        for side in (0, 1) if turn % 2 else (1, 0):
            for name, batch in work.items():
                started = time.perf_counter()
                (reference, candidate)[side].rows(batch, output_of(config))
                if turn >= _WARM_UP:
                    times[name][side].append(time.perf_counter() - started)
    ratios = {name: median(found) / median(own) for name, (own, found) in times.items()}
    best = min(ratios.values())
    return ratios, {"passed": best < 1, "value": best, "limit": 1.0}


def random_row(random: np.random.Generator, length: int, config: EncoderConfig) -> Row:
    """Random tokens other than padding, which RoBERTa counts its positions by; types 0 and then 1 if there are any."""
    ids = random.integers(0, config.vocab_size - 1, length)
    ids += ids >= config.pad_token_id
    types = np.arange(length) * 2 // length if "token_type_ids" in config.inputs else np.zeros(length, np.int64)
    return Row(tuple(map(int, ids)), tuple(map(int, types)))


def rows_for(graph: Path, config: EncoderConfig, data: Path | None) -> tuple[list[Row], str]:
    """48 rows of 128 tokens or less to compare on, and where they come from.

    With ``data``: a seeded draw from its validation split, cut to 128 tokens; of a model that scores, prefix and item
    as a pair, else their texts. Without: random tokens of random lengths, which say little about labels.
    """
    if data is None:
        random = np.random.default_rng(SEED)
        longest = min(_ROW_TOKENS, config.max_length)
        lengths = random.integers(min(4, longest), longest + 1, _ROWS)
        return [random_row(random, int(length), config) for length in lengths], SOURCE_RANDOM
    texts: list[Text] = []
    for head, tail in read_pairs(data):
        texts += [(head, tail)] if "score" in config.tasks else [head, tail]
    texts = [text for text in texts if all(text)][:_ROWS]
    if not texts:
        raise InputError(f"{data} has no record with text in generate.valid.jsonl or score.valid.jsonl")
    rows = RowCodec(load_tokenizer(graph), config).rows(texts)
    return [Row(row.ids[:_ROW_TOKENS], row.types[:_ROW_TOKENS]) for row in rows], SOURCE_DATA
