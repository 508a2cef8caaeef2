"""Records of text and of scoring, read through `datasets`, as pieces of tokens for training and calibration.

A generate record (prompt, completion) counts its completion; a text record counts all of it; a score record (prefix,
items, labels) counts each item's label word as much as all the tokens before it together. Tokens are those of the
runtime: BOS and prompt by the tokenizer's own post-processor, the rest encoded apart and appended. Knows nothing of
rows, models and losses.
"""

import glob
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from tokenizers import Tokenizer

from slmdeploy.checkpoint import label_token_ids, read_config, tokenizer_file
from slmdeploy.errors import CorruptArtifactError, InputError

Kind = Literal["generate", "score"]
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
COLUMNS = {"generate": {"prompt", "completion"}, "text": {"text"}, "score": {"prefix", "items", "labels"}}
SHUFFLE_BUFFER = 50_000
ENCODE_AT_ONCE = 64
# What datasets raises for files and datasets that are not as they should be; parsers raise kinds of ValueError.
UNREADABLE = (ValueError, TypeError, DatasetGenerationError, DatasetNotFoundError, ConnectionError)


@dataclass(frozen=True)
class Source:
    """Records of one kind in one place; ``records`` yields dicts with the line they stand on as ``_line``."""

    name: str
    kind: Kind
    records: IterableDataset

    def shuffled(self, seed: int) -> Iterator[dict[str, Any]]:
        """One pass in the order of ``seed``; what cannot be parsed is an InputError that names the file."""
        records = iter(self.records.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER))
        while (record := _next(records, self.name)) is not None:
            yield record


@dataclass(frozen=True)
class Part:
    """A source of a mixture, and how many rows it gives for each of the other parts' of its kind."""

    weight: float
    source: Source


@dataclass
class Tally:
    """What became of the records, for the manifest."""

    records: int = 0
    truncated: int = 0
    dropped: int = 0
    counted_tokens: int = 0
    row_tokens: int = 0
    rows_of_parts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """One sequence: token ids from BOS on, and how much predicting each of them counts.

    Items of one query bear its number as ``query``, from 1; 0 is no item. An item's last token is its label word.
    """

    ids: list[int]
    weights: list[float]
    query: int = 0


@dataclass(frozen=True)
class Texts:
    """How records become tokens: the tokenizer, the ids that end a text, those of the label words, items per visit.

    ``vocabulary`` is how many tokens the model knows, which may be fewer than its tokenizer has; None where unknown.
    """

    tokenizer: Tokenizer
    end: tuple[int, ...] = ()
    label_ids: tuple[int, int] | None = None
    items: int = 3
    vocabulary: int | None = None
    tally: Tally = field(default_factory=Tally)


def open_sources(data: Path | str, split: str) -> dict[Kind, Source]:
    """The generate and score records of a split: of a folder ``generate.SPLIT.jsonl`` and ``score.SPLIT.jsonl``, of a
    file or a Hugging Face dataset whatever its columns say. A part that is not there is left out.

    Raises InputError when nothing is there, nothing is in it, or the columns are of no known kind.
    """
    path = Path(data)
    if path.is_dir():
        found = {}
        for kind in ("generate", "score"):
            files = [file for suffix in FORMATS if (file := path / f"{kind}.{split}{suffix}").is_file()]
            if files:
                found[kind] = _source(str(files[0]), FORMATS[files[0].suffix], "train")
        if not found and split == "train":
            raise InputError(f"{path} holds neither generate.{split}.jsonl nor score.{split}.jsonl: add one of them")
        return {source.kind: source for source in found.values()}
    if path.is_file():
        if path.suffix not in FORMATS:
            raise InputError(f"{path} is of a kind that is not read: use one of {', '.join(FORMATS)}")
        source = _source(str(path), FORMATS[path.suffix], "train") if split == "train" else None
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(data)) and not str(data).endswith(tuple(FORMATS)):
        source = _source(str(data), None, split)
    else:
        raise InputError(f"{data} does not exist: give a folder, a file or a Hugging Face dataset as owner/name")
    return {source.kind: source} if source else {}


def _source(name: str, loader: str | None, split: str) -> Source:
    """Open as a stream, which writes no cache and reads no more than is asked for."""
    try:
        if loader:
            # escaped, since a name with [ or * would be taken for a pattern
            records = load_dataset(loader, data_files=glob.escape(name), split=split, streaming=True)
        else:
            records = load_dataset(name, split=split, streaming=True)
        first = next(iter(records))
    except StopIteration as error:  # also what datasets itself lets out at an empty file
        raise InputError(f"{name} is empty: it needs at least one record") from error
    except UNREADABLE as error:
        raise InputError(f"{name} ({split}) cannot be read: {_line(error)}") from error
    kind = _kind(name, set(first))
    return Source(name, kind, records.map(lambda record, index: {**record, "_line": index + 1}, with_indices=True))


def _next(records: Iterator[dict[str, Any]], name: str) -> dict[str, Any] | None:
    try:
        return next(records, None)
    except UNREADABLE as error:
        raise InputError(f"{name} cannot be read: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _kind(name: str, columns: set[str]) -> Kind:
    for kind, needed in COLUMNS.items():
        if needed <= columns:
            return "score" if kind == "score" else "generate"
    raise InputError(
        f"{name} has the columns {', '.join(sorted(columns))}: needed are prompt and completion, or text, "
        "or prefix, items and labels"
    )


def make_texts(checkpoint: Path, end: tuple[int, ...], labels: tuple[str, str], scored: bool, items: int = 3) -> Texts:
    """The tokenizer of a checkpoint, checked; with ``scored``, the label words must be one token each.

    ``end`` are the ids appended to a text; ``items`` of a scoring record are taken per visit. Raises InputError when
    tokenizer.json is missing or a label word unfit.
    """
    label_ids = label_token_ids(checkpoint, labels) if scored else None
    file = tokenizer_file(checkpoint)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the binding raises nothing narrower
        raise CorruptArtifactError(f"{file} is not a tokenizer ({error}); save or download it again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Texts(tokenizer, end, label_ids, items, read_config(checkpoint).get("vocab_size"))


def pieces(source: Source, texts: Texts, length: int, seed: int) -> Iterator[Piece]:
    """Pieces of at most ``length`` tokens, pass after pass without end, each pass in an order of its own.

    Raises InputError when a whole pass gives none.
    """
    turn = 0
    picker = random.Random(seed)
    cut: Callable[[list[dict[str, Any]]], Iterator[Piece]] = (
        partial(_score_pieces, source, texts, length, picker)
        if source.kind == "score"
        else partial(_text_pieces, source, texts, length)
    )
    while True:
        some = False
        for batch in _batches(source.shuffled(seed + turn)):
            texts.tally.records += len(batch)
            for piece in cut(batch):
                some = some or any(piece.weights)
                yield Piece(known(source, texts, piece.ids), piece.weights, piece.query)
        if not some:
            raise InputError(
                f"{source.name} has no record that fits into {length} tokens with one to predict: raise length, or "
                "fill in what is empty"
            )
        turn += 1


def known(source: Source, texts: Texts, ids: list[int]) -> list[int]:
    """``ids``, all of which the model knows. Raises InputError for one beyond its vocabulary."""
    if texts.vocabulary is not None and max(ids, default=0) >= texts.vocabulary:
        last = max(ids)
        raise InputError(
            f"{source.name} has a text with the token {texts.tokenizer.id_to_token(last)!r}, number {last}, and the "
            f"model has a vocabulary of {texts.vocabulary}: resize its embeddings, or take the token out"
        )
    return ids


def _batches(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for record in records:
        batch.append(record)
        if len(batch) == ENCODE_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _strings(source: Source, records: list[dict[str, Any]], column: str) -> list[str]:
    for record in records:
        if not isinstance(record.get(column), str):
            raise InputError(f"{source.name}:{record['_line']}: {column} is {record.get(column)!r}, but must be text")
    return [record[column] for record in records]


def _text_pieces(source: Source, texts: Texts, length: int, records: list[dict[str, Any]]) -> Iterator[Piece]:
    for prompt, answer in _encode_texts(source, texts, records):
        ids = prompt + answer
        weights = [0.0] * len(prompt) + [1.0] * len(answer)
        if "text" in records[0]:
            for start in range(0, len(ids), length):
                if any(weights[start + 1 : start + length]):
                    yield Piece(ids[start : start + length], [0.0, *weights[start + 1 : start + length]])
        elif len(prompt) < length:
            texts.tally.truncated += len(ids) > length
            yield Piece(ids[:length], weights[:length])
        else:
            texts.tally.dropped += 1


def _encode_texts(source: Source, texts: Texts, records: list[dict[str, Any]]) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt ids (BOS first) and answer ids (end of text last) of each record; of a text record the prompt is BOS."""
    plain = "text" in records[0]
    prompts = [""] * len(records) if plain else _strings(source, records, "prompt")
    answers = _strings(source, records, "text" if plain else "completion")
    encode = texts.tokenizer.encode_batch
    for prompt, answer in zip(encode(prompts), encode(answers, add_special_tokens=False), strict=True):
        yield prompt.ids, [*answer.ids, *texts.end]


def _score_pieces(
    source: Source, texts: Texts, length: int, picker: random.Random, records: list[dict[str, Any]]
) -> Iterator[Piece]:
    assert texts.label_ids is not None, "make_texts was told of no scoring records"
    for record, prefix in zip(records, texts.tokenizer.encode_batch(_strings(source, records, "prefix")), strict=True):
        items, labels = _checked_items(source, record)
        # One relevant item and a few others per visit: more queries are worth more than more of one query's items.
        relevant = [i for i, label in enumerate(labels) if label == 1]
        others = [i for i, label in enumerate(labels) if label == 0]
        chosen = picker.sample(relevant, min(1, len(relevant)))
        chosen += picker.sample(others, min(texts.items - 1, len(others)))
        encoded = texts.tokenizer.encode_batch([items[i] for i in chosen], add_special_tokens=False)
        for which, item in zip(chosen, encoded, strict=True):
            ids = [*prefix.ids, *item.ids, texts.label_ids[labels[which]]]
            if len(ids) > length:
                texts.tally.dropped += 1
                continue
            # The label word alone says little of how the teacher reads a query: with these, the AUC recovers faster.
            before = len(ids) - 2
            yield Piece(ids, [0.0, *([1 / before] * before), 1.0], query=record["_line"])


def _checked_items(source: Source, record: dict[str, Any]) -> tuple[list[str], list[int]]:
    items, labels = record.get("items"), record.get("labels")
    where = f"{source.name}:{record['_line']}"
    if not items or not all(isinstance(item, str) for item in items):
        raise InputError(f"{where}: items must be a list of texts with at least one")
    if not isinstance(labels, list) or len(labels) != len(items) or any(label not in (0, 1) for label in labels):
        raise InputError(f"{where}: labels must be one 0 or 1 for each of the {len(items)} items")
    return items, labels


def prompts(source: Source, texts: Texts, *, length: int, count: int, seed: int) -> list[list[int]]:
    """The ends of up to ``count`` prompts, BOS first, at most ``length`` tokens; half of a text is its prompt.

    Raises InputError where all are empty.
    """
    found: list[list[int]] = []
    for batch in _batches(source.shuffled(seed)):
        for prompt, answer in _encode_texts(source, texts, batch):
            ids = prompt + answer[: len(answer) // 2] if "text" in batch[0] else prompt
            if not ids:
                continue
            ids = known(source, texts, ids)
            found.append(ids if len(ids) <= length else [*ids[:1], *ids[len(ids) - length + 1 :]])
            if len(found) == count:
                return found
    if not found:
        raise InputError(f"{source.name} has no prompt that is not empty: fill some in")
    return found
