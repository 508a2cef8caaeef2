"""Quality of every candidate on the held-out test split: bits per byte, AUC, MRR@10, and closeness to the baseline.

Candidates answer through their workers, so this needs no torch and sees what the device will compute. All of them see
the same records, a seeded subset that fits a token budget and every candidate's context; intervals are bootstrapped
over records and queries, because pairs of one query are not independent. Metrics are defined in slmdeploy/metrics.py,
tokenisation in docs/data.md. Knows nothing of workloads or time.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from slmdeploy.errors import InputError, SpecError
from slmdeploy.profiling.measure import Interval, bootstrap
from slmdeploy.profiling.process import Client

Floats = NDArray[np.float64]
Encoded = tuple[list[int], list[list[int]]]
"""Ids of the prompt or prefix, and of what stands behind it: one completion, or the items."""


@dataclass(frozen=True)
class Candidate:
    """What quality needs of one candidate: who answers, how text becomes ids, and how long a text may be."""

    client: Client
    tokenizer: Path
    max_length: int
    tasks: tuple[str, ...]


@dataclass
class Quality:
    """Metrics and 95 % intervals of one candidate, and how many records they stand on."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, value: float, interval: Interval) -> None:
        """Add one metric."""
        self.metrics[name], self.intervals[name] = value, interval


def evaluate(
    candidates: Mapping[str, Candidate],
    data: Path,
    *,
    baseline: str | None,
    tokens: int,
    seed: int,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Quality]:
    """Quality of every candidate on ``data``/{generate,score}.test.jsonl, for the tasks that each one has.

    ``tokens`` bounds how many tokens each task's subset has. ``done`` is called after each record of each candidate.
    Raises InputError when no test file is there or a file has no record that fits, SpecError on a malformed record.
    """
    found: dict[str, Quality] = {name: Quality() for name in candidates}
    files = {task: data / f"{task}.test.jsonl" for task in ("generate", "score")}
    if not any(file.is_file() for file in files.values()):
        raise InputError(f"{data} has neither generate.test.jsonl nor score.test.jsonl: quality needs one of them")
    for task, run in (("generate", _language_modelling), ("score", _ranking)):
        able = {name: candidate for name, candidate in candidates.items() if task in candidate.tasks}
        if files[task].is_file() and able:
            run(able, files[task], found, baseline if baseline in able else None, tokens, seed, done)
    return found


def _language_modelling(
    candidates: Mapping[str, Candidate],
    file: Path,
    found: Mapping[str, Quality],
    baseline: str | None,
    tokens: int,
    seed: int,
    done: Callable[[str], None],
) -> None:
    """bits_per_byte for all; kl_to_baseline and top1_agreement where the tokenizer is the baseline's."""
    records = read_records(file, {"prompt": str, "completion": str})
    chosen = _choose(candidates, file, [(r["prompt"], [r["completion"]]) for r in records], tokens, seed)
    sizes = [len(records[index]["completion"].encode()) for index in chosen]
    order = sorted(candidates, key=lambda name: name != baseline)  # the baseline first: the others are compared with it
    bits: dict[str, list[float]] = {name: [] for name in order}
    closeness: dict[str, list[tuple[float, int, int]]] = {name: [] for name in order}
    with tempfile.TemporaryDirectory(prefix="slmdeploy-") as folder:
        for encoded in chosen.values():
            reference: NDArray[np.float32] | None = None
            for name in order:
                prompt, (completion,) = encoded[candidates[name].tokenizer]
                logp = _log_softmax(_logits(candidates[name].client, prompt, completion, Path(folder)))
                predicted = logp[np.arange(len(completion)), completion]
                bits[name].append(-float(predicted.sum(dtype=np.float64)) / np.log(2))
                if name == baseline:
                    reference = logp
                elif reference is not None and candidates[name].tokenizer == candidates[str(baseline)].tokenizer:
                    closeness[name].append(divergence(reference, logp))
                done(name)
    for name in order:
        _report_bits(found[name], bits[name], sizes, seed)
        _report_closeness(found[name], closeness[name], seed)


def _logits(client: Client, prompt: list[int], completion: list[int], folder: Path) -> NDArray[np.float32]:
    """Logits [completion tokens, vocabulary] that predict each token of the completion."""
    path = folder / "logits.npy"
    client.ask("logits", input_ids=[*prompt, *completion[:-1]], first=len(prompt) - 1, path=str(path))
    return np.asarray(np.load(path, allow_pickle=False), np.float32)


def _report_bits(quality: Quality, bits: Sequence[float], sizes: Sequence[int], seed: int) -> None:
    pairs = np.array([bits, sizes], np.float64).T
    interval = bootstrap(pairs, lambda drawn: drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1), seed)
    quality.put("bits_per_byte", float(pairs[:, 0].sum() / pairs[:, 1].sum()), interval)
    quality.counts |= {"generate_records": len(bits), "generate_bytes": int(pairs[:, 1].sum())}


def _report_closeness(quality: Quality, closeness: Sequence[tuple[float, int, int]], seed: int) -> None:
    if not closeness:
        return
    table = np.array(closeness, np.float64)
    for name, column in (("kl_to_baseline", 0), ("top1_agreement", 1)):
        interval = bootstrap(table[:, [column, 2]], lambda drawn: drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1), seed)
        quality.put(name, float(table[:, column].sum() / table[:, 2].sum()), interval)


def _ranking(
    candidates: Mapping[str, Candidate],
    file: Path,
    found: Mapping[str, Quality],
    baseline: str | None,
    tokens: int,
    seed: int,
    done: Callable[[str], None],
) -> None:
    """auc, auc_per_query and mrr_at_10; an item's score is logit(yes) - logit(no)."""
    records = read_records(file, {"prefix": str, "items": list, "labels": list})
    for number, record in enumerate(records, 1):
        if len(record["items"]) != len(record["labels"]) or not set(record["labels"]) <= {0, 1}:
            raise SpecError(f"{file}:{number}: labels must be one 0 or 1 for each of the {len(record['items'])} items")
    chosen = _choose(candidates, file, [(r["prefix"], r["items"]) for r in records], tokens, seed)
    labels = [np.array(records[index]["labels"]) for index in chosen]
    scores: dict[str, list[Floats]] = {name: [] for name in candidates}
    for encoded in chosen.values():
        for name, candidate in candidates.items():
            prefix, items = encoded[candidate.tokenizer]
            logits = np.array(candidate.client.ask("score", prefix_ids=prefix, item_ids=items)["label_logits"])
            scores[name].append(logits[:, 1] - logits[:, 0])
            done(name)
    for name in candidates:
        _report_ranking(found[name], scores[name], labels, file, seed)


def _report_ranking(
    quality: Quality, scores: Sequence[Floats], labels: Sequence[NDArray[np.int64]], file: Path, seed: int
) -> None:
    pooled, relevant = np.concatenate(scores), np.concatenate(labels)
    if len(set(relevant.tolist())) < 2:
        raise InputError(f"{file}: the chosen records hold one label only, so AUC is not defined: give more of them")
    ranks = [reciprocal_rank(s, y) for s, y in zip(scores, labels, strict=True) if y.any()]
    within = [auc(s, y) for s, y in zip(scores, labels, strict=True) if y.any() and not y.all()]

    def pooled_auc(drawn: Floats) -> Floats:
        picks = [drawn_queries.astype(int) for drawn_queries in drawn]
        return np.array(
            [
                auc(np.concatenate([scores[i] for i in pick]), np.concatenate([labels[i] for i in pick]))
                for pick in picks
            ]
        )

    quality.put("auc", auc(pooled, relevant), bootstrap(np.arange(len(scores)), pooled_auc, seed))
    quality.put("mrr_at_10", float(np.mean(ranks)), bootstrap(ranks, lambda drawn: drawn.mean(-1), seed))
    if within:
        quality.put("auc_per_query", float(np.mean(within)), bootstrap(within, lambda drawn: drawn.mean(-1), seed))
    quality.counts |= {"score_queries": len(scores), "score_items": len(pooled)}


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve: share of (relevant, other) pairs in the right order, a tie counting half.

    By ranks (Mann and Whitney 1947), so n log n. NaN when only one label is there.
    """
    values, relevant = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    positive, negative = values[relevant], np.sort(values[~relevant])
    below = np.searchsorted(negative, positive, "left")
    tied = np.searchsorted(negative, positive, "right") - below
    pairs = len(positive) * len(negative)
    return float((below.sum() + tied.sum() / 2) / pairs) if pairs else float("nan")


def reciprocal_rank(scores: ArrayLike, labels: ArrayLike, cutoff: int = 10) -> float:
    """1 / rank of the best relevant item, 0 beyond ``cutoff``; among equal scores it ranks last."""
    values, relevant = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    best = values[relevant].max()
    rank = 1 + int((values[~relevant] >= best).sum())
    return 1.0 / rank if rank <= cutoff else 0.0


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> tuple[float, int, int]:
    """Sum over positions of KL(reference || other) in nats, positions with the same first token, positions.

    Both are log-probabilities [positions, vocabulary].
    """
    kl = (np.exp(reference) * (reference - other)).sum(dtype=np.float64)
    same = int((reference.argmax(-1) == other.argmax(-1)).sum())
    return float(kl), same, len(reference)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float32)


def read_records(file: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The JSON lines of ``file``. Raises SpecError naming file, line and key where a field is missing or mistyped."""
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SpecError(f"{file}:{number}: not a line of JSON: {error}") from error
        for name, kind in fields.items():
            if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                raise SpecError(f"{file}:{number}: {name!r} must be there and be a {kind.__name__}")
        records.append(record)
    return records


def _choose(
    candidates: Mapping[str, Candidate], file: Path, texts: Sequence[tuple[str, list[str]]], tokens: int, seed: int
) -> dict[int, dict[Path, Encoded]]:
    """Ids under every tokenizer of the records that all candidates are measured on, by record index.

    A seeded random subset of what fits every context and holds ``tokens`` tokens at most, one record at least; a larger
    budget only adds records.
    """
    tokenizers = {path: Tokenizer.from_file(str(path)) for path in {c.tokenizer for c in candidates.values()}}
    room = {path: min(c.max_length for c in candidates.values() if c.tokenizer == path) for path in tokenizers}
    chosen: dict[int, dict[Path, Encoded]] = {}
    spent = 0
    for index in np.random.default_rng(seed).permutation(len(texts)).tolist():
        encoded = {path: encode(tokenizer, *texts[index]) for path, tokenizer in tokenizers.items()}
        if not all(_fits(one, room[path]) for path, one in encoded.items()):
            continue
        spent += max(len(head) + sum(map(len, tails)) for head, tails in encoded.values())
        if chosen and spent > tokens:
            break
        chosen[index] = encoded
    if not chosen:
        raise InputError(f"{file} has no record that fits the context of every candidate ({min(room.values())} tokens)")
    return chosen


def encode(tokenizer: Tokenizer, head: str, tails: Sequence[str]) -> Encoded:
    """Ids of a prompt or prefix, with its special tokens, and of what stands behind it, each encoded by itself."""
    behind = tokenizer.encode_batch(list(tails), add_special_tokens=False)
    return tokenizer.encode(head, add_special_tokens=True).ids, [one.ids for one in behind]


def _fits(encoded: Encoded, max_length: int) -> bool:
    head, tails = encoded
    return bool(head) and bool(tails) and all(tail and len(head) + len(tail) <= max_length for tail in tails)
