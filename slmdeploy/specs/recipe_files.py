"""Reads recipes from their files, and the workloads that a command line names or a recipe holds.

Which kind of recipe a file is, is told by what it says of its data and tasks, so that nobody has to write it down.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from slmdeploy.errors import InputError, SpecError
from slmdeploy.specs.base import Spec, checked, load_toml, read_toml
from slmdeploy.specs.encoder_recipes import EncoderRecipe
from slmdeploy.specs.recipes import Recipe
from slmdeploy.specs.workloads import ENCODER_TASKS, SUGGESTED, Task, Workload, named_workload


def load_recipe(path: Path) -> Recipe | EncoderRecipe:
    """The recipe at ``path``, of a decoder or of an encoder, its budget checked for form."""
    content = read_toml(path)
    recipe: Recipe | EncoderRecipe
    recipe = checked(content, EncoderRecipe, path) if _is_of_encoder(content) else checked(content, Recipe, path)
    try:
        recipe.parsed_budget()
    except InputError as error:
        raise SpecError(f"{path}: {error}") from error
    return recipe.model_copy(update={"workload": _beside(path, recipe.workload)})


def _is_of_encoder(content: dict[str, Any]) -> bool:
    """Whether a file's content has what only encoders have: columns of a table, fine-tuning, or one of their tasks."""
    data, tasks = content.get("data"), content.get("tasks")
    named = isinstance(tasks, list) and any(task in ENCODER_TASKS for task in tasks)
    return named or "finetune" in content or (isinstance(data, dict) and "columns" in data)


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
