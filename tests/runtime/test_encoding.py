"""Encoders in the runtime: texts to rows to batches, the three tasks, runtime.json, and every refusal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmdeploy.runtime.encoder_config import read_encoder
from slmdeploy.runtime.encoder_model import EncoderModel, load_encoder
from slmdeploy.runtime.encoding import batches
from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.model import load as load_decoder
from slmdeploy.runtime.opening import load
from tests.graphs import write_manifest
from tests.runtime.encoder_graphs import runtime_json, table, write_encoder_graph

CLS, SEP, A, B, C, D = 1, 2, 4, 5, 6, 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each role."""
    root = tmp_path_factory.mktemp("encoders")
    return {role: write_encoder_graph(root / role, role) for role in ("embed", "classify", "score", "tokens")}


def test_vectors_are_those_of_each_text_alone_whatever_stands_beside_it(folders: dict[str, Path]) -> None:
    model = load_encoder(folders["embed"])
    texts = ["a", "a b c d a b", "d d", "b"]
    rows = [[CLS, A, SEP], [CLS, A, B, C, D, A, B, SEP], [CLS, D, D, SEP], [CLS, B, SEP]]
    expected = np.stack([table(3)[row].mean(0) for row in rows])
    found = model.embed(texts)
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-6)
    assert np.allclose(model.embed(texts[2:3])[0], expected[2], atol=1e-6)


def test_texts_are_cut_to_the_length_of_the_model(folders: dict[str, Path]) -> None:
    model = load_encoder(folders["embed"])
    cut, whole = model.embed(["a b c d a b c d a b c d", "a b c d a b"])
    assert np.array_equal(cut, whole)


def test_a_named_prompt_goes_in_front_and_the_default_one_unasked(tmp_path: Path) -> None:
    embedding = {**runtime_json()["embedding"], "prompts": {"query": "c ", "none": ""}, "default_prompt": "query"}
    model = load_encoder(write_encoder_graph(tmp_path / "prompts", embedding=embedding))
    asked, unasked, without = model.embed(["a"], prompt="query"), model.embed(["a"]), model.embed(["a"], prompt="none")
    assert np.allclose(asked[0], table(3)[[CLS, C, A, SEP]].mean(0), atol=1e-6)
    assert np.array_equal(asked, unasked)
    assert np.allclose(without[0], table(3)[[CLS, A, SEP]].mean(0), atol=1e-6)
    with pytest.raises(InputError, match="has no prompt named 'passage'; it has: query, none"):
        model.embed(["a"], prompt="passage")


@pytest.mark.parametrize(
    ("activation", "scores"),
    [
        ("softmax", lambda x: np.exp(x) / np.exp(x).sum()),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("none", lambda x: x),
    ],
)
def test_labels_of_texts_and_pairs(tmp_path: Path, activation: str, scores: Any) -> None:
    labels = {**runtime_json("classify")["labels"], "activation": activation}
    model = load_encoder(write_encoder_graph(tmp_path / "labels", "classify", labels=labels))
    found = model.classify(["a b", ("a", "d")])
    for label, row in zip(found, ([CLS, A, B, SEP], [CLS, A, SEP, D, SEP]), strict=True):
        expected = scores(table(2)[row].sum(0))
        assert np.allclose(label.scores, expected, atol=1e-5)
        assert (label.label, label.score) == (("low", "high")[expected.argmax()], max(label.scores))


def test_labels_of_tokens_say_where_each_stands_and_leave_special_tokens_out(folders: dict[str, Path]) -> None:
    model = load_encoder(folders["tokens"])
    assert model.labels_tokens
    (two, one) = model.classify_tokens(["a  b", "c"])
    assert [(token.start, token.end) for token in two] == [(0, 1), (3, 4)]
    assert [token.label for token in two] == [("low", "high")[table(2)[token].argmax()] for token in (A, B)]
    assert len(one) == 1


def test_a_score_is_the_logit_or_the_difference_of_two(folders: dict[str, Path]) -> None:
    row = [CLS, A, SEP, B, C, SEP]
    one = load_encoder(folders["score"]).score("a", ["b c", "d"])
    assert one[0] == pytest.approx(table(1)[row].sum(), abs=1e-5)
    two = load_encoder(folders["classify"]).score("a", ["b c"])
    low, high = table(2)[row].sum(0)
    assert two[0] == pytest.approx(high - low, abs=1e-5)


def test_batches_hold_rows_of_like_length_and_all_rows_once() -> None:
    lengths = [3, 50, 4, 49, 3, 50, 120]
    found = list(batches(lengths, places=100))
    assert found == [[6], [1, 5], [3, 2], [0, 4]]
    assert list(batches([], places=100)) == []


def test_load_gives_the_class_that_fits(folders: dict[str, Path], tiny: Path) -> None:
    assert isinstance(load(folders["embed"]), EncoderModel)
    assert isinstance(load(tiny), Model)
    assert load(folders["score"], threads=1).tasks == ("score",)
    with pytest.raises(InputError, match="is an encoder's"):
        load_decoder(folders["embed"])
    with pytest.raises(InputError, match="is a decoder"):
        load_encoder(tiny)
    with pytest.raises(InputError, match="threads must be 0 or more"):
        load(folders["embed"], threads=-1)


@pytest.mark.parametrize(
    ("role", "call", "message"),
    [
        ("embed", lambda m: m.embed([]), "There are no texts"),
        ("embed", lambda m: m.embed("a b"), "There are no texts"),
        ("embed", lambda m: m.embed(["a", ""]), "Text 1 is empty"),
        ("embed", lambda m: m.embed(["\ud800"]), "Text 0 is no Unicode"),
        ("embed", lambda m: m.classify(["a"]), "was made for embed, not for classify"),
        ("embed", lambda m: m.score("a", ["b"]), "was made for embed, not for score"),
        ("score", lambda m: m.score("", ["b"]), "Text 0 is empty"),
        ("score", lambda m: m.score("a", []), "There are no items"),
        ("score", lambda m: m.score("a", "b"), "There are no items"),
        ("classify", lambda m: m.embed(["a"]), "was made for classify and score, not for embed"),
        ("classify", lambda m: m.classify_tokens(["a"]), "labels texts: use classify"),
        ("tokens", lambda m: m.classify(["a"]), "labels tokens: use classify_tokens"),
    ],
)
def test_calls_that_cannot_be_answered(folders: dict[str, Path], role: str, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(load_encoder(folders[role]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format must be 1"),
        ({"tasks": ["embed", "score"]}, "tasks must be embed alone, or classify and score"),
        ({"tasks": ["classify"]}, "embedding must be an object exactly when tasks has"),
        ({"tasks": ["generate"]}, "tasks must be a list of names out of embed, classify, score"),
        ({"embedding": None}, "embedding must be an object"),
        ({"labels": runtime_json("classify")["labels"]}, "labels must be an object exactly"),
        ({"inputs": ["attention_mask", "input_ids"]}, "inputs must be input_ids, attention_mask and perhaps"),
        ({"inputs": ["input_ids", "pixels"]}, "inputs must be a list of names"),
        ({"pad_token_id": 8}, "pad_token_id must be an integer from 0 to 7"),
        ({"embedding": {**runtime_json()["embedding"], "pooling": "max"}}, "embedding.pooling must be one of mean"),
        ({"embedding": {**runtime_json()["embedding"], "default_prompt": "x"}}, "embedding.default_prompt must be"),
        ({"embedding": {**runtime_json()["embedding"], "more": 1}}, "the key embedding.more is not known"),
        ({"more": 1}, "the key more is not known"),
        ({"session": {"threads": 1}}, "the key session.spinning is missing"),
    ],
)
def test_a_runtime_json_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "runtime.json").write_text(json.dumps(runtime_json() | changes))
    with pytest.raises(CorruptArtifactError, match=message):
        read_encoder(tmp_path)


def test_a_scorer_has_one_label_or_two(tmp_path: Path) -> None:
    labels = {"names": ["a", "b", "c"], "per_token": False, "activation": "softmax"}
    (tmp_path / "runtime.json").write_text(json.dumps(runtime_json("classify", labels=labels)))
    with pytest.raises(CorruptArtifactError, match="one or two for a text"):
        read_encoder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": ["input_ids", "attention_mask"]}, "has the inputs input_ids, attention_mask, token_type_ids and"),
        ({"embedding": {**runtime_json()["embedding"], "dimension": 4}}, "does not end in 4"),
        ({"max_length": 3}, "leaves no place for text"),
        ({"vocab_size": 5}, "tokenizer.json gives token 5, but the model has 5"),
    ],
)
def test_a_graph_or_tokenizer_of_another_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = write_encoder_graph(tmp_path / "graph")
    (folder / "runtime.json").write_text(json.dumps(runtime_json() | changes))
    write_manifest(folder, kind="graph")
    with pytest.raises(CorruptArtifactError, match=message):
        load_encoder(folder).embed(["a b"])


def test_a_graph_that_computes_nan_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_encoder(folders["embed"])
    monkeypatch.setattr(model.encoder, "run", lambda rows, names: [np.full((len(rows), 3), np.nan, np.float32)])
    with pytest.raises(CorruptArtifactError, match="computes NaN or infinity"):
        model.embed(["a"])


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    folder = write_encoder_graph(tmp_path / "graph")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptArtifactError, match=r"tokenizer\.json has 2 bytes"):
        load(folder)
