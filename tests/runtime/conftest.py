"""Tiny models that tests of the runtime share because they only read them."""

from pathlib import Path

import pytest

from slmdeploy.runtime.model import Model, load
from tests.graphs import write_tiny_graph


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with unequal numbers of KV heads and a context of 64 tokens."""
    return write_tiny_graph(tmp_path_factory.mktemp("graphs") / "tiny", kv_heads=(2, 1))


@pytest.fixture(scope="session")
def model(tiny: Path) -> Model:
    """The tiny folder, loaded once."""
    return load(tiny)
