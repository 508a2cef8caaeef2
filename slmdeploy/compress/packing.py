"""Packs pieces of records into rows of tokens, and shares rows out among kinds of records and parts of a mixture.

Several pieces share a row: positions restart at each, and transformers keeps such sequences from seeing each other.
Knows pieces (data.py) and nothing of files, models and losses.
"""

import random
from collections.abc import Iterator, Mapping

import torch

from slmdeploy.compress.data import Kind, Part, Piece, Source, Texts, pieces
from slmdeploy.errors import InputError

LEAST_COUNTED = 32


def rows(stream: Iterator[Piece], texts: Texts, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Pack pieces into rows of ``length`` tokens: input_ids, position_ids, queries (int64 [length]), weights [length].

    ``weights[t]`` is the weight of predicting token t; a row's weights sum to one, so that rows count alike whatever
    they hold. ``queries`` is the number of the query at the label words of its items and 0 elsewhere; items that the
    end of a row parts from the others of their query are a list of their own. A piece of text is cut to the room that
    is left when enough of what counts stays.
    """
    waiting = next(stream)
    while True:
        ids: list[int] = []
        weights: list[float] = []
        positions: list[int] = []
        queries: list[int] = []
        while len(ids) < length:
            room = length - len(ids)
            taken = min(len(waiting.ids), room)
            if taken < len(waiting.ids) and sum(waiting.weights[:taken]) < LEAST_COUNTED:
                break
            ids += waiting.ids[:taken]
            weights += waiting.weights[:taken]
            positions += range(taken)
            queries += [0] * (taken - 1) + [waiting.query if taken == len(waiting.ids) else 0]
            waiting = next(stream)
        texts.tally.counted_tokens += sum(weight > 0 for weight in weights)
        texts.tally.row_tokens += length
        yield _tensors(ids, weights, positions, queries, length)


def _tensors(
    ids: list[int], weights: list[float], positions: list[int], queries: list[int], length: int
) -> dict[str, torch.Tensor]:
    room = length - len(ids)
    padded = torch.tensor(weights + [0.0] * room)
    return {
        "input_ids": torch.tensor(ids + [0] * room),
        "position_ids": torch.tensor(positions + list(range(room))),
        "queries": torch.tensor(queries + [0] * room),
        "weights": padded / padded.sum(),
    }


def answered_pieces(pairs: list[tuple[list[int], list[int]]], length: int, seed: int) -> Iterator[Piece]:
    """Pieces of prompts and answers that are tokens already, as `pieces` makes them of records; answers count."""
    picker = random.Random(seed)
    while True:
        for prompt, answer in picker.sample(pairs, len(pairs)):
            ids, weights = prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)
            yield Piece(ids[:length], weights[:length])


def _rows_of(
    source: Source | tuple[Part, ...], texts: Texts, length: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of a source, or of the parts of a mixture by their weights, spread evenly."""
    if isinstance(source, Source):
        yield from rows(pieces(source, texts, length, seed), texts, length)
        return
    streams = [rows(pieces(part.source, texts, length, seed), texts, length) for part in source]
    whole = sum(part.weight for part in source)
    owed = [0.0] * len(source)
    while True:
        owed = [debt + part.weight / whole for debt, part in zip(owed, source, strict=True)]
        turn = max(range(len(source)), key=lambda place: owed[place])
        owed[turn] -= 1
        name = source[turn].source.name
        texts.tally.rows_of_parts[name] = texts.tally.rows_of_parts.get(name, 0) + 1
        yield next(streams[turn])


def mixed_rows(
    sources: Mapping[Kind, Source | tuple[Part, ...]],
    texts: Texts,
    *,
    length: int,
    score_share: float,
    seed: int,
    answers: list[tuple[list[int], list[int]]] | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of both kinds without end, ``score_share`` of them scoring ones, spread evenly; ``is_text`` tells which.

    ``answers`` are pairs of prompt and answer ids that stand for the generate records. Raises InputError when a kind
    that is asked for is not in the data.
    """
    streams: dict[Kind, Iterator[dict[str, torch.Tensor]]] = {}
    shares: dict[Kind, float] = {"generate": 1 - score_share, "score": score_share}
    for kind, share in shares.items():
        if share > 0 and kind not in sources:
            raise InputError(f"the data has no {kind} records: add them or set score_share to {1 - round(score_share)}")
        if share > 0:
            answered = answers if kind == "generate" else None
            streams[kind] = (
                _rows_of(sources[kind], texts, length, seed)
                if answered is None
                else rows(answered_pieces(answered, length, seed), texts, length)
            )
    owed = 0.0
    while True:
        owed += score_share
        turn: Kind = "score" if owed >= 1 - 1e-9 else "generate"
        owed -= turn == "score"
        yield {**next(streams[turn]), "is_text": torch.tensor(turn == "generate")}
