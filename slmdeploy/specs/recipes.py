"""Recipe: what a user writes for one project, from the teacher to the package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from slmdeploy.errors import InputError, SpecError
from slmdeploy.specs.base import AboveZero, Positive, Share, Spec, load_toml, nearest
from slmdeploy.specs.budgets import Budget, Objective, parse_budget
from slmdeploy.specs.workloads import WORKLOADS, Workload


class ModelSource(Spec):
    """Where the checkpoint comes from: a folder relative to the recipe, or a Hugging Face id."""

    teacher: str


class DataSource(Spec):
    """``stdlib`` (the embedded default), or a folder of JSON lines relative to the recipe (docs/data.md)."""

    source: str
    labels: Annotated[tuple[str, str], Field(strict=False)] = (" no", " yes")


class PrunePlan(Spec):
    """``ratio`` is the share of MLP neurons and GQA groups that is removed, ``layer_ratio`` that of whole layers."""

    ratio: Annotated[float, Field(ge=0.0, lt=1.0)]
    method: Literal["osscar", "magnitude", "random"] = "osscar"
    attention_ratio: Share | None = None
    layer_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    calibration_tokens: Positive = 16384
    seed: int = 0

    @model_validator(mode="after")
    def _something_is_removed(self) -> Self:
        if self.ratio == self.layer_ratio == 0:
            raise ValueError("ratio = 0 goes with a layer_ratio above 0: raise either")
        return self


class DistillStage(Spec):
    """One stage of distillation: supervised when ``on_policy`` is 0, otherwise partly on what the student writes.

    The loss of a counted token is ``ce_share``·CE + (1 - ``ce_share``)·KD, where KD is ``loss`` at ``temperature``,
    multiplied by its square. ``beta`` is generalised JSD's weight of the teacher (GKD, Agarwal et al. 2024): 0 is the
    forward KL, 1 the reverse. ``score_share`` is the share of rows that hold scoring records. ``on_policy`` is the
    probability that a batch's responses are sampled from the student. Lengths are in tokens, ``batch_rows`` is rows of
    ``length`` tokens per forward pass, and one optimiser step sees ``batch_rows · gradient_accumulation`` of them.
    ``optimizer`` = "muon" orthogonalises the updates of the blocks' matrices and leaves the rest to AdamW at a fixed
    share of ``learning_rate`` (training.py).
    """

    steps: Positive
    batch_rows: Positive = 8
    length: Annotated[int, Field(ge=16)] = 512
    gradient_accumulation: Positive = 1
    learning_rate: AboveZero = 1e-3
    warmup_share: Share = 0.05
    optimizer: Literal["adamw", "muon"] = "adamw"
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Share | None = None
    temperature: AboveZero = 1.0
    ce_share: Share = 0.0
    score_share: Share = 0.0
    on_policy: Share = 0.0
    response_tokens: Positive = 64
    sample_temperature: AboveZero = 0.9
    dtype: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    save_steps: Positive = 100
    eval_rows: Annotated[int, Field(ge=0)] = 16
    seed: int = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if (self.beta is None) == (self.loss == "jsd"):
            raise ValueError(f"beta goes with loss = 'jsd' and with no other, and loss = {self.loss!r}")
        if self.on_policy > 0 and self.score_share == 1:
            raise ValueError("on_policy needs rows of text to sample: lower score_share below 1")
        if self.on_policy > 0 and self.response_tokens > self.length // 2:
            raise ValueError(f"response_tokens = {self.response_tokens} leaves too little of length = {self.length}")
        return self

    @property
    def rows(self) -> int:
        """Rows that the whole stage sees."""
        return self.steps * self.batch_rows * self.gradient_accumulation

    @property
    def tokens(self) -> int:
        """Tokens that the whole stage sees, padding included."""
        return self.rows * self.length


def distill_stage(**fields: Any) -> DistillStage:
    """A DistillStage from loose fields, as a command line gives them; raises SpecError with the first wrong one."""
    try:
        return DistillStage.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"distillation stage: {where + ': ' if where else ''}{reason}") from error


class Candidates(Spec):
    """The profiles to build and the target to build them for; ``auto`` is the target that this machine matches."""

    profiles: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    target: str = "auto"


class BudgetSection(Spec):
    """The budget as a recipe writes it: a list of ``metric<=number`` and an objective."""

    constraints: Annotated[tuple[str, ...], Field(strict=False)] = ()
    objective: Objective = "fastest"


class PackagePlan(Spec):
    """What to ship the chosen build as."""

    kind: Literal["edge"] = "edge"


class Recipe(Spec):
    """One project from the teacher to the package. A stage that is left out is not run."""

    name: str
    model: ModelSource
    data: DataSource
    tasks: Annotated[tuple[Literal["generate", "score"], ...], Field(min_length=1, strict=False)]
    prune: PrunePlan | None = None
    distill: Annotated[tuple[DistillStage, ...], Field(strict=False)] = ()
    candidates: Candidates
    workload: Annotated[tuple[Workload, ...], Field(min_length=1, strict=False)]
    budget: BudgetSection = BudgetSection()
    package: PackagePlan = PackagePlan()

    def parsed_budget(self) -> Budget:
        """The budget section with its constraints read."""
        return parse_budget(*self.budget.constraints, objective=self.budget.objective)


def load_recipe(path: Path) -> Recipe:
    """The recipe at ``path``, its budget checked for form."""
    recipe = load_toml(path, Recipe)
    try:
        recipe.parsed_budget()
    except InputError as error:
        raise SpecError(f"{path}: {error}") from error
    return recipe


def choose_workloads(names: Sequence[str], recipe: Path | None = None) -> tuple[Workload, ...]:
    """The shipped workloads called ``names``, or those of a recipe; exactly one of the two must be given."""
    if bool(names) == (recipe is not None):
        raise InputError(f"name workloads or a recipe, one of the two; shipped workloads: {', '.join(WORKLOADS)}")
    if recipe is not None:
        return load_recipe(recipe).workload
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise InputError(f"there is no workload {unknown[0]!r}{nearest(unknown[0], list(WORKLOADS))}")
    return tuple(WORKLOADS[name] for name in names)
