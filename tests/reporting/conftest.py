"""One synthetic run for all tests of the report: written once, read by many, changed by none."""

from pathlib import Path

import pytest

from slmdeploy.reporting.reading import read_run
from slmdeploy.reporting.records import Run
from tests.reporting.fixtures import make_run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a feasible budget."""
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def infeasible_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose budget no build meets."""
    return make_run(tmp_path_factory.mktemp("runs") / "infeasible", budget=["size_bytes <= 1e6"])


@pytest.fixture
def run(run_folder: Path) -> Run:
    """The run of `run_folder`."""
    return read_run(run_folder)
