"""The recipe of an encoder: from a table of texts to a package, by way of fine-tuning, pruning and distillation.

What a recipe says of candidates, workloads, budget and package is the same for all models (recipes.py); what is
learnt, from which data and how, is not. Imports nothing of torch. What the keys do is in docs/recipe.md.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from slmdeploy.specs.base import Positive, Share, Spec
from slmdeploy.specs.encoders import EncoderStage, TextColumns
from slmdeploy.specs.recipes import Project
from slmdeploy.specs.workloads import ENCODER_TASKS

BelowOne = Annotated[float, Field(ge=0.0, lt=1.0, strict=False)]


class EncoderModels(Spec):
    """Checkpoints: folders relative to the recipe, or Hugging Face ids. Without ``student`` the teacher is shaped."""

    teacher: str
    student: str | None = None


class TableSource(Spec):
    """A table of texts beside the recipe, a file or a folder of train.* and valid.* (docs/encoders.md)."""

    source: str
    columns: TextColumns


class EncoderPrune(Spec):
    """Shares of an encoder's neurons, heads and whole layers that go, as `prune` takes them."""

    ratio: BelowOne = 0.0
    attention_ratio: Share | None = None
    layer_ratio: BelowOne = 0.0
    method: Literal["osscar", "minitron", "magnitude", "random"] = "osscar"
    allocation: Literal["uniform", "global"] = "uniform"
    calibration_tokens: Positive = 16384
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What `prune` takes of it."""
        return self.model_dump()


class EncoderRecipe(Project):
    """One project of an encoder. A stage that is left out is not run; the graph is of what the last one made."""

    model: EncoderModels
    data: TableSource
    tasks: Annotated[tuple[Literal["embed", "classify", "score"], ...], Field(min_length=1, strict=False)]
    finetune: EncoderStage | None = None
    prune: EncoderPrune | None = None
    distill: Annotated[tuple[EncoderStage, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        if self.model.student is not None and self.prune is not None:
            raise ValueError("model.student and [prune] are two ways to a student: leave one of them out")
        if self.model.student is not None and not self.distill:
            raise ValueError("model.student learns in [[distill]], and there is none: add a stage or leave it out")
        if self.distill and self.model.student is None and self.prune is None:
            raise ValueError("[[distill]] needs a student: name model.student, or have [prune] make one")
        if self.finetune is not None and self.data.columns.label is None:
            raise ValueError("[finetune] learns from labels: name their column as data.columns.label")
        return self

    @model_validator(mode="after")
    def _measured_as_encoders_are(self) -> Self:
        for workload in self.workload:
            if workload.task not in ENCODER_TASKS:
                raise ValueError(
                    f"workload {workload.name!r} is of task {workload.task!r}, and encoders are measured under "
                    f"{' and '.join(ENCODER_TASKS)}"
                )
        section = self.budget
        for limit in (*section.constraints, *section.preferences):
            if "_ratio" in limit:
                raise ValueError(
                    f"budget: {limit!r} is relative to the teacher, and encoders are measured without it: give a "
                    "limit of its own"
                )
        return self
