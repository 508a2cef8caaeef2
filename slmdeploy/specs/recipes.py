"""Recipe: what a user writes for one project, from the teacher to the package."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from slmdeploy.errors import InputError, SpecError
from slmdeploy.specs.base import Positive, Share, Spec, load_toml
from slmdeploy.specs.budgets import Budget, Objective, parse_budget
from slmdeploy.specs.distillation import DistillStage
from slmdeploy.specs.latency import parse_latency
from slmdeploy.specs.workloads import SUGGESTED, Task, Workload, named_workload


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

    ``hidden_ratio`` is the share of the residual stream's channels. ``allocation`` "global" lets layers differ. With
    ``rounds`` above 1 the shares go in as many steps, and ``between`` trains after each but the last. ``latency`` is a
    limit that stands in the place of all shares: the model is shaped to meet it, built under ``profile``.
    """

    ratio: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    latency: str | None = None
    profile: str | None = None
    method: Literal["osscar", "minitron", "magnitude", "random"] = "osscar"
    attention_ratio: Share | None = None
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
            shares = (self.ratio, self.attention_ratio, self.layer_ratio or None, self.hidden_ratio or None)
            if any(share is not None for share in shares) or self.rounds > 1 or self.allocation == "global":
                raise ValueError("latency decides what goes: leave ratios, rounds and allocation out")
        return self

    @model_validator(mode="after")
    def _rounds_train(self) -> Self:
        if (self.rounds > 1) != (self.between is not None):
            raise ValueError("rounds above 1 and a [prune.between] stage go together: set both or neither")
        if self.rounds > 1 and self.allocation == "global":
            raise ValueError("rounds above 1 go with allocation uniform: uneven layers are not pruned again")
        return self

    @model_validator(mode="after")
    def _something_is_removed(self) -> Self:
        if self.latency is None and self.ratio is None:
            raise ValueError("give a ratio, or a latency to shape the model to")
        if (
            self.latency is None
            and self.ratio == self.layer_ratio == self.hidden_ratio == 0
            and not self.attention_ratio
        ):
            raise ValueError("ratio = 0 goes with a layer_ratio or hidden_ratio above 0, or an attention_ratio")
        return self


class Candidates(Spec):
    """The profiles to build and the target to build them for; ``auto`` is the target that this machine matches.

    ``estimate`` names other targets that the builds are estimated for, ``measurements`` files that `slmdeploy profile`
    wrote elsewhere, relative to the recipe: the selection is among all of them, hardware and build together. ``search``
    finds each build's best session options before it is measured, and the package runs with them.
    """

    profiles: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    target: str = "auto"
    estimate: Annotated[tuple[str, ...], Field(strict=False)] = ()
    measurements: Annotated[tuple[str, ...], Field(strict=False)] = ()
    search: bool = False


class BudgetSection(Spec):
    """The budget as a recipe writes it: limits that must hold, limits that are preferred, and an objective."""

    constraints: Annotated[tuple[str, ...], Field(strict=False)] = ()
    preferences: Annotated[tuple[str, ...], Field(strict=False)] = ()
    objective: Objective = "fastest"


class PackagePlan(Spec):
    """What to ship the chosen build as; ``max_bytes`` is the most that all files of it together may have."""

    kind: Literal["edge", "server"] = "edge"
    max_bytes: Positive | None = None


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
        """The budget section with its limits read."""
        section = self.budget
        return parse_budget(*section.constraints, objective=section.objective, preferences=section.preferences)


def load_recipe(path: Path) -> Recipe:
    """The recipe at ``path``, its budget checked for form."""
    recipe = load_toml(path, Recipe)
    try:
        recipe.parsed_budget()
    except InputError as error:
        raise SpecError(f"{path}: {error}") from error
    return recipe.model_copy(update={"workload": _beside(path, recipe.workload)})


class WorkloadFile(Spec):
    """A file of workloads alone: ``[[workload]]`` tables as in a recipe."""

    workload: Annotated[tuple[Workload, ...], Field(min_length=1, strict=False)]


def choose_workloads(names: Sequence[str], recipe: Path | None = None) -> tuple[Workload, ...]:
    """The workloads that ``names`` say, or those of a recipe; exactly one of the two must be given.

    A name is one that `named_workload` reads, a .toml file with ``[[workload]]`` tables, or the .jsonl file of a trace.
    """
    if bool(names) == (recipe is not None):
        raise InputError(f"name workloads or a recipe, one of the two; workloads are such as {', '.join(SUGGESTED)}")
    if recipe is not None:
        return load_recipe(recipe).workload
    return tuple(workload for name in names for workload in _workloads_of(name))


def _workloads_of(name: str) -> tuple[Workload, ...]:
    if name.endswith(".toml"):
        return _beside(Path(name), load_toml(Path(name), WorkloadFile).workload)
    if name.endswith(".jsonl"):
        task = trace_task(Path(name))
        return (Workload(name=Path(name).stem, task=task, scenario="trace", trace=name),)
    return (named_workload(name),)


def _beside(file: Path, workloads: tuple[Workload, ...]) -> tuple[Workload, ...]:
    """The workloads with their traces found beside the file that names them."""
    return tuple(
        one if one.trace is None else one.model_copy(update={"trace": str(file.parent / one.trace)})
        for one in workloads
    )


def trace_task(file: Path) -> Task:
    """The task of a trace, which is what the first line has lengths of. Raises InputError where it cannot be read."""
    try:
        with file.open(encoding="utf-8") as stream:
            first = json.loads(stream.readline())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no trace: its first line cannot be read as JSON ({error})") from error
    kinds: dict[str, Task] = {"prompt_tokens": "generate", "prefix_tokens": "score", "text_tokens": "embed"}
    for key, task in kinds.items():
        if isinstance(first, dict) and key in first:
            return task
    raise InputError(f"{file} is no trace: its first line has none of {', '.join(kinds)}")
