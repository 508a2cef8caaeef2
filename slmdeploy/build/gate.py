"""Is a build good enough, and is it faster than its own fp32 graph? Measures both; decides nothing else.

Quality compares next-token distributions on the same tokens: KL divergence, top-1 agreement and perplexity ratio, each
defined at its function. Speed compares medians of interleaved rounds, so that a busy machine slows both sides alike. A
gate is recorded, never raised: a build outside its gate is written and reported as such. Knows models only through what
they answer (logits, generated ids, scores), so tests use fakes.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slmdeploy.errors import InputError, SpecError
from slmdeploy.runtime.model import Model
from slmdeploy.specs import Gate

Floats = npt.NDArray[np.float32]
Sequences = Sequence[Sequence[int]]

SEED = 1131
_TOKENS = 6144
_SEQUENCE_TOKENS = 256
_PREFILL_TOKENS, _DECODE_TOKENS = 128, 32
_SCORE_PREFIX, _SCORE_ITEMS, _SCORE_ITEM_TOKENS = 32, 10, 30
_WARM_UP, _ROUNDS = 2, 9


class Predicts(Protocol):
    """Whatever gives next-token logits, float32 [length, vocabulary], for token ids."""

    def logits(self, input_ids: Sequence[int]) -> Floats:
        """Row i predicts the token behind ``input_ids[i]``."""


@dataclass(frozen=True)
class Quality:
    """How near a candidate is to its reference over ``positions`` next-token predictions."""

    kl: float
    top1_agreement: float
    ppl_ratio: float
    positions: int


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Log-probabilities along the last axis, in float64 so that a KL of 1e-7 is not rounding."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl_divergence(reference: npt.NDArray[np.float64], candidate: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """KL(reference || candidate) per row in nats, from log-probabilities [rows, vocabulary]."""
    return np.asarray((np.exp(reference) * (reference - candidate)).sum(axis=-1))


def top1_agreement(reference: npt.NDArray[np.float64], candidate: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Per row, whether both give their highest probability to the same token."""
    return np.asarray(reference.argmax(axis=-1) == candidate.argmax(axis=-1))


def negative_log_likelihood(
    log_probabilities: npt.NDArray[np.float64], targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """-log p(target) per row in nats; exp of its mean is the perplexity."""
    return -np.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]


def measure_quality(reference: Predicts, candidate: Predicts, sequences: Sequences) -> Quality:
    """Mean KL, share of top-1 agreement and perplexity(candidate) / perplexity(reference) over all given sequences.

    The last token of a sequence is only predicted, so a sequence of n tokens counts n - 1 positions.
    """
    kl, same, losses = [], [], []
    for sequence in sequences:
        targets = np.asarray(sequence[1:], np.int64)
        expected = log_softmax(reference.logits(sequence[:-1]))
        found = log_softmax(candidate.logits(sequence[:-1]))
        kl.append(kl_divergence(expected, found))
        same.append(top1_agreement(expected, found))
        losses.append(negative_log_likelihood(found, targets) - negative_log_likelihood(expected, targets))
    divergences = np.concatenate(kl)
    return Quality(
        kl=float(divergences.mean()),
        top1_agreement=float(np.concatenate(same).mean()),
        ppl_ratio=float(np.exp(np.concatenate(losses).mean())),
        positions=len(divergences),
    )


def judge(quality: Quality, limits: Gate) -> dict[str, dict[str, Any]]:
    """The quality gates by name: value, limit, and whether it is within; a value that is not a number never is."""
    return {
        "kl": _gate(quality.kl <= limits.max_kl, quality.kl, limits.max_kl),
        "top1_agreement": _gate(quality.top1_agreement >= limits.min_top1, quality.top1_agreement, limits.min_top1),
        "ppl_ratio": _gate(quality.ppl_ratio <= limits.max_ppl_ratio, quality.ppl_ratio, limits.max_ppl_ratio),
    }


def quality_gate(
    reference: Predicts, candidate: Predicts, sequences: Sequences, limits: Gate
) -> tuple[Quality, dict[str, dict[str, Any]]]:
    """Measure ``candidate`` against ``reference`` and judge it."""
    quality = measure_quality(reference, candidate, sequences)
    return quality, judge(quality, limits)


def speed_gate(reference: Model, candidate: Model) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Time of ``candidate`` over time of ``reference`` per phase (below 1 is faster; None: no such task), and the gate.

    prefill: 128 tokens to the first new one; decode: 32 further steps; score: one request of 10 items of 30 tokens behind
    a prefix of 32; each shortened to the context. The gate fails a build that is slower in every phase it has: a build is
    made for one phase and may pay in another, and selection sees all three.
    """
    times: dict[str, tuple[list[float], list[float]]] = {}
    for turn in range(_WARM_UP + _ROUNDS):
        for side in (0, 1) if turn % 2 else (1, 0):
            for phase, seconds in _phases((reference, candidate)[side]).items():
                if turn >= _WARM_UP:
                    times.setdefault(phase, ([], []))[side].append(seconds)
    ratios = {phase: median(found) / median(own) for phase, (own, found) in times.items()}
    best = min(ratios.values())
    return {f"{phase}_ratio": ratios.get(phase) for phase in ("prefill", "decode", "score")}, _gate(best < 1, best, 1.0)


def _gate(passed: bool, value: float, limit: float) -> dict[str, Any]:
    return {"passed": bool(passed), "value": value, "limit": limit}


def _phases(model: Model) -> dict[str, float]:
    """Seconds of each phase in one pass over ``model``."""
    room, vocabulary = model.runtime.max_length, model.runtime.vocab_size
    ids = np.random.default_rng(SEED).integers(0, vocabulary, room).tolist()
    steps = min(_DECODE_TOKENS, room // 4)
    prompt = ids[: min(_PREFILL_TOKENS, room - steps - 1)]
    seconds = _generation_seconds(model, prompt, steps)
    if "score" in model.tasks:
        item = min(_SCORE_ITEM_TOKENS, room // 4)
        count = max(1, min(_SCORE_ITEMS, (room - _SCORE_PREFIX) // item))
        started = time.perf_counter()
        model.score_ids(ids[: min(_SCORE_PREFIX, room // 4)], [ids[i : i + item] for i in range(count)])
        seconds["score"] = time.perf_counter() - started
    return seconds


def _generation_seconds(model: Model, prompt: list[int], steps: int) -> dict[str, float]:
    started = time.perf_counter()
    stream = model.generate_ids(prompt, max_new_tokens=steps + 1, ignore_eos=True)
    next(stream)
    first = time.perf_counter()
    for _ in stream:
        pass
    return {"prefill": first - started, "decode": time.perf_counter() - first}


def sequences_for(reference: Model, data: Path | None) -> tuple[list[list[int]], str]:
    """Token sequences to compare on, 6,144 tokens or less in all, and where they come from.

    With ``data``: a seeded draw from its validation split, generate and score records alternating. Without: sampled from
    ``reference`` itself at temperature 1, "self-generated", which is text the model knows well and so the milder test.
    """
    length = min(_SEQUENCE_TOKENS, reference.runtime.max_length)
    if data is None:
        return [_sample(reference, length, seed) for seed in range(_TOKENS // length)], "self-generated"
    sequences: list[list[int]] = []
    spent = 0
    for ids in _records(reference, data):
        if spent + min(len(ids), length) > _TOKENS:
            break
        if len(ids) > 1:
            sequences.append(ids[:length])
            spent += len(sequences[-1])
    if not sequences:
        raise InputError(f"{data} has no record of two tokens or more in generate.valid.jsonl or score.valid.jsonl")
    return sequences, "validation split"


def _sample(reference: Model, length: int, seed: int) -> list[int]:
    bos = reference.runtime.bos_token_id
    start = [bos if bos is not None else seed % reference.runtime.vocab_size]
    return start + list(
        reference.generate_ids(start, max_new_tokens=length - 1, temperature=1.0, seed=SEED + seed, ignore_eos=True)
    )


def _records(reference: Model, data: Path) -> Iterator[list[int]]:
    """Token ids of one record after another, tasks alternating; the parts of a record are encoded apart, as in use."""
    readers: list[tuple[list[dict[str, Any]], Callable[[dict[str, Any]], list[str]]]] = []
    for name, texts in (("generate", _generate_texts), ("score", _score_texts)):
        path = data / f"{name}.valid.jsonl"
        if path.is_file():
            records = _read(path, texts)
            np.random.default_rng(SEED).shuffle(records)  # type: ignore[arg-type]
            readers.append((records, texts))
    for turn in range(max((len(records) for records, _ in readers), default=0)):
        for records, texts in readers:
            if turn < len(records):
                head, *tail = texts(records[turn])
                ids = list(reference.tokenizer.encode(head, add_special_tokens=True).ids)
                for text in tail:
                    ids += reference.tokenizer.encode(text, add_special_tokens=False).ids
                yield ids


def _generate_texts(record: dict[str, Any]) -> list[str]:
    return [record["prompt"], record["completion"]]


def _score_texts(record: dict[str, Any]) -> list[str]:
    return [record["prefix"], record["items"][0]]


def _read(path: Path, texts: Callable[[dict[str, Any]], list[str]]) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            valid = all(isinstance(text, str) for text in texts(record))
        except (ValueError, KeyError, TypeError, IndexError):
            valid = False
        if not valid:
            raise SpecError(f"{path}:{number}: not a record of this task (docs/data.md): mend or remove the line")
        records.append(record)
    return records


def as_dict(quality: Quality) -> dict[str, Any]:
    """The quality as a manifest holds it."""
    return asdict(quality)
