"""Trains an encoder on texts with the transformers Trainer, on labels or on what a teacher says; measures it.

Mixed precision, accumulation, checkpointing, several processes and resuming are the Trainer's and accelerate's. Knows
nothing of files and verbs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, load_checkpoint_in_model
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from slmdeploy.compress import encoders, loading
from slmdeploy.compress.encoder_losses import distance, label_loss, relations
from slmdeploy.compress.encoders import Encoder, Row
from slmdeploy.compress.labelled import Record
from slmdeploy.compress.training import Guard, training_arguments
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress
from slmdeploy.specs import EncoderStage

Example = tuple[Record, float]
"""A record and the number of its label, 0 where there is none."""


@dataclass(frozen=True)
class Lesson:
    """What an encoder learns: examples, those to measure on, and a teacher where there is one."""

    train: list[Example]
    valid: list[Example]
    labelled: bool
    teacher: Encoder | None


class EncoderTrainer(Trainer):
    """Minimises ``ce_share`` times the loss of the labels and the rest of the distance to the teacher."""

    def __init__(self, student: Encoder, lesson: Lesson, stage: EncoderStage, work: Path, progress: Progress) -> None:
        super().__init__(
            model=student.model,
            args=training_arguments(stage, work, adam_beta2=0.999),
            train_dataset=lesson.train,
            data_collator=self.batch,
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(Guard(self))
        self.add_callback(_Reporter(self, stage.steps, progress))
        self.student, self.lesson, self.stage = student, lesson, stage
        self.loss = stage.loss or ("kl" if student.pooling is None else "cosine")
        if lesson.teacher is not None:
            lesson.teacher.model.eval().requires_grad_(False).to(self.args.device)
        self.latest = 0.0

    def batch(self, examples: list[Example]) -> dict[str, Any]:
        """Rows of the student and of the teacher, and the labels [texts]."""
        texts = [record.text for record, _ in examples]
        pairs = [record.pair for record, _ in examples]
        whole = None if pairs[0] is None else [str(pair) for pair in pairs]
        found: dict[str, Any] = {"student": self.student.rows(texts, whole)}
        found["targets"] = torch.tensor([target for _, target in examples])
        if self.lesson.teacher is not None:
            found["teacher"] = self.lesson.teacher.rows(texts, whole)
        return found

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a batch; stops the training where it is not finite."""
        made = self.student.outputs(model, inputs["student"])
        share = 1.0 if self.lesson.teacher is None else self.stage.ce_share
        loss = made.new_zeros(())
        if share > 0:
            loss = loss + share * label_loss(made, inputs["targets"])
        if self.lesson.teacher is not None:
            loss = loss + (1 - share) * self._distance(made, self._taught(inputs["teacher"]))
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss is {loss.item()}", self.state.global_step + 1)
        self.latest = loss.item()
        return loss

    def diverged(self, what: str, step: int) -> InputError:
        """The error that ends a training which cannot go on."""
        rate = self.stage.learning_rate
        return InputError(f"training diverged: {what} at step {step}; lower learning_rate = {rate:g}")

    def _distance(self, made: Tensor, taught: Tensor) -> Tensor:
        loss = distance(self.loss, made, taught, self.stage.temperature)
        if self.stage.relation_weight > 0:
            loss = loss + self.stage.relation_weight * distance("relation", made, taught)
        return loss

    @torch.no_grad()
    def _taught(self, row: Row) -> Tensor:
        assert self.lesson.teacher is not None
        return self.lesson.teacher.outputs(self.lesson.teacher.model, row)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Means over what is held out: accuracy of labels, agreement with the teacher or cosine to it."""
        student: Any = self.model
        student.eval()
        sums: dict[str, float] = {}
        for start in range(0, len(self.lesson.valid), self.stage.batch_rows):
            examples = self.lesson.valid[start : start + self.stage.batch_rows]
            inputs = self._prepare_inputs(self.batch(examples))
            for name, value in self._figures(student, inputs).items():
                sums[name] = sums.get(name, 0.0) + value * len(examples)
        return {name: value / len(self.lesson.valid) for name, value in sums.items()}

    def _figures(self, student: Any, inputs: dict[str, Any]) -> dict[str, float]:
        made, found = self.student.outputs(student, inputs["student"]), {}
        if self.lesson.labelled:
            found["label_loss"] = label_loss(made, inputs["targets"]).item()
            if made.shape[-1] > 1:
                found["accuracy"] = (made.argmax(-1) == inputs["targets"]).float().mean().item()
        if self.lesson.teacher is not None:
            taught = self._taught(inputs["teacher"])
            found["distance"] = self._distance(made, taught).item()
            if self.student.pooling is not None:
                found["relation"] = (relations(made) - relations(taught)).abs().mean().item()
            elif made.shape[-1] > 1:
                found["agreement"] = (made.argmax(-1) == taught.argmax(-1)).float().mean().item()
        return found


class EncoderRun:
    """One training with everything loaded: trains once, saves once (resuming.Training)."""

    def __init__(self, student: Encoder, lesson: Lesson, stage: EncoderStage, work: Path, progress: Progress) -> None:
        self.student, self.lesson, self.stage = student, lesson, stage
        with loading.quiet():
            self.trainer = EncoderTrainer(student, lesson, stage, work, progress)

    def train(self, resume: Path | None) -> dict[str, Any]:
        """Train from ``resume`` or the start; returns what the manifest tells of it."""
        with loading.quiet():
            before = self.trainer.measure() if self.lesson.valid else None
            self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            after = self.trainer.measure() if self.lesson.valid else None
        return {
            "steps": self.stage.steps,
            "resumed_from_step": int(resume.name.rsplit("-", 1)[1]) if resume else 0,
            "processes": self.trainer.args.world_size,
            "records": {"train": len(self.lesson.train), "valid": len(self.lesson.valid)},
            "new_tensors": list(self.student.fresh),
            "valid": None if before is None else {"before": before, "after": after},
        }

    def save(self, folder: Path) -> None:
        """The trained encoder as an ordinary checkpoint."""
        encoders.save_encoder(self.student, self.trainer.accelerator.unwrap_model(self.trainer.model), folder)

    def go_back(self, checkpoint: Path) -> None:
        """Give the encoder the weights of a Trainer checkpoint again."""
        with loading.quiet():
            load_checkpoint_in_model(self.trainer.accelerator.unwrap_model(self.trainer.model), str(checkpoint))

    def wait(self) -> None:
        """Until all processes that train together are here."""
        PartialState().wait_for_everyone()


class _Reporter(TrainerCallback):
    """Tells our Progress in steps, with the loss as the note."""

    def __init__(self, trainer: EncoderTrainer, steps: int, progress: Progress) -> None:
        self.trainer, self.steps, self.progress = trainer, steps, progress

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.start("train", self.steps, "steps")
        self.progress.advance(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.advance(1, f"loss {self.trainer.latest:.3f}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.finish()
