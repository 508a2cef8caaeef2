"""Quality of every candidate on the held-out test split: bits per byte, AUC, MRR@10, and closeness to the baseline.

Candidates answer through their workers, so this needs no torch and sees what the device will compute. All of them see
the same records, a seeded subset that fits a token budget and every candidate's context; intervals are bootstrapped
over records and queries, because pairs of one query are not independent. Metrics are defined in slmdeploy/metrics.py,
tokenisation in docs/data.md. Knows nothing of workloads or time.
"""

import hashlib
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
from slmdeploy.profiling.process import Client
from slmdeploy.profiling.quality_cache import Cache, Quality
from slmdeploy.profiling.statistics import Floats, draws

Encoded = tuple[list[int], list[list[int]]]
"""Ids of the prompt or prefix, and of what stands behind it: one completion, or the items."""
FORMAT = 1
"""Of what is cached: raised whenever a metric is computed in another way."""


@dataclass(frozen=True)
class Candidate:
    """What quality needs of one candidate: who answers, how text becomes ids, how long a text may be, its tasks.

    ``fp32`` names the candidate that is the same graph in fp32, if one is there. ``key`` is what its answers are known
    by, so that they are not asked for again (None: always ask).
    """

    client: Client
    tokenizer: Path
    max_length: int
    tasks: tuple[str, ...]
    fp32: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class Asked:
    """What one task is judged on: its file, the candidates that have the task, and which records all of them see."""

    file: Path
    candidates: Mapping[str, Candidate]
    baseline: str | None
    seed: int
    done: Callable[[str], None]

    def references(self, name: str) -> dict[str, str]:
        """The candidates that ``name`` is compared with, by what they are to it: baseline, fp32."""
        own = self.candidates[name]
        named = {"baseline": self.baseline, "fp32": own.fp32}
        return {
            kind: other
            for kind, other in named.items()
            if other is not None
            and other != name
            and other in self.candidates
            and self.candidates[other].tokenizer == own.tokenizer
        }

    def key(self, name: str, records: Sequence[dict[str, Any]]) -> str | None:
        """What the answers of a candidate are known by: itself, its references, the records; None where unknown."""
        involved = {"itself": name, **self.references(name)}
        keys = {kind: self.candidates[one].key for kind, one in involved.items()}
        if None in keys.values():
            return None
        content = json.dumps([FORMAT, self.file.name, self.seed, keys, records], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def evaluate(
    candidates: Mapping[str, Candidate],
    data: Path,
    *,
    baseline: str | None,
    tokens: int,
    seed: int,
    cache: Cache,
    done: Callable[[str], None] = lambda name: None,
) -> dict[str, Quality]:
    """Quality of every candidate on ``data``/{generate,score}.test.jsonl, for the tasks that each one has.

    ``tokens`` bounds how many tokens each task's subset has. ``cache`` has what was found before, by content. ``done``
    is called after each record of each candidate. Raises InputError when no test file is there or a file has no record
    that fits, SpecError on a malformed record.
    """
    found: dict[str, Quality] = {name: Quality() for name in candidates}
    files = {task: data / f"{task}.test.jsonl" for task in ("generate", "score")}
    if not any(file.is_file() for file in files.values()):
        raise InputError(f"{data} has neither generate.test.jsonl nor score.test.jsonl: quality needs one of them")
    for task, run in (("generate", _language_modelling), ("score", _ranking)):
        able = {name: candidate for name, candidate in candidates.items() if task in candidate.tasks}
        if files[task].is_file() and able:
            asked = Asked(files[task], able, baseline if baseline in able else None, seed, done)
            for name, quality in run(asked, tokens, cache).items():
                found[name].metrics |= quality.metrics
                found[name].drawn |= quality.drawn
                found[name].counts |= quality.counts
    return found


def _language_modelling(asked: Asked, tokens: int, cache: Cache) -> dict[str, Quality]:
    """bits_per_byte, perplexity, exact_match; and closeness to baseline and fp32 where the tokenizer is theirs."""
    records = read_records(asked.file, {"prompt": str, "completion": str})
    chosen = _choose(
        asked.candidates, asked.file, [(r["prompt"], [r["completion"]]) for r in records], tokens, asked.seed
    )
    keys = {name: asked.key(name, [records[index] for index in chosen]) for name in asked.candidates}
    found = {name: quality for name, key in keys.items() if (quality := cache.get(key)) is not None}
    missing = [name for name in asked.candidates if name not in found]
    sizes = [len(records[index]["completion"].encode()) for index in chosen]
    likelihoods = _likelihoods(asked, missing, list(chosen.values()))
    for name in missing:
        found[name] = _judged(likelihoods[name], sizes, asked.seed)
        cache.put(keys[name], found[name])
    return found


@dataclass
class Likelihood:
    """What one candidate says of each record: bits, tokens, whether all of it is greedy; and closeness to others."""

    bits: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    to: dict[str, list[tuple[float, int, int]]] = field(default_factory=dict)


_TO = {"baseline": ("kl_to_baseline", "top1_agreement"), "fp32": ("kl_to_fp32", "top1_to_fp32")}


def _likelihoods(asked: Asked, missing: Sequence[str], encoded: Sequence[dict[Path, Encoded]]) -> dict[str, Likelihood]:
    """Ask each candidate of ``missing``, and those that they are compared with, about each record."""
    candidates, references = asked.candidates, {name: asked.references(name) for name in missing}
    needed = {other for others in references.values() for other in others.values()}
    # Whoever is compared with comes first; the baseline before all, for an fp32 build is compared with it in its turn.
    order = sorted({*needed, *missing}, key=lambda name: (name != asked.baseline, name not in needed))
    found: dict[str, Likelihood] = {name: Likelihood() for name in missing}
    with tempfile.TemporaryDirectory(prefix="slmdeploy-") as folder:
        for one in encoded:
            kept: dict[str, NDArray[np.float32]] = {}
            for name in order:
                prompt, (completion,) = one[candidates[name].tokenizer]
                logp = _log_softmax(_logits(candidates[name].client, prompt, completion, Path(folder)))
                if name in needed:
                    kept[name] = logp
                if name in found:
                    _note(found[name], logp, completion)
                asked.done(name)
                for kind, other in references.get(name, {}).items():
                    found[name].to.setdefault(kind, []).append(divergence(kept[other], logp))
    return found


def _note(likelihood: Likelihood, logp: NDArray[np.float32], completion: Sequence[int]) -> None:
    predicted = logp[np.arange(len(completion)), completion]
    likelihood.bits.append(-float(predicted.sum(dtype=np.float64)) / np.log(2))
    likelihood.tokens.append(len(completion))
    likelihood.greedy.append(bool((logp.argmax(-1) == np.asarray(completion)).all()))


def _logits(client: Client, prompt: list[int], completion: list[int], folder: Path) -> NDArray[np.float32]:
    """Logits [completion tokens, vocabulary] that predict each token of the completion."""
    path = folder / "logits.npy"
    client.ask("logits", input_ids=[*prompt, *completion[:-1]], first=len(prompt) - 1, path=str(path))
    return np.asarray(np.load(path, allow_pickle=False), np.float32)


def _judged(found: Likelihood, sizes: Sequence[int], seed: int) -> Quality:
    quality = Quality(counts={"generate_records": len(found.bits), "generate_bytes": sum(sizes)})
    quality.put("bits_per_byte", *_share(found.bits, sizes, seed))
    value, drawn = _share(found.bits, found.tokens, seed)
    quality.put("perplexity", 2.0**value, np.exp2(drawn))
    quality.put("exact_match", *_share(found.greedy, [1] * len(found.greedy), seed))
    for kind, rows in found.to.items():
        divergences, same, positions = zip(*rows, strict=True)
        for name, column in zip(_TO[kind], (divergences, same), strict=True):
            quality.put(name, *_share(column, positions, seed))
    return quality


def _share(part: Sequence[float], whole: Sequence[float], seed: int) -> tuple[float, Floats]:
    """Sum of ``part`` over sum of ``whole``, and its draws over records."""
    table = np.array([part, whole], np.float64).T
    return float(table[:, 0].sum() / table[:, 1].sum()), draws(
        table, lambda drawn: drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1), seed
    )


def _ranking(asked: Asked, tokens: int, cache: Cache) -> dict[str, Quality]:
    """auc, auc_per_query, mrr_at_10, ndcg_at_10 and accuracy; an item's score is logit(yes) - logit(no)."""
    records = read_records(asked.file, {"prefix": str, "items": list, "labels": list})
    for number, record in enumerate(records, 1):
        if len(record["items"]) != len(record["labels"]) or not set(record["labels"]) <= {0, 1}:
            raise SpecError(
                f"{asked.file}:{number}: labels must be one 0 or 1 for each of the {len(record['items'])} items"
            )
    chosen = _choose(asked.candidates, asked.file, [(r["prefix"], r["items"]) for r in records], tokens, asked.seed)
    labels = [np.array(records[index]["labels"]) for index in chosen]
    keys = {name: asked.key(name, [records[index] for index in chosen]) for name in asked.candidates}
    found = {name: quality for name, key in keys.items() if (quality := cache.get(key)) is not None}
    missing = {name: candidate for name, candidate in asked.candidates.items() if name not in found}
    scores: dict[str, list[Floats]] = {name: [] for name in missing}
    for encoded in chosen.values():
        for name, candidate in missing.items():
            prefix, items = encoded[candidate.tokenizer]
            logits = np.array(candidate.client.ask("score", prefix_ids=prefix, item_ids=items)["label_logits"])
            scores[name].append(logits[:, 1] - logits[:, 0])
            asked.done(name)
    for name in missing:
        found[name] = _ranked(scores[name], labels, asked)
        cache.put(keys[name], found[name])
    return found


def _ranked(scores: Sequence[Floats], labels: Sequence[NDArray[np.int64]], asked: Asked) -> Quality:
    pooled, relevant = np.concatenate(scores), np.concatenate(labels)
    if len(set(relevant.tolist())) < 2:
        raise InputError(
            f"{asked.file}: the chosen records hold one label only, so AUC is not defined: give more of them"
        )
    quality = Quality(counts={"score_queries": len(scores), "score_items": len(pooled)})

    def pooled_auc(drawn: Floats) -> Floats:
        picks = [queries.astype(int) for queries in drawn]
        return np.array([auc(_picked(scores, pick), _picked(labels, pick)) for pick in picks])

    quality.put("auc", auc(pooled, relevant), draws(np.arange(len(scores)), pooled_auc, asked.seed))
    answered = [(s, y) for s, y in zip(scores, labels, strict=True) if y.any()]
    decidable = [(s, y) for s, y in answered if not y.all()]
    means: dict[str, list[float]] = {
        "mrr_at_10": [reciprocal_rank(s, y) for s, y in answered],
        "ndcg_at_10": [ndcg(s, y) for s, y in answered],
        "auc_per_query": [auc(s, y) for s, y in decidable],
    }
    for name, values in means.items():
        if values:
            quality.put(name, float(np.mean(values)), draws(values, lambda drawn: drawn.mean(-1), asked.seed))
    right = [float(((s > 0) == y.astype(bool)).sum()) for s, y in zip(scores, labels, strict=True)]
    quality.put("accuracy", *_share(right, [len(y) for y in labels], asked.seed))
    return quality


def _picked(parts: Sequence[NDArray[Any]], pick: NDArray[np.int64]) -> NDArray[Any]:
    return np.concatenate([parts[place] for place in pick])


def ndcg(scores: ArrayLike, labels: ArrayLike, cutoff: int = 10) -> float:
    """DCG / ideal DCG of the first ``cutoff`` ranks with gain 1 (Järvelin and Kekäläinen 2002); ties rank last."""
    values, relevant = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    order = np.lexsort((relevant, -values))
    gains = 1.0 / np.log2(np.arange(2, cutoff + 2))
    hits = relevant[order][:cutoff]
    ideal = gains[: min(cutoff, int(relevant.sum()))].sum()
    return float(gains[: len(hits)][hits].sum() / ideal)


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
