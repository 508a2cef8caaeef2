"""One stage of distillation with everything loaded: models, rows, prompts, the Trainer, and a measure around it.

Sits between the verb (distill.py: files and checks) and the Trainer (training.py: steps). What the teacher does only
once, its texts and its distributions over fixed rows, happens here before training, in the first process alone.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, load_checkpoint_in_model

from slmdeploy.artifacts import content_key
from slmdeploy.compress import layers, loading, sharded
from slmdeploy.compress.data import Kind, Tally, Texts, make_texts
from slmdeploy.compress.mixtures import Sources, open_data, prompts_of, require_both_labels
from slmdeploy.compress.packing import mixed_rows
from slmdeploy.compress.responses import Pair, written_by
from slmdeploy.compress.teachers import CachedTeacher, CachePlan, LiveTeacher, Row, keep
from slmdeploy.compress.training import Distiller, Lesson, Rows
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress
from slmdeploy.specs import DistillStage, data_inputs

PROMPT_POOL = 4096
EVAL_SEED = 0
# What the teacher's texts depend on, and what its distributions over rows depend on besides.
TEXT_FIELDS = ("length", "seed", "seq_kd_texts", "response_tokens", "sample_temperature", "dtype")
ROW_FIELDS = (*TEXT_FIELDS, "temperature", "score_share", "score_items", "cached_rows", "cached_top")


@dataclass(frozen=True)
class Places:
    """What a stage reads, and where it keeps what a later run may go on from."""

    teacher: Path
    student: Path
    data: Path | str
    work: Path
    cache: Path


class StageRun:
    """Loads on construction, trains once, saves once."""

    def __init__(self, places: Places, stage: DistillStage, labels: tuple[str, str], progress: Progress) -> None:
        self.places, self.stage, self.labels, self.progress = places, stage, labels, progress
        self.config = loading.load_config(places.student)
        self.whole: Any = None
        with loading.quiet():
            self.sources, self.valid = open_data(places.data, "train"), open_data(places.data, "valid")
            ends = loading.end_ids(self.config)
            scored = stage.score_share > 0
            if scored:
                require_both_labels(self.sources.get("score", ()), str(places.data))
            self.texts = make_texts(places.student, ends, labels, scored, stage.score_items)
            self.trainer = self._trainer(self._student())
        sharded.check_running(self.trainer.accelerator)

    def _student(self) -> Any:
        """In float32, because an optimiser's steps are finer than bf16."""
        for path in (self.places.teacher, self.places.student):
            limit = getattr(loading.load_config(path), "max_position_embeddings", None)
            if limit is not None and self.stage.length > limit:
                raise InputError(f"length = {self.stage.length} is more than the {limit} positions of {path}: lower it")
        model = loading.load_model(self.places.student, torch.float32)
        loading.require_finite(model, self.places.student)
        loading.head_weight(model, self.places.student)
        return model

    def _teacher(self) -> LiveTeacher:
        """Frozen; of its head the rows of the student's vocabulary, since what a larger one has more is padding."""
        device = PartialState(cpu=not torch.cuda.is_available()).device
        dtype = torch.bfloat16 if self.stage.dtype == "bf16" else torch.float32
        frozen: Any = loading.load_model(self.places.teacher, dtype).eval().requires_grad_(False).to(device)
        loading.require_finite(frozen, self.places.teacher)
        return LiveTeacher(frozen, loading.head_weight(frozen, self.places.teacher)[: self.config.vocab_size])

    def _trainer(self, student: Any) -> Distiller:
        stage, teacher = self.stage, self._teacher()
        answers = self._answers(teacher.model) if stage.seq_kd_texts else None
        if stage.cached_rows:
            kept = self._kept(teacher, answers)
            lesson = Lesson(Rows(lambda: kept.rows(stage.seed)), kept, teacher, [], self.texts.label_ids)
        else:
            written = self._prompts(PROMPT_POOL) if stage.on_policy > 0 else []
            rows = Rows(lambda: self._rows(self.sources, self.texts, stage.seed, answers))
            lesson = Lesson(rows, teacher, teacher, written, self.texts.label_ids)
        return Distiller(student, lesson, stage, work=self.places.work, progress=self.progress)

    def _rows(self, sources: Sources, texts: Texts, seed: int, answers: list[Pair] | None = None) -> Iterator[Row]:
        share, length = self.stage.score_share, self.stage.length
        return mixed_rows(sources, texts, length=length, score_share=share, seed=seed, answers=answers)

    def _prompts(self, count: int) -> list[list[int]]:
        if "generate" not in self.sources:
            raise InputError(
                "on_policy and seq_kd_texts need generate records to take prompts from: add them or set both to 0"
            )
        room = self.stage.length - self.stage.response_tokens
        return prompts_of(self.sources["generate"], self.texts, length=room, count=count, seed=self.stage.seed)

    def _answers(self, teacher: Any) -> list[Pair]:
        """What the teacher writes in the data's place."""
        file = self.places.cache / f"{self._key(TEXT_FIELDS)}.jsonl"
        asked = self._prompts(self.stage.seq_kd_texts)
        with PartialState().main_process_first():
            return written_by(teacher, asked, self.stage, file, self.progress)

    def _kept(self, teacher: LiveTeacher, answers: list[Pair] | None) -> CachedTeacher:
        """The teacher's distributions over the rows of the stage, computed now as far as they are not there."""
        stage, vocabulary = self.stage, len(teacher.head)
        plan = CachePlan(stage.cached_rows, min(stage.cached_top, vocabulary), stage.temperature, self.texts.label_ids)
        folder = self.places.cache / self._key(ROW_FIELDS)
        state = PartialState()
        if state.is_main_process:
            stream = self._rows(self.sources, self.texts, stage.seed, answers)
            keep(folder, stream, teacher, plan, stage.batch_rows, self.progress)
        state.wait_for_everyone()
        return CachedTeacher(folder, plan)

    def _key(self, fields: tuple[str, ...]) -> str:
        """A name for what the teacher gives under these fields of the stage, this data and these models."""
        plan: dict[str, Any] = {name: getattr(self.stage, name) for name in fields}
        plan |= {"labels": list(self.labels), "vocabulary": self.config.vocab_size, "end": list(self.texts.end)}
        inputs, named = data_inputs(self.places.data)
        return content_key("teacher", plan | named, inputs | {"teacher": self.places.teacher})[:16]

    def train(self, resume: Path | None) -> dict[str, Any]:
        """Train from ``resume`` or the start; returns what the manifest tells of it."""
        with loading.quiet():
            before = self._evaluate()
            self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            after = self._evaluate()
            if sharded.wanted():
                self._gather()
        return {
            "steps": self.stage.steps,
            "tokens": self.stage.tokens,
            "resumed_from_step": int(resume.name.rsplit("-", 1)[1]) if resume else 0,
            "processes": self.trainer.args.world_size,
            "sampled_batches": self.trainer.sampled_batches,
            "data": dict(vars(self.texts.tally)),
            "valid": None if before is None else {"before": before, "after": after},
        }

    def _evaluate(self) -> dict[str, float] | None:
        """The parts of the loss in nats, a mean over rows of the valid split; None without such a split."""
        shares: dict[Kind, float] = {"generate": 1 - self.stage.score_share, "score": self.stage.score_share}
        if self.stage.eval_rows == 0 or any(share > 0 and kind not in self.valid for kind, share in shares.items()):
            return None
        # A tally of their own: what is evaluated on is not what was trained on.
        texts = replace(self.texts, tally=Tally())
        stream = self._rows(self.valid, texts, EVAL_SEED)
        return self.trainer.measure_rows([next(stream) for _ in range(self.stage.eval_rows)])

    def _gather(self) -> None:
        """Of a sharded student the whole one, in the first process."""
        weights = sharded.whole_weights(self.trainer.accelerator, self.trainer.model)
        if self.trainer.args.process_index == 0:
            self.whole = self._student()
            self.whole.load_state_dict(layers.without_maps(weights))

    def save(self, folder: Path) -> None:
        """The student in the dtype it came in, its tokenizer files, and the training log."""
        with loading.quiet():
            model: Any = self.whole or self.trainer.accelerator.unwrap_model(self.trainer.model)
            layers.detach_maps(model)
            model.to(loading.stored_dtype(self.config)).save_pretrained(folder)
        loading.copy_companions(self.places.student, folder)
        history = "".join(json.dumps(entry) + "\n" for entry in self.trainer.state.log_history)
        (folder / "training_log.jsonl").write_text(history, encoding="utf-8")

    def go_back(self, checkpoint: Path) -> None:
        """Give the student the weights of a Trainer checkpoint again; a sharded one is made anew, by one process."""
        with loading.quiet():
            if sharded.wanted():
                self.whole = self._student()
            model = self.whole or self.trainer.accelerator.unwrap_model(self.trainer.model)
            load_checkpoint_in_model(model, str(checkpoint))

    def wait(self) -> None:
        """Until all processes that train together are here."""
        PartialState().wait_for_everyone()
