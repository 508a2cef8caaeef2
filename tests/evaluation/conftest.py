"""A random checkpoint and its graph, which tests of evaluation share because they only read them."""

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

import pytest

from slmdeploy.exporting.export import export
from slmdeploy.runtime.model import Model, load
from tests.worlds import tiny_teacher


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("evaluation") / "teacher")


@pytest.fixture(scope="session")
def graph(checkpoint: Path) -> Path:
    return export(str(checkpoint), out=checkpoint.parent / "graph", tasks=("generate", "score")).path


@pytest.fixture(scope="module")
def own_tasks_only() -> Iterator[None]:
    """Leaves the harness' own tasks out of its index: reading their 14 000 files takes seconds."""
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
        yield


@pytest.fixture(scope="session")
def model(graph: Path) -> Model:
    return load(graph)
