"""The transformers Trainer as a distiller: its loss, its optimisers, its on-policy rows, and its progress as ours.

Mixed precision, accumulation, gradient checkpointing, device placement, several processes and resuming are the
Trainer's and accelerate's. Knows nothing of files, manifests or where records come from (distill.py, data.py), nor
whether the teacher is a model or was kept on disk (teachers.py).
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from slmdeploy.compress import responses, scores
from slmdeploy.compress.chunked import Positions, TeacherSide, chunked_loss
from slmdeploy.compress.layers import LayerLoss
from slmdeploy.compress.losses import Objective
from slmdeploy.compress.teachers import LiveTeacher, Row, Teacher
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress
from slmdeploy.specs import DistillStage, EncoderStage

# AdamW's share of Muon's learning rate; Muon's is per orthogonal update, AdamW's per element.
ADAMW_SHARE = 0.15
WEIGHT_DECAY = 0.01
LOGS_PER_STAGE = 50


class Rows(IterableDataset[Row]):
    """The rows of a stage from a factory, so that a resumed Trainer can start over and skip what it has seen."""

    def __init__(self, make: Callable[[], Iterator[Row]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Row]:
        return self.make()


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan 2024) for the blocks' matrices and AdamW for the rest, behind the one face that a Trainer knows."""

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        head = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        head |= {id(p) for p in output.parameters()} if output is not None else set()
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and id(p) not in head]
        others = [p for p in trained if not (p.ndim == 2 and id(p) not in head)]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=learning_rate, momentum=0.95, weight_decay=WEIGHT_DECAY, adjust_lr_fn="original"
            ),
            torch.optim.AdamW(others, lr=learning_rate * ADAMW_SHARE, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        super().__init__([{"params": matrices}, {"params": others}], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # The scheduler writes learning rates into these groups, so they must be the very ones that the parts read;
        # load_state_dict of a part makes new ones, and accelerate calls it when it wraps an optimiser.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


@dataclass(frozen=True)
class Measured:
    """The loss of a batch, a sum over its rows, and the parts of it that the log tells of, sums too."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Lesson:
    """What a stage learns from: rows, the teacher as seen over them, prompts to answer, the ids of the label words.

    ``model`` is the teacher over rows that are not among those, which measuring needs.
    """

    rows: "Rows"
    teacher: Teacher
    model: LiveTeacher
    prompts: list[list[int]]
    label_ids: tuple[int, int] | None


def training_arguments(stage: DistillStage | EncoderStage, work: Path, *, adam_beta2: float) -> TrainingArguments:
    """The Trainer's own settings for a stage. Raises InputError for rows that the processes cannot share out evenly."""
    processes = PartialState(cpu=not torch.cuda.is_available()).num_processes
    if stage.batch_rows % processes:
        raise InputError(
            f"batch_rows = {stage.batch_rows} is not shared out evenly among {processes} processes: change it"
        )
    return TrainingArguments(
        output_dir=str(work),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_rows // processes,
        gradient_accumulation_steps=stage.gradient_accumulation,
        activation_checkpointing=stage.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if stage.gradient_checkpointing else None,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(stage.warmup_share * stage.steps),
        weight_decay=WEIGHT_DECAY,
        adam_beta2=adam_beta2,
        bf16=stage.dtype == "bf16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=max(1, stage.steps // LOGS_PER_STAGE),
        logging_nan_inf_filter=False,
        save_steps=stage.save_steps,
        save_total_limit=1,
        seed=stage.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


class Diverging(Protocol):
    """A trainer of ours: its model, and the error that ends a training which cannot go on."""

    model: Any

    def diverged(self, what: str, step: int) -> InputError:
        """That error, with what was seen at which step."""


class Distiller(Trainer):
    """Minimises the distance between teacher and student over packed rows (data.py)."""

    def __init__(
        self, student: PreTrainedModel, lesson: Lesson, stage: DistillStage, *, work: Path, progress: Progress
    ) -> None:
        self.layers = LayerLoss(student, lesson.model.model, stage) if stage.compares_layers else None
        arguments = training_arguments(stage, work, adam_beta2=0.95)
        super().__init__(model=student, args=arguments, train_dataset=lesson.rows)
        self.remove_callback(PrinterCallback)
        self.add_callback(Guard(self))
        self.add_callback(_Reporter(self, stage, progress))
        self.lesson, self.stage = lesson, stage
        self.distance = Objective(
            stage.loss,
            beta=0.5 if stage.beta is None else stage.beta,
            skew=0.1 if stage.skew is None else stage.skew,
            temperature=stage.temperature,
            ce_share=stage.ce_share,
        )
        self.compute_dtype = torch.bfloat16 if stage.dtype == "bf16" else torch.float32
        self.latest: dict[str, float] = {}
        self.sampled_batches = 0
        self.batch = (-1, 0)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Muon with AdamW when the stage asks for it, else the Trainer's AdamW."""
        if self.stage.optimizer == "muon" and self.optimizer is None:
            student: Any = self.model
            self.optimizer = MuonAdamW(student, self.stage.learning_rate)
        created: torch.optim.Optimizer = super().create_optimizer(model)
        return created

    def compute_loss(self, model: Any, inputs: Row, *args: Any, **kwargs: Any) -> Tensor:
        """The mean over rows of their weighted loss; stops the stage at a loss that is not finite."""
        inputs = self._maybe_on_policy(inputs, self._chance())
        measured = self.measure(model, inputs, self.lesson.teacher)
        rows = len(inputs["input_ids"])
        loss = measured.total / rows
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss is {loss.item()}", self.state.global_step + 1)
        self.latest = {name: part.item() / rows for name, part in measured.parts.items()}
        return loss

    def diverged(self, what: str, step: int) -> InputError:
        """The error that ends a stage which cannot go on."""
        rate = self.stage.learning_rate
        return InputError(f"distillation diverged: {what} at step {step}; lower learning_rate = {rate:g}")

    def measure(self, model: Any, inputs: Row, teacher: Teacher) -> Measured:
        """Both models over the rows, compared at the positions that count."""
        weights = inputs["weights"][:, 1:]
        counted = weights > 0
        side = teacher.look(inputs, counted)
        # Through the model's own forward, which accelerate wraps; one position of logits, and those are not used.
        states = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        ).hidden_states[-1]
        at = Positions(states[:, :-1][counted], inputs["input_ids"][:, 1:][counted], weights[counted])
        head = self.accelerator.unwrap_model(model).get_output_embeddings().weight
        scored = self._lists(inputs["queries"])[counted]
        of_tokens = replace(at, weights=at.weights.masked_fill(scored > 0, 0.0))
        tokens = chunked_loss(of_tokens, head, side, self.distance, self.compute_dtype)
        total, parts = tokens.total, {"kd": tokens.kd, "ce": tokens.ce}
        if self.stage.score_loss != "tokens":
            parts["score"] = self._scores(at, scored, head, side)
            total = total + parts["score"]
        if self.layers is not None:
            parts["layers"] = self.layers.measure(counted, at.weights)
            total = total + parts["layers"]
        return Measured(total, parts)

    def _lists(self, queries: Tensor) -> Tensor:
        """The list of the item that each predicted token ends, numbered over the batch; 0 where tokens are compared."""
        if self.stage.score_loss == "tokens":
            return torch.zeros_like(queries[:, 1:])
        first = torch.arange(len(queries), device=queries.device)[:, None] * (queries.max() + 1)
        return torch.where(queries > 0, queries + first, 0)[:, 1:]

    def _scores(self, at: Positions, lists: Tensor, head: Tensor, side: TeacherSide) -> Tensor:
        """The loss of the label words: each, or in lists the list for them, as much as these words count as tokens."""
        chosen = lists > 0
        if not chosen.any():
            return at.weights.new_zeros(())
        assert self.lesson.label_ids is not None, "rows with lists come from scoring records"
        student = scores.margins(at.student[chosen], head, self.lesson.label_ids)
        teacher = side.margins(chosen, self.lesson.label_ids)
        labels, weights = at.labels[chosen] == self.lesson.label_ids[1], at.weights[chosen]
        if self.stage.score_loss == "margin":
            return (weights * scores.margin_loss(student, teacher, labels, self.distance)).sum()
        losses, where = scores.listwise_loss(student, teacher, labels, lists[chosen], self.distance)
        return (weights * losses[where]).sum()

    @torch.no_grad()
    def measure_rows(self, rows: list[Row]) -> dict[str, float]:
        """The parts of the loss in nats, each a mean over rows, of the student as it is now."""
        student: Any = self.model
        if not isinstance(student, FSDPModule):
            student.to(self.args.device)  # which the Trainer leaves to sharding where parameters will be shards
        student.eval()
        sums: dict[str, float] = {}
        for start in range(0, len(rows), self.stage.batch_rows):
            batch = rows[start : start + self.stage.batch_rows]
            inputs = {name: torch.stack([row[name] for row in batch]).to(self.args.device) for name in batch[0]}
            with self.accelerator.autocast():
                measured = self.measure(student, inputs, self.lesson.model)
            sums = {name: sums.get(name, 0.0) + part.item() for name, part in measured.parts.items()}
        return {name: value / len(rows) for name, value in sums.items()}

    def _chance(self) -> random.Random:
        """The source of this batch's draws: the same when a resumed stage comes to the same batch again."""
        step = self.state.global_step
        self.batch = (step, self.batch[1] + 1) if self.batch[0] == step else (step, 0)
        return random.Random(f"{self.stage.seed}:{self.batch[0]}:{self.batch[1]}:{self.args.process_index}")

    def _maybe_on_policy(self, inputs: Row, chance: random.Random) -> Row:
        """With the stage's probability, replace the rows of text by what the student writes after prompts."""
        if chance.random() >= self.stage.on_policy:
            return inputs
        places = inputs["is_text"].nonzero()[:, 0]
        if len(places) == 0:
            return inputs
        self.sampled_batches += 1
        fresh = self._sample_rows(len(places), chance)
        return {
            name: value.index_copy(0, places, fresh[name].to(value.device)) if name in fresh else value
            for name, value in inputs.items()
        }

    @torch.no_grad()
    def _sample_rows(self, count: int, chance: random.Random) -> Row:
        """``count`` packed rows of prompt and sampled response; the responses alone count."""
        model = self.accelerator.unwrap_model(self.model)
        chosen = responses.choose_prompts(self.lesson.prompts, count, self.stage, chance)
        flat = [prompt for row in chosen for prompt in row]
        model.eval()
        with self.accelerator.autocast(), torch.random.fork_rng():
            torch.manual_seed(chance.getrandbits(63))
            answers = responses.sample(model, flat, self.stage)
        model.train()
        remaining = iter(answers)
        packed = [responses.pack([(p, next(remaining)) for p in row], self.stage.length) for row in chosen]
        return {name: torch.stack([row[name] for row in packed]) for name in packed[0]}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the parts of the loss to the Trainer's log line."""
        super().log({**logs, **self.latest} if "loss" in logs else logs, *args, **kwargs)


class Guard(TrainerCallback):
    """Lets no checkpoint be written of weights that are not finite: the last one is then always good."""

    def __init__(self, trainer: "Diverging") -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step == state.max_steps
        if not (control.should_save or last):
            return
        student: Any = self.trainer.model
        for name, parameter in student.named_parameters():
            # of a shard all processes see the whole, so that they end together
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if not torch.isfinite(whole).all():
                raise self.trainer.diverged(f"{name} is not finite", state.global_step)


class _Reporter(TrainerCallback):
    """Tells our Progress in tokens, with the loss as the note."""

    def __init__(self, trainer: Distiller, stage: DistillStage, progress: Progress) -> None:
        self.trainer, self.progress = trainer, progress
        self.tokens_per_step = stage.tokens // stage.steps
        self.total = stage.tokens

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.start("distil", self.total, "tokens")
        self.progress.advance(state.global_step * self.tokens_per_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        note = " ".join(f"{name} {value:.3f}" for name, value in self.trainer.latest.items())
        self.progress.advance(self.tokens_per_step, note)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.finish()
