"""The transformers Trainer as a distiller: its loss, its optimisers, its on-policy rows, and its progress as ours.

Mixed precision, accumulation, gradient checkpointing, device placement and resuming are the Trainer's and accelerate's.
Knows nothing of files, manifests or where records come from (distill.py, data.py).
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from slmdeploy.compress.losses import LossParts, Objective, Positions, chunked_loss
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress
from slmdeploy.specs import DistillStage

# AdamW's share of Muon's learning rate; Muon's is per orthogonal update, AdamW's per element.
ADAMW_SHARE = 0.15
WEIGHT_DECAY = 0.01
LOGS_PER_STAGE = 50

Row = dict[str, Tensor]


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
class Teacher:
    """The frozen model whose distributions are matched, and its head [vocabulary, hidden]."""

    model: PreTrainedModel
    head: Tensor

    @torch.no_grad()
    def hidden(self, row: Row) -> Tensor:
        """Last hidden states [rows, length, hidden] of packed rows."""
        body = self.model.base_model
        states = body(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False)
        hidden: Tensor = states.last_hidden_state
        return hidden


def training_arguments(stage: DistillStage, work: Path) -> TrainingArguments:
    """The Trainer's own settings for a stage."""
    return TrainingArguments(
        output_dir=str(work),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_rows,
        gradient_accumulation_steps=stage.gradient_accumulation,
        activation_checkpointing=stage.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if stage.gradient_checkpointing else None,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(stage.warmup_share * stage.steps),
        weight_decay=WEIGHT_DECAY,
        adam_beta2=0.95,
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


class Distiller(Trainer):
    """Minimises the distance between teacher and student over packed rows (data.py)."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        stage: DistillStage,
        *,
        rows: Rows,
        prompts: list[list[int]],
        work: Path,
        progress: Progress,
    ) -> None:
        super().__init__(model=student, args=training_arguments(stage, work), train_dataset=rows)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Reporter(self, stage, progress))
        self.teacher, self.stage, self.prompts = teacher, stage, prompts
        beta = 0.5 if stage.beta is None else stage.beta
        self.distance = Objective(stage.loss, beta, stage.temperature, stage.ce_share)
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
        parts = self.measure(model, inputs)
        rows = len(inputs["input_ids"])
        loss = parts.total / rows
        if not torch.isfinite(loss):
            raise InputError(
                f"distillation diverged: the loss is {loss.item()} at step {self.state.global_step + 1}; "
                f"lower learning_rate = {self.stage.learning_rate:g}"
            )
        self.latest = {"kd": parts.kd.item() / rows, "ce": parts.ce.item() / rows}
        return loss

    def measure(self, model: Any, inputs: Row) -> LossParts:
        """Both models over the rows, compared at the positions that count."""
        weights = inputs["weights"][:, 1:]
        counted = weights > 0
        teacher = self.teacher.hidden(inputs)
        # Through the model's own forward, which accelerate wraps; one position of logits, and those are not used.
        states = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        ).hidden_states[-1]
        positions = Positions(
            student=states[:, :-1][counted],
            teacher=teacher[:, :-1][counted],
            labels=inputs["input_ids"][:, 1:][counted],
            weights=weights[counted],
        )
        head = self.accelerator.unwrap_model(model).get_output_embeddings().weight
        return chunked_loss(positions, head, self.teacher.head, self.distance, self.compute_dtype)

    @torch.no_grad()
    def measure_rows(self, rows: list[Row]) -> dict[str, float]:
        """KD and CE in nats, each a mean over rows, of the student as it is now."""
        student: Any = self.model
        student.eval()
        sums = {"kd": 0.0, "ce": 0.0}
        for start in range(0, len(rows), self.stage.batch_rows):
            batch = rows[start : start + self.stage.batch_rows]
            inputs = {name: torch.stack([row[name] for row in batch]).to(self.args.device) for name in batch[0]}
            with self.accelerator.autocast():
                parts = self.measure(student, inputs)
            sums["kd"] += parts.kd.item()
            sums["ce"] += parts.ce.item()
        return {name: value / len(rows) for name, value in sums.items()}

    def _chance(self) -> random.Random:
        """The source of this batch's draws: the same when a resumed stage comes to the same batch again."""
        step = self.state.global_step
        self.batch = (step, self.batch[1] + 1) if self.batch[0] == step else (step, 0)
        return random.Random(f"{self.stage.seed}:{self.batch[0]}:{self.batch[1]}")

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
        chosen = self._choose_prompts(count, chance)
        flat = [prompt for row in chosen for prompt in row]
        model.eval()
        with self.accelerator.autocast(), torch.random.fork_rng():
            torch.manual_seed(chance.getrandbits(63))
            answers = sample(model, flat, self.stage)
        model.train()
        remaining = iter(answers)
        packed = [_pack([(p, next(remaining)) for p in row], self.stage.length) for row in chosen]
        return {name: torch.stack([row[name] for row in packed]) for name in packed[0]}

    def _choose_prompts(self, count: int, chance: random.Random) -> list[list[list[int]]]:
        """For each row as many prompts as fit with their responses."""
        filled: list[list[list[int]]] = []
        for _ in range(count):
            room, row = self.stage.length, []
            while len(prompt := chance.choice(self.prompts)) + self.stage.response_tokens <= room:
                row.append(prompt)
                room -= len(prompt) + self.stage.response_tokens
            filled.append(row)
        return filled

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add both parts of the loss to the Trainer's log line."""
        super().log({**logs, **self.latest} if "loss" in logs else logs, *args, **kwargs)


def sample(model: Any, prompts: list[list[int]], stage: DistillStage) -> list[list[int]]:
    """A response to each prompt, sampled at the stage's temperature, with its end-of-text token when there is one."""
    longest = max(len(prompt) for prompt in prompts)
    ends = model.config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    padding = min(stop, default=0)
    ids = torch.tensor([[padding] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=stage.response_tokens,
        do_sample=True,
        temperature=stage.sample_temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=padding,
        eos_token_id=sorted(stop) or None,
    )
    written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, longest:].tolist()
    return [_until(answer, stop) for answer in written]


def _until(answer: list[int], stop: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(answer) if token in stop), len(answer))
    return answer[: end + 1]


def _pack(pairs: list[tuple[list[int], list[int]]], length: int) -> Row:
    ids = [token for prompt, answer in pairs for token in prompt + answer]
    counts = [flag for prompt, answer in pairs for flag in [0.0] * len(prompt) + [1.0] * len(answer)]
    positions = [i for prompt, answer in pairs for i in range(len(prompt) + len(answer))]
    room = length - len(ids)
    weights = torch.tensor(counts + [0.0] * room)
    return {
        "input_ids": torch.tensor(ids + [0] * room),
        "position_ids": torch.tensor(positions + list(range(room))),
        "weights": weights / weights.sum().clamp(min=1.0),
    }


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
        latest = self.trainer.latest
        self.progress.advance(self.tokens_per_step, f"kd {latest['kd']:.3f} ce {latest['ce']:.3f}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.finish()
