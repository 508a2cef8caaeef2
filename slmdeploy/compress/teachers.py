"""The teacher's side of a batch: computed by the model, or read from what was computed once and kept on disk.

Kept is, for each of a fixed number of rows, the row itself and at its counted positions the teacher's likeliest tokens
with their log-probabilities, the mass of all others, and the margin of the label words: losses.top_divergence and
scores.py need no more. On disk these are safetensors shards of SHARD_ROWS rows, each written whole or not at all, so
that a killed run goes on at the first missing one; the folder's name is the key of all that they depend on.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from slmdeploy.compress.chunked import CHUNK_ELEMENTS, TeacherSide, TeacherStates, TeacherTop
from slmdeploy.compress.losses import top_bins
from slmdeploy.compress.scores import margins
from slmdeploy.errors import CorruptArtifactError
from slmdeploy.progress import Progress

SHARD_ROWS = 64
KEPT = ("input_ids", "position_ids", "queries", "weights", "is_text")

Row = dict[str, Tensor]


class Teacher(Protocol):
    """Says what is known of the teacher over packed rows."""

    def look(self, row: Row, counted: Tensor) -> TeacherSide:
        """At the positions of a batch of rows that ``counted``, bool [rows, length - 1], marks."""


@dataclass(frozen=True)
class LiveTeacher:
    """The frozen model whose distributions are matched, and its head [vocabulary, hidden]."""

    model: PreTrainedModel
    head: Tensor

    @torch.no_grad()
    def look(self, row: Row, counted: Tensor) -> TeacherStates:
        """One forward pass."""
        states = self.model.base_model(
            input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False
        ).last_hidden_state
        return TeacherStates(states[:, :-1][counted], self.head)


@dataclass(frozen=True)
class CachePlan:
    """What is kept: ``rows`` rows, ``top`` tokens at ``temperature``, margins of ``label_ids`` where there are any."""

    rows: int
    top: int
    temperature: float
    label_ids: tuple[int, int] | None


class CachedTeacher:
    """Reads shards. Rows bear their ``number``, by which `look` finds what the teacher said of them."""

    def __init__(self, folder: Path, plan: CachePlan) -> None:
        self.plan = plan
        self.shards = [_Shard(folder / _name(start)) for start in range(0, plan.rows, SHARD_ROWS)]

    def rows(self, seed: int) -> Iterator[Row]:
        """The kept rows without end, pass after pass, each pass in an order of its own."""
        picker = random.Random(seed)
        while True:
            for number in picker.sample(range(self.plan.rows), self.plan.rows):
                shard = self.shards[number // SHARD_ROWS]
                yield {**shard.row(number % SHARD_ROWS), "number": torch.tensor(number)}

    def look(self, row: Row, counted: Tensor) -> TeacherTop:
        """From the shards, at the positions that counted when they were written."""
        numbers = row["number"].tolist()
        parts = [self.shards[n // SHARD_ROWS].said(n % SHARD_ROWS) for n in numbers]
        ids, log_mass, kept = (torch.cat(part).to(counted.device) for part in zip(*parts, strict=True))
        return TeacherTop(ids.long(), log_mass, kept)


class _Shard:
    def __init__(self, file: Path) -> None:
        try:
            opened: Any = safe_open(file, "pt")
            ends = opened.get_tensor("counts").cumsum(0).tolist()
        except (OSError, SafetensorError) as error:
            raise CorruptArtifactError(f"{file} is no shard of teacher outputs ({error}): delete its folder") from error
        self.tensors = opened
        self.spans = [slice(*pair) for pair in zip([0, *ends[:-1]], ends, strict=True)]

    def row(self, place: int) -> Row:
        return {name: self.tensors.get_slice(name)[place : place + 1][0] for name in KEPT}

    def said(self, place: int) -> tuple[Tensor, ...]:
        return tuple(self.tensors.get_slice(name)[self.spans[place]] for name in ("ids", "log_mass", "margins"))


def keep(
    folder: Path, rows: Iterator[Row], teacher: LiveTeacher, plan: CachePlan, batch_rows: int, progress: Progress
) -> None:
    """Write the shards that ``folder`` lacks, ``rows`` being the same stream each time it is called."""
    folder.mkdir(parents=True, exist_ok=True)
    progress.start("teacher looks", plan.rows, "rows")
    for start in range(0, plan.rows, SHARD_ROWS):
        taken = [next(rows) for _ in range(min(SHARD_ROWS, plan.rows - start))]
        file = folder / _name(start)
        if not file.is_file():
            parts = [_kept(taken[i : i + batch_rows], teacher, plan) for i in range(0, len(taken), batch_rows)]
            temporary = file.with_suffix(".tmp")
            save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, temporary)
            temporary.replace(file)
        progress.advance(len(taken))
    progress.finish()


def _kept(taken: list[Row], teacher: LiveTeacher, plan: CachePlan) -> Row:
    """A few rows of a shard: KEPT, counts [rows], and of each counted position ids, log_mass and margins."""
    batch = {name: torch.stack([row[name] for row in taken]) for name in KEPT}
    counted = batch["weights"][:, 1:] > 0
    device = teacher.head.device
    side = teacher.look({name: value.to(device) for name, value in batch.items()}, counted.to(device))
    size = max(1, CHUNK_ELEMENTS // len(side.head))
    chunks = [top_bins((part @ side.head.T).float(), plan.top, plan.temperature) for part in side.hidden.split(size)]
    ids, log_mass = (torch.cat(chunk) for chunk in zip(*chunks, strict=True))
    margin = margins(side.hidden, side.head, plan.label_ids) if plan.label_ids else torch.zeros(len(ids))
    said = {"ids": ids.int().cpu(), "log_mass": log_mass.cpu(), "margins": margin.cpu()}
    return {**batch, "counts": counted.sum(1), **said}


def _name(start: int) -> str:
    return f"rows-{start:08}.safetensors"
