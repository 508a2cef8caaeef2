"""One stage of distillation with everything loaded: models, rows, prompts, the Trainer, and a measure around it.

Sits between the verb (distill.py: files and checks) and the Trainer (training.py: steps).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from slmdeploy.compress import loading
from slmdeploy.compress.data import Kind, Source, Texts, make_texts, mixed_rows, open_sources, prompts
from slmdeploy.compress.training import Distiller, Row, Rows, Teacher
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress
from slmdeploy.specs import DistillStage

PROMPT_POOL = 4096
EVAL_SEED = 0


class StageRun:
    """Loads on construction, trains once, saves once."""

    def __init__(
        self,
        teacher: Path,
        student: Path,
        data: Path | str,
        stage: DistillStage,
        labels: tuple[str, str],
        work: Path,
        progress: Progress,
    ) -> None:
        self.student_path, self.stage, self.work = student, stage, work
        self.config = loading.load_config(student)
        with loading.quiet():
            self.sources, self.valid = open_sources(data, "train"), open_sources(data, "valid")
            self.texts = make_texts(student, loading.end_ids(self.config), labels, stage.score_share > 0)
            model, frozen = self._load(teacher, student)
            self.trainer = Distiller(
                model,
                frozen,
                stage,
                rows=Rows(lambda: self._rows(self.sources, self.texts, stage.seed)),
                prompts=self._prompts(),
                work=work,
                progress=progress,
            )
            body: Any = frozen.model
            body.to(self.trainer.args.device)

    def _load(self, teacher: Path, student: Path) -> tuple[Any, Teacher]:
        """The student in float32, because an optimiser's steps are finer than bf16, and the frozen teacher."""
        for path in (teacher, student):
            limit = getattr(loading.load_config(path), "max_position_embeddings", None)
            if limit is not None and self.stage.length > limit:
                raise InputError(f"length = {self.stage.length} is more than the {limit} positions of {path}: lower it")
        dtype = torch.bfloat16 if self.stage.dtype == "bf16" else torch.float32
        frozen: Any = loading.load_model(teacher, dtype).eval().requires_grad_(False)
        model = loading.load_model(student, torch.float32)
        loading.head_weight(model, student)
        return model, Teacher(frozen, loading.head_weight(frozen, teacher))

    def _rows(self, sources: dict[Kind, Source], texts: Texts, seed: int) -> Iterator[Row]:
        return mixed_rows(sources, texts, length=self.stage.length, score_share=self.stage.score_share, seed=seed)

    def _prompts(self) -> list[list[int]]:
        if self.stage.on_policy == 0:
            return []
        if "generate" not in self.sources:
            raise InputError("on_policy needs generate records to take prompts from: add them or set on_policy = 0")
        room = self.stage.length - self.stage.response_tokens
        source = self.sources["generate"]
        return prompts(source, self.texts, length=room, count=PROMPT_POOL, seed=self.stage.seed)

    def train(self, resume: Path | None) -> dict[str, Any]:
        """Train from ``resume`` or the start; returns what the manifest tells of it."""
        with loading.quiet():
            before = self._evaluate()
            try:
                self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            except InputError:
                shutil.rmtree(self.work)  # a diverged stage has nothing worth going on from
                raise
            after = self._evaluate()
        return {
            "steps": self.stage.steps,
            "tokens": self.stage.tokens,
            "resumed_from_step": int(resume.name.rsplit("-", 1)[1]) if resume else 0,
            "sampled_batches": self.trainer.sampled_batches,
            "data": dict(vars(self.texts.tally)),
            "valid": None if before is None else {"before": before, "after": after},
        }

    def _evaluate(self) -> dict[str, float] | None:
        """KD and CE in nats, a mean over rows of the valid split; None without such a split."""
        shares: dict[Kind, float] = {"generate": 1 - self.stage.score_share, "score": self.stage.score_share}
        if self.stage.eval_rows == 0 or any(share > 0 and kind not in self.valid for kind, share in shares.items()):
            return None
        # A tally of their own: what is evaluated on is not what was trained on.
        texts = Texts(self.texts.tokenizer, self.texts.end, self.texts.label_ids)
        stream = self._rows(self.valid, texts, EVAL_SEED)
        return self.trainer.measure_rows([next(stream) for _ in range(self.stage.eval_rows)])

    def save(self, folder: Path) -> None:
        """The student in the dtype it came in, its tokenizer files, and the training log."""
        with loading.quiet():
            model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
            model.to(loading.stored_dtype(self.config)).save_pretrained(folder)
        loading.copy_companions(self.student_path, folder)
        history = "".join(json.dumps(entry) + "\n" for entry in self.trainer.state.log_history)
        (folder / "training_log.jsonl").write_text(history, encoding="utf-8")
