"""optimum and sentence-transformers, in an environment of their own, load our folders and agree with our runtime.

Decoders are loaded by optimum's ORTModelForCausalLM, classifiers by its classes for them, embedders and cross-encoders
by sentence-transformers over ONNX.
"""

from pathlib import Path

import numpy as np
import pytest

from slmdeploy.building.standard_graph import STANDARD
from slmdeploy.exporting.export import export
from slmdeploy.runtime.encoder_model import EncoderModel, load_encoder
from slmdeploy.runtime.encoding import row_of
from slmdeploy.runtime.model import load
from tests.ecosystem.environments import Environment, environment
from tests.ecosystem.graphs import NEW_TOKENS, PROMPTS, our_tokens, until_end, write_graphs
from tests.exporting.encoders import write_encoder, write_modules
from tests.exporting.families import CASES, write_case

pytestmark = pytest.mark.slow
TEXTS = ["the cat sat", "where is the cat sat on?", "on."]
PAIRS = [("where is the cat", text) for text in TEXTS]


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


@pytest.mark.parametrize("name", ["llama3-rope", "mistral-window", "qwen2-window-yarn", "qwen3", "gemma3", "granite"])
def test_families_that_it_knows_give_the_same_tokens(optimum: Environment, tmp_path: Path, name: str) -> None:
    write_case(CASES[name], tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", out=tmp_path / "graph")
    question = {"folder": str(tmp_path / "graph"), "file_name": STANDARD, "prompts": PROMPTS, "max_new_tokens": 12}
    answer = optimum.run("optimum_generate.py", question)
    expected = [row[:12] for row in our_tokens(tmp_path / "graph")]
    assert until_end(answer["alone"]) == expected
    assert until_end(answer["batch"]) == expected


def test_a_portable_graph_needs_no_file_name(optimum: Environment, tmp_path: Path) -> None:
    write_case(CASES["qwen2"], tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", out=tmp_path / "graph", dialect="portable")
    question = {"folder": str(tmp_path / "graph"), "file_name": None, "prompts": PROMPTS, "max_new_tokens": NEW_TOKENS}
    answer = optimum.run("optimum_generate.py", question)
    expected = our_tokens(tmp_path / "graph")
    assert until_end(answer["alone"]) == expected
    assert until_end(answer["batch"]) == expected


def exported(folder: Path, family: str, role: str) -> EncoderModel:
    """The graph of a tiny encoder, opened by our runtime."""
    write_encoder(folder / "checkpoint", family, role)
    if role == "embed":
        pooling = {"pooling_mode_mean_tokens": True}
        write_modules(folder / "checkpoint", "Normalize", pooling=pooling)
    return load_encoder(export(folder / "checkpoint", out=folder / "graph").path)


@pytest.mark.parametrize("family", ["BERT", "DistilBERT", "RoBERTa", "ModernBERT"])
@pytest.mark.parametrize("role", ["classify", "tokens"])
def test_a_classifier_gives_the_same_logits(optimum: Environment, tmp_path: Path, family: str, role: str) -> None:
    model = exported(tmp_path, family, role)
    encodings = [model.tokenizer.encode(text) for text in TEXTS]
    width = max(len(encoding.ids) for encoding in encodings)
    padding = [[0] * (width - len(encoding.ids)) for encoding in encodings]
    inputs = {
        "input_ids": [e.ids + [model.runtime.pad_token_id] * len(p) for e, p in zip(encodings, padding, strict=True)],
        "attention_mask": [e.attention_mask + p for e, p in zip(encodings, padding, strict=True)],
    }
    kind = "ORTModelForSequenceClassification" if role == "classify" else "ORTModelForTokenClassification"
    question = {"folder": str(tmp_path / "graph"), "class": kind, "inputs": inputs}
    found = optimum.run("optimum_encoder.py", question)["logits"]
    expected = model.encoder.rows([row_of(encoding) for encoding in encodings], "logits")
    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_allclose(np.array(theirs)[: len(ours)], ours, atol=1e-4)


@pytest.mark.parametrize("family", ["BERT", "MiniLM (XLM-R form)", "MPNet"])
def test_sentence_transformers_gives_the_same_vectors(optimum: Environment, tmp_path: Path, family: str) -> None:
    model = exported(tmp_path, family, "embed")
    answer = optimum.run("sentence_transformers_encode.py", {"folder": str(tmp_path / "graph"), "texts": TEXTS})
    np.testing.assert_allclose(answer["vectors"], model.embed(TEXTS), atol=1e-5)


def test_a_cross_encoder_gives_the_same_scores(optimum: Environment, tmp_path: Path) -> None:
    model = exported(tmp_path, "BERT", "score")
    answer = optimum.run("sentence_transformers_encode.py", {"folder": str(tmp_path / "graph"), "pairs": PAIRS})
    scores = np.array(model.score(PAIRS[0][0], TEXTS))
    np.testing.assert_allclose(answer["scores"], 1 / (1 + np.exp(-scores)), atol=1e-5)
