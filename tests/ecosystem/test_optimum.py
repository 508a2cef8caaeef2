"""optimum, in an environment of its own with its transformers, loads standard.onnx of our folders and agrees."""

from pathlib import Path

import numpy as np
import pytest

from slmdeploy.building.standard_graph import STANDARD
from slmdeploy.runtime.model import load
from tests.ecosystem.environments import Environment, environment
from tests.ecosystem.graphs import NEW_TOKENS, PROMPTS, our_tokens, until_end, write_graphs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def optimum(request: pytest.FixtureRequest) -> Environment:
    return environment("optimum", request.config.cache)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_graphs(tmp_path_factory.mktemp("optimum"))


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_causal_lm_gives_the_same_logits_and_tokens(
    optimum: Environment, folders: dict[str, Path], precision: str
) -> None:
    folder = folders[precision]
    question = {"folder": str(folder), "file_name": STANDARD, "prompts": PROMPTS, "max_new_tokens": NEW_TOKENS}
    answer = optimum.run("optimum_generate.py", question)
    np.testing.assert_allclose(answer["logits"], load(folder).logits(PROMPTS[0]), atol=1e-4)
    expected = our_tokens(folder)
    assert until_end(answer["alone"]) == expected
    assert until_end(answer["batch"]) == expected
