"""A checkpoint of 3 GB: it is exported within 1.3 times its own size of memory, and the graph lies in external data."""

from pathlib import Path

import pytest

from benchmarks.export_memory import peaks_of_export, write_random_checkpoint


@pytest.mark.slow
def test_a_checkpoint_of_3_gb_never_lies_in_memory_twice(tmp_path: Path) -> None:
    weights = write_random_checkpoint(tmp_path / "checkpoint")
    assert weights > 3_000_000_000
    peaks = peaks_of_export(tmp_path / "checkpoint", tmp_path / "graph")
    assert peaks["write graph"] < 0.4 * weights
    assert peaks["all"] < 1.3 * weights
    assert (tmp_path / "graph" / "model.onnx").stat().st_size < 1_000_000
    assert (tmp_path / "graph" / "model.onnx.data").stat().st_size > weights
