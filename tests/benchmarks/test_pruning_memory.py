"""Pruning holds one layer's statistics at a time: memory beyond the weights does not grow with the depth."""

from pathlib import Path

import pytest

from benchmarks.pruning_memory import measure


@pytest.mark.slow
def test_memory_beyond_the_weights_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    few, many = (measure("tiny", layers, 2048, tmp_path) for layers in (2, 10))
    assert many["parameters"] > 2 * few["parameters"]
    # 8 layers' moments alone would be 8 · 512² · 8 bytes
    assert many["beyond_bytes"] - few["beyond_bytes"] < 8 * 512**2 * 8
