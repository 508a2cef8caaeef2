"""Which tokens a decoder build is compared on and calibrated on: records of a data folder, or what the graph writes.

Never the same: quality is judged on the validation split, ranges and second moments come from the training split.
Knows nothing of what is done with the tokens.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from slmdeploy.errors import InputError, SpecError
from slmdeploy.runtime.model import Model

SEED = 1131
SOURCE_DATA, SOURCE_TRAINING, SOURCE_SELF = "validation split", "training split", "self-generated"
_TOKENS = 3072
_SEQUENCE_TOKENS = 256
_KEPT_NUMBERS = 1 << 27  # reference log-probabilities held in memory: 512 MiB
_CALIBRATION_TOKENS = 16384
_OWN_CALIBRATION_TOKENS = 2048
"""Fewer of those that the graph writes itself, one at a time."""
_PARTS = {"generate": ("prompt", "completion"), "score": ("prefix", "items")}
Sequences = list[list[int]]


def sequences_for(reference: Model, data: Path | None) -> tuple[Sequences, str]:
    """Token sequences to compare on, 3,072 tokens or less in all, and where they come from.

    With ``data``: a seeded draw from its validation split, generate and score records alternating. Without: sampled
    from ``reference`` itself at temperature 1, which is text the model knows well and so the milder test.
    """
    length = _length(reference)
    budget = max(length, min(_TOKENS, _KEPT_NUMBERS // reference.runtime.vocab_size))
    if data is None:
        return [_sample(reference, length, seed) for seed in range(budget // length)], SOURCE_SELF
    sequences = _within(_records(reference, data, "valid"), length, budget)
    if not sequences:
        raise InputError(f"{data} has no record of two tokens or more in generate.valid.jsonl or score.valid.jsonl")
    return sequences, SOURCE_DATA


def calibration_for(reference: Model, data: Path | None, *, compared: int) -> tuple[Sequences, str]:
    """Token sequences to calibrate on, and where they come from: up to 16,384 tokens of the training split.

    Where there is none, validation records behind the ``compared`` first ones, which the gate sees; without such, or
    without ``data``, 2,048 tokens that ``reference`` writes.
    """
    length = _length(reference)
    if data is not None:
        for split, source, skip in (("train", SOURCE_TRAINING, 0), ("valid", SOURCE_DATA, compared)):
            records = islice(_records(reference, data, split), skip, None)
            if found := _within(records, length, _CALIBRATION_TOKENS):
                return found, source
    seeds = range(compared, compared + max(1, _OWN_CALIBRATION_TOKENS // length))
    return [_sample(reference, length, seed) for seed in seeds], SOURCE_SELF


def _length(reference: Model) -> int:
    return min(_SEQUENCE_TOKENS, reference.runtime.max_length)


def _within(records: Iterable[list[int]], length: int, budget: int) -> Sequences:
    """The first records of two tokens or more, each cut to ``length``, that have ``budget`` tokens in all."""
    found: Sequences = []
    for ids in records:
        if sum(map(len, found)) + len(ids[:length]) > budget:
            break
        found.append(ids[:length])
    return found


def _sample(reference: Model, length: int, seed: int) -> list[int]:
    bos = reference.runtime.bos_token_id
    start = [bos if bos is not None else seed % reference.runtime.vocab_size]
    return start + list(
        reference.generate_ids(start, max_new_tokens=length - 1, temperature=1.0, seed=SEED + seed, ignore_eos=True)
    )


def _records(reference: Model, data: Path, split: str) -> Iterator[list[int]]:
    """Token ids of one record of two tokens or more after another; its parts are encoded apart, as in use."""
    for head, tail in read_pairs(data, split):
        ids = list(reference.tokenizer.encode(head, add_special_tokens=True).ids)
        ids += reference.tokenizer.encode(tail, add_special_tokens=False).ids
        if len(ids) > 1:
            yield ids


def read_pairs(data: Path, split: str = "valid") -> Iterator[tuple[str, str]]:
    """Head and tail of each record of a split, tasks alternating, in a seeded order."""
    files = [data / f"{task}.{split}.jsonl" for task in _PARTS]
    texts = [_read(file, task) for file, task in zip(files, _PARTS, strict=True) if file.is_file()]
    for turn in range(max(map(len, texts), default=0)):
        for pairs in texts:
            if turn < len(pairs):
                yield pairs[turn]


def _read(path: Path, task: str) -> list[tuple[str, str]]:
    """Each record's head and what stands behind it (of a score record the first item), in a seeded order."""
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            head, tail = (json.loads(line)[key] for key in _PARTS[task])
            pair = (head, tail[0] if task == "score" else tail)
        except (ValueError, KeyError, TypeError, IndexError):
            pair = (None, None)
        if not all(isinstance(text, str) for text in pair):
            raise SpecError(f"{path}:{number}: not a record of the task {task} (docs/data.md): mend or remove the line")
        pairs.append(pair)
    return [pairs[i] for i in np.random.default_rng(SEED).permutation(len(pairs))]
