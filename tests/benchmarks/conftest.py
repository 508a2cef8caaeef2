"""The synthetic runs of the report's tests, for benchmarks that read runs."""

from tests.reporting.conftest import infeasible_folder, run, run_folder

__all__ = ["infeasible_folder", "run", "run_folder"]
