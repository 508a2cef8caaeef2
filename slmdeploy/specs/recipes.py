"""Recipe: what a user writes for one project, from the teacher to the package."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from slmdeploy.errors import InputError
from slmdeploy.specs.base import Positive, Share, Spec
from slmdeploy.specs.budgets import Budget, Objective, parse_budget
from slmdeploy.specs.distillation import DistillStage
from slmdeploy.specs.latency import parse_latency
from slmdeploy.specs.workloads import Workload


class ModelSource(Spec):
    """Where the checkpoint comes from: a folder relative to the recipe, or a Hugging Face id."""

    teacher: str


class DataSource(Spec):
    """``stdlib`` (the embedded default), or a folder of JSON lines relative to the recipe (docs/data.md).

    ``mixture`` is a file beside the recipe that `prune` and `distill` learn from instead (mixtures.py).
    """

    source: str
    mixture: str | None = None
    labels: Annotated[tuple[str, str], Field(strict=False)] = (" no", " yes")


class PrunePlan(Spec):
    """``ratio`` is the share of MLP neurons and GQA groups that is removed, ``layer_ratio`` that of whole layers.

    ``query_ratio`` is the share of each KV head's query heads, where it has several.
    ``hidden_ratio`` is the share of the residual stream's channels. ``allocation`` "global" lets layers differ. With
    ``rounds`` above 1 the shares go in as many steps, and ``between`` trains after each but the last. ``latency`` is a
    limit that stands in the place of all shares: the model is shaped to meet it, built under ``profile``.
    """

    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    latency: str | None = None
    profile: str | None = None
    method: Literal["osscar", "minitron", "magnitude", "random"] = "osscar"
    attention_ratio: Share | None = None
    query_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    layer_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    hidden_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    allocation: Literal["uniform", "global"] = "uniform"
    calibration_tokens: Positive = 16384
    seed: int = 0
    rounds: Positive = 1
    between: DistillStage | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What `prune` takes of it; rounds, and the limit with its profile, are for whoever calls `prune`."""
        return self.model_dump(exclude={"rounds", "between", "latency", "profile"})

    @model_validator(mode="after")
    def _latency_decides(self) -> Self:
        if (self.latency is None) != (self.profile is None):
            raise ValueError("latency and profile go together: set both or neither")
        if self.latency is not None:
            try:
                parse_latency(self.latency)
            except InputError as error:
                raise ValueError(str(error)) from error
            zeros = (self.query_ratio, self.layer_ratio, self.hidden_ratio)
            shares = (self.ratio, self.attention_ratio, *(share or None for share in zeros))
            if any(share is not None for share in shares) or self.rounds > 1 or self.allocation == "global":
                raise ValueError("latency decides what goes: leave ratios, rounds and allocation out")
        return self

    @model_validator(mode="after")
    def _rounds_train(self) -> Self:
        if (self.rounds > 1) != (self.between is not None):
            raise ValueError("rounds above 1 and a [prune.between] stage go together: set both or neither")
        if self.rounds > 1 and self.allocation == "global":
            raise ValueError("rounds above 1 go with allocation uniform: uneven layers are not pruned again")
        if self.rounds > 1 and self.query_ratio:
            raise ValueError("rounds above 1 take whole GQA groups: set query_ratio to 0")
        return self

    @model_validator(mode="after")
    def _something_is_removed(self) -> Self:
        if self.latency is None and self.ratio is None:
            raise ValueError("give a ratio, or a latency to shape the model to")
        others = (self.attention_ratio, self.query_ratio, self.layer_ratio, self.hidden_ratio)
        if self.ratio == 0 and not any(others):
            raise ValueError("ratio = 0 goes with a layer_ratio or hidden_ratio above 0, or an attention_ratio")
        return self


class Elsewhere(Spec):
    """Profiles to build for a target that is not this machine, such as a GPU; what they take there is estimated."""

    target: str
    profiles: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]


class Candidates(Spec):
    """The profiles to build and the target to build them for; ``auto`` is the target that this machine matches.

    ``estimate`` names other targets that the builds are estimated for, ``measurements`` files that `slmdeploy profile`
    wrote elsewhere, relative to the recipe: the selection is among all of them, hardware and build together. ``search``
    finds each build's best session options before it is measured, and the package runs with them. ``elsewhere`` has
    builds of their own for targets whose engines are not here.
    """

    profiles: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    target: str = "auto"
    estimate: Annotated[tuple[str, ...], Field(strict=False)] = ()
    measurements: Annotated[tuple[str, ...], Field(strict=False)] = ()
    search: bool = False
    elsewhere: Annotated[tuple[Elsewhere, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _elsewhere_names_each_target_once(self) -> Self:
        names = [one.target for one in self.elsewhere]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"elsewhere has the target {twice!r} twice: list all of its profiles in one table")
        return self


class BudgetSection(Spec):
    """The budget as a recipe writes it: limits that must hold, limits that are preferred, and an objective."""

    constraints: Annotated[tuple[str, ...], Field(strict=False)] = ()
    preferences: Annotated[tuple[str, ...], Field(strict=False)] = ()
    objective: Objective = "fastest"


class PackagePlan(Spec):
    """What to ship the chosen build as; ``max_bytes`` is the most that all files of it together may have."""

    kind: Literal["edge", "server"] = "edge"
    max_bytes: Positive | None = None


class Project(Spec):
    """What a recipe says behind the compression, of any model: what is built, measured, chosen and shipped."""

    name: str
    candidates: Candidates
    workload: Annotated[tuple[Workload, ...], Field(min_length=1, strict=False)]
    budget: BudgetSection = BudgetSection()
    package: PackagePlan = PackagePlan()

    def parsed_budget(self) -> Budget:
        """The budget section with its limits read."""
        section = self.budget
        return parse_budget(*section.constraints, objective=section.objective, preferences=section.preferences)


class Recipe(Project):
    """One project of a decoder, from the teacher to the package. A stage that is left out is not run."""

    model: ModelSource
    data: DataSource
    tasks: Annotated[tuple[Literal["generate", "score"], ...], Field(min_length=1, strict=False)]
    prune: PrunePlan | None = None
    distill: Annotated[tuple[DistillStage, ...], Field(strict=False)] = ()
