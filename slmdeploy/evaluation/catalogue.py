"""Finds the tasks of the evaluation harness by name, its own and those in a folder, and loads them with their data.

Loading runs what a task's file says and fetches its data, which is where a task that is unknown, broken or out of reach
becomes one sentence. Knows nothing of models and metrics.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from slmdeploy.errors import InputError


class Catalogue(TaskManager):  # type: ignore[misc]  # the harness ships no type information
    """The harness' tasks, and those of the .yaml files in `folder`, which take the place of others of their names."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder and not folder.is_dir():
            raise InputError(f"{folder} is no folder: name one with the .yaml files of tasks")
        super().__init__(include_path=folder)

    def names(self, wanted: Sequence[str]) -> list[str]:
        """The names that were asked for, patterns such as `mmlu_*` resolved; InputError for what names no task."""
        found: list[str] = []
        for name in wanted:
            matches = self.match_tasks([name])
            if not matches:
                raise InputError(f"the evaluation harness has no task {name!r}{self._offer(name)}")
            found += [match for match in matches if match not in found]
        if not found:
            raise InputError("there are no tasks: name at least one, such as --tasks hellaswag")
        return found

    def _offer(self, name: str) -> str:
        close = get_close_matches(name, self.all_tasks, n=3, cutoff=0.6)
        return f": did you mean {' or '.join(map(repr, close))}?" if close else "; `lm-eval ls tasks` lists what it has"

    def load(self, task_list: Sequence[str]) -> Any:
        """Tasks with their data; InputError where that fails, or a task asks for more than a text model may do."""
        try:
            loaded = super().load(task_list)
        except Exception as error:  # tasks hold code of their own, and what datasets raises has no common base
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            names = ", ".join(task_list)
            raise InputError(
                f"{names} cannot be loaded ({reason}): see to the task's file, and that its data can be reached"
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise InputError(f"the task {name} runs code that the model writes, which this does not: leave it out")
            if getattr(task, "MULTIMODAL", False):
                raise InputError(f"the task {name} shows pictures or sounds, and builds read text: leave it out")
        return loaded
