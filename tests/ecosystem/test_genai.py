"""onnxruntime-genai, in an environment of its own, generates the same greedy tokens from our folders as our runtime."""

import json
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.building.standard_graph import write_standard_graph
from slmdeploy.exporting.export import export
from slmdeploy.exporting.genai import write_genai_config
from slmdeploy.runtime.text import load_tokenizer
from tests.ecosystem.environments import Environment, environment
from tests.ecosystem.graphs import NEW_TOKENS, PADDING, PROMPTS, our_tokens, until_end, write_graphs
from tests.exporting.families import CASES, write_case
from tests.graphs import write_manifest, write_tiny_graph

pytestmark = pytest.mark.slow
LONG_PROMPTS = [[5, 6, 7, 200, 31] * 8, [9, 40, 77]]
"""One that is longer than the windows of the families, and one that is not."""
BY_LONGEST = {"llama-dynamic", "phi3-longrope"}
"""Here the frequencies of a whole batch are those for its longest row, in transformers as in our graphs."""
TEXT = "def add(a, b): return no yes"


@pytest.fixture(scope="module")
def genai(request: pytest.FixtureRequest) -> Environment:
    return environment("genai", request.config.cache)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_graphs(tmp_path_factory.mktemp("genai"))


def question(folder: Path, **more: object) -> dict[str, object]:
    return {"folder": str(folder), "prompts": PROMPTS, "max_new_tokens": NEW_TOKENS, "padding": PADDING} | more


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_greedy_tokens_are_the_same_alone_and_in_a_batch(
    genai: Environment, folders: dict[str, Path], precision: str
) -> None:
    folder = folders[precision]
    expected = our_tokens(folder)
    answer = genai.run("genai_generate.py", question(folder, text=TEXT))
    assert answer["type"] == "llama"
    assert until_end(answer["alone"]) == expected
    assert until_end(answer["batch"]) == expected
    assert len({tuple(row) for row in expected}) == 3, "prompts of one continuation would hide a mix-up"
    assert answer["encoded"] == load_tokenizer(folder).encode(TEXT, add_special_tokens=False).ids
    assert answer["decoded"] == TEXT


@pytest.mark.parametrize("name", CASES)
def test_every_family_gives_the_same_tokens(genai: Environment, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    write_case(case, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", out=tmp_path / "graph", max_length=case.max_length)
    padding = json.loads((tmp_path / "graph" / "genai_config.json").read_text())["model"]["pad_token_id"]
    asked = question(tmp_path / "graph", prompts=LONG_PROMPTS, padding=padding)
    answer = genai.run("genai_generate.py", asked)
    expected = our_tokens(tmp_path / "graph", LONG_PROMPTS)
    assert until_end(answer["alone"]) == expected
    assert until_end(answer["batch"]) == expected or name in BY_LONGEST


@pytest.mark.parametrize(
    "how", [{"dialect": "portable"}, {"dialect": "portable", "opset": 23}, {"fallback": True}], ids=str
)
def test_a_graph_that_is_standard_itself_gives_the_same_tokens(
    genai: Environment, tmp_path: Path, how: dict[str, Any]
) -> None:
    write_case(CASES["qwen3"], tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", out=tmp_path / "graph", **how)
    assert not (tmp_path / "graph" / "standard.onnx").exists()
    answer = genai.run("genai_generate.py", question(tmp_path / "graph", padding=1))
    assert until_end(answer["alone"]) == our_tokens(tmp_path / "graph")


def test_layers_may_differ_in_their_heads(genai: Environment, tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "graph", kv_heads=(4, 2), tasks=("generate",))
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of", "pad_token_id": PADDING}))
    (folder / "generation_config.json").write_text("{}")
    write_standard_graph(folder / "model.onnx")
    write_genai_config(folder)
    write_manifest(folder)
    answer = genai.run("genai_generate.py", question(folder))
    assert answer["type"] == "decoder"
    assert until_end(answer["alone"]) == our_tokens(folder)
