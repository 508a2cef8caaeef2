"""Is a build good enough, and is it faster than its own fp32 graph? Measures both; decides nothing else.

Quality compares next-token distributions on the same tokens: KL divergence, top-1 agreement and perplexity ratio, each
defined at its function. Speed compares medians of interleaved rounds, so that a busy machine slows both sides alike. A
gate is recorded, never raised: a build outside its gate is written and reported as such. Knows models only through what
they answer (logits, generated ids, scores), so tests use fakes.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slmdeploy.building.ladder import SELF_LIMIT, Alone, climb
from slmdeploy.building.standard_check import standard_rungs
from slmdeploy.building.texts import SEED
from slmdeploy.building.timing import generation_seconds
from slmdeploy.runtime.model import Model
from slmdeploy.specs import Gate

Floats = npt.NDArray[np.float32]
Sequences = Sequence[Sequence[int]]

_PREFILL_TOKENS, _DECODE_TOKENS = 128, 32
_SCORE_PREFIX, _SCORE_ITEMS, _SCORE_ITEM_TOKENS = 32, 10, 30
_WARM_UP, _ROUNDS = 1, 7
_TABLE_SHARE = 0.5
"""Share of what each limit of the profile leaves that the embedding or the head may use up by itself."""


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

    def recorded(self) -> dict[str, float | None]:
        """As a manifest holds it."""
        return {name: finite(value) for name, value in vars(self).items()}


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl_divergence(reference: Floats, candidate: Floats) -> npt.NDArray[np.float64]:
    """KL(reference || candidate) per row in nats, from log-probabilities [rows, vocabulary]."""
    return np.asarray((np.exp(reference) * (reference - candidate)).sum(axis=-1, dtype=np.float64))


def top1_agreement(reference: Floats, candidate: Floats) -> npt.NDArray[np.bool_]:
    """Per row, whether both give their highest probability to the same token."""
    return np.asarray(reference.argmax(axis=-1) == candidate.argmax(axis=-1))


def negative_log_likelihood(log_probabilities: Floats, targets: npt.NDArray[np.int64]) -> Floats:
    """-log p(target) per row in nats; exp of its mean is the perplexity."""
    return -np.take_along_axis(log_probabilities, targets[:, None], axis=-1)[:, 0]


class Comparison:
    """Sequences and what the reference says about them, computed once and compared with many candidates.

    The last token of a sequence is only predicted, so a sequence of n tokens counts n - 1 positions.
    """

    def __init__(self, reference: Predicts, sequences: Sequences) -> None:
        self._sequences = sequences
        self._expected = [log_softmax(reference.logits(sequence[:-1])) for sequence in sequences]

    def quality(self, candidate: Predicts, *, tokens: int | None = None) -> Quality:
        """Mean KL, share of top-1 agreement and perplexity(candidate) / perplexity(reference).

        ``tokens`` bounds the work: sequences beyond that many tokens are left out, the first never.
        """
        kl: list[npt.NDArray[np.float64]] = []
        same: list[npt.NDArray[np.bool_]] = []
        losses: list[Floats] = []
        spent = 0
        for sequence, expected in zip(self._sequences, self._expected, strict=True):
            spent += len(sequence)
            if kl and tokens is not None and spent > tokens:
                break
            targets = np.asarray(sequence[1:], np.int64)
            found = log_softmax(candidate.logits(sequence[:-1]))
            kl.append(kl_divergence(expected, found))
            same.append(top1_agreement(expected, found))
            losses.append(negative_log_likelihood(found, targets) - negative_log_likelihood(expected, targets))
        return Quality(
            kl=float(np.concatenate(kl).mean()),
            top1_agreement=float(np.concatenate(same).mean()),
            ppl_ratio=float(np.exp(np.concatenate(losses).mean(dtype=np.float64))),
            positions=sum(map(len, kl)),
        )


def judge(quality: Quality, limits: Gate) -> dict[str, dict[str, Any]]:
    """The quality gates by name: value, limit, and whether it is within; a value that is not a number never is."""
    return {
        "kl": _gate(quality.kl <= limits.max_kl, quality.kl, limits.max_kl),
        "top1_agreement": _gate(quality.top1_agreement >= limits.min_top1, quality.top1_agreement, limits.min_top1),
        "ppl_ratio": _gate(quality.ppl_ratio <= limits.max_ppl_ratio, quality.ppl_ratio, limits.max_ppl_ratio),
    }


def overspent(quality: Quality, limits: Gate) -> str:
    """Which figure of a table alone is beyond its share of the limit, in words; empty where none is."""
    share = Gate(
        max_kl=limits.max_kl * _TABLE_SHARE,
        min_top1=1 - (1 - limits.min_top1) * _TABLE_SHARE,
        max_ppl_ratio=1 + (limits.max_ppl_ratio - 1) * _TABLE_SHARE,
    )
    failed = [(name, gate) for name, gate in judge(quality, share).items() if not gate["passed"]]
    return "; ".join(f"{name} {gate['value']} alone is beyond {gate['limit']:.4g}" for name, gate in failed)


def parity_gate(model: Model, limit: float = SELF_LIMIT) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The build's ladder against itself computed plainly: every rung, and the gate on the worst of them.

    How far it is from fp32 is quality's business; this finds faults of caching, batching, masks and packing.
    """
    runtime = model.runtime
    rungs = list(
        climb(
            Alone(model),
            model,
            vocab_size=runtime.vocab_size,
            max_length=runtime.max_length,
            label_ids=runtime.score.label_ids if runtime.score else None,
            batches=runtime.interface in ("shared", "stateful"),
            limit=limit,
        )
    )
    worst = max(rung.difference for rung in rungs)
    return [rung.as_dict() for rung in rungs], _gate(all(rung.passed for rung in rungs), worst, limit)


def standard_gate(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rungs of standard.onnx against the model.onnx of the same build, and the gate on the worst of them."""
    rungs = standard_rungs(folder, limit=SELF_LIMIT)
    worst = max(rung.difference for rung in rungs)
    return [rung.as_dict() for rung in rungs], _gate(all(rung.passed for rung in rungs), worst, SELF_LIMIT)


def same_scores_gate(apart: Model, whole: Model) -> dict[str, Any]:
    """The gate that a build which took its scoring graph from ``apart`` gives the same scores, run the same way."""
    apart, whole = (
        Model(model.path, replace(model.runtime, parallel_items=False), model.tokenizer, model.runtime.threads)
        for model in (apart, whole)
    )
    ids = np.random.default_rng(SEED).integers(0, whole.runtime.vocab_size, min(24, whole.runtime.max_length)).tolist()
    cut = max(1, len(ids) // 2)
    width = max(1, min(3, len(ids) - cut))
    prefix, items = ids[:cut], [ids[i : i + width] for i in range(0, cut, width)]
    difference = float(np.abs(apart.score_ids(prefix, items) - whole.score_ids(prefix, items)).max())
    return _gate(difference == 0, difference, 0.0)


def speed_gate(reference: Model, candidate: Model) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Time of ``candidate`` over time of ``reference`` per phase (below 1 is faster; None: no such task), and the gate.

    prefill: 128 tokens to the first new one; decode: 32 further steps; score: one request of 10 items of 30 tokens
    behind a prefix of 32; each shortened to the context. The gate fails a build that is slower in every phase it has: a
    build is made for one phase and may pay in another, and selection sees all three.
    """
    times: dict[str, tuple[list[float], list[float]]] = {}
    for turn in range(_WARM_UP + _ROUNDS):
        for side in (0, 1) if turn % 2 else (1, 0):
            for phase, seconds in _phases((reference, candidate)[side], turn).items():
                if turn >= _WARM_UP:
                    times.setdefault(phase, ([], []))[side].append(seconds)
    ratios = {phase: median(found) / median(own) for phase, (own, found) in times.items()}
    best = min(ratios.values())
    return {f"{phase}_ratio": ratios.get(phase) for phase in ("prefill", "decode", "score")}, _gate(best < 1, best, 1.0)


def _gate(passed: bool, value: float, limit: float) -> dict[str, Any]:
    return {"passed": bool(passed), "value": finite(value), "limit": limit}


def finite(value: float) -> float | None:
    """``value``, or None where JSON has no way to write it: a build that computes NaN is recorded too, as failed."""
    return value if math.isfinite(value) else None


def _phases(model: Model, turn: int) -> dict[str, float]:
    """Seconds of each phase in one pass over ``model``, whose tokens are others in each turn: nothing is kept ready."""
    room, vocabulary = model.runtime.max_length, model.runtime.vocab_size
    ids = np.random.default_rng([SEED, turn]).integers(0, vocabulary, room).tolist()
    steps = min(_DECODE_TOKENS, room // 4)
    prompt = ids[: min(_PREFILL_TOKENS, room - steps - 1)]
    prefill, decode = generation_seconds(model, prompt, steps)
    seconds = {"prefill": prefill, "decode": decode}
    if "score" in model.tasks:
        item = min(_SCORE_ITEM_TOKENS, room // 4)
        count = max(1, min(_SCORE_ITEMS, (room - _SCORE_PREFIX) // item))
        started = time.perf_counter()
        model.score_ids(ids[: min(_SCORE_PREFIX, room // 4)], [ids[i : i + item] for i in range(count)])
        seconds["score"] = time.perf_counter() - started
    return seconds
