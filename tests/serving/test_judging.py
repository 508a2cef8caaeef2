"""Scores, orders and labels over HTTP are the runtime's own."""

import math
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.runtime.encoder_model import load_encoder
from slmdeploy.runtime.model import load
from slmdeploy.serving.judging import sigmoid
from tests.runtime.encoder_graphs import write_encoder_graph
from tests.serving.live import client


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    with client(url) as asking:
        answer = asking.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_decoder_scores_as_alone(url: str, decoder: Path) -> None:
    items = [" one", " two two", " three"]
    found = post(url, "/score", {"prefix": "a prefix", "items": items})
    assert found["scores"] == pytest.approx(load(decoder).score("a prefix", items), abs=1e-4)


def test_a_cross_encoder_scores_as_alone_and_reranks(encoder_urls: dict[str, str], tmp_path: Path) -> None:
    alone = load_encoder(write_encoder_graph(tmp_path / "score", "score")).score("a", ["b", "c", "d"])
    assert post(encoder_urls["score"], "/score", {"prefix": "a", "items": ["b", "c", "d"]})["scores"] == pytest.approx(
        alone
    )
    body = {"query": "a", "documents": ["b", {"text": "c"}, "d"], "top_n": 2, "return_documents": True}
    for path in ("/rerank", "/v1/rerank"):
        results = post(encoder_urls["score"], path, body)["results"]
        best = sorted(range(3), key=lambda i: -alone[i])[:2]
        assert [each["index"] for each in results] == best
        assert [each["document"]["text"] for each in results] == ["bcd"[i] for i in best]
        assert results[0]["relevance_score"] == pytest.approx(sigmoid(alone[best[0]]))


def test_a_classifier_labels_texts_and_pairs(encoder_urls: dict[str, str], tmp_path: Path) -> None:
    alone = load_encoder(write_encoder_graph(tmp_path / "classify", "classify")).classify(["a b", ("a", "c")])
    body = {"input": ["a b", {"text": "a", "text_pair": "c"}]}
    data = post(encoder_urls["classify"], "/classify", body)["data"]
    assert [each["label"] for each in data] == [each.label for each in alone]
    assert [each["score"] for each in data] == pytest.approx([each.score for each in alone])
    assert list(data[0]["scores"]) == ["low", "high"]


def test_a_tagger_labels_tokens_at_their_places(encoder_urls: dict[str, str], tmp_path: Path) -> None:
    (alone,) = load_encoder(write_encoder_graph(tmp_path / "tokens", "tokens")).classify_tokens(["a b"])
    (found,) = post(encoder_urls["tokens"], "/classify", {"input": "a b"})["data"]
    assert [(t["label"], t["start"], t["end"]) for t in found["tokens"]] == [(t.label, t.start, t.end) for t in alone]


def test_a_decoders_items_are_not_cut_and_are_counted(url: str) -> None:
    with client(url) as asking:
        cut = asking.post("/score", json={"prefix": "a", "items": ["b"], "truncate": True})
        assert (cut.status_code, cut.json()["error"]["param"]) == (400, "truncate")
        many = asking.post("/score", json={"prefix": "a", "items": ["b"] * 1025})
        assert (many.status_code, many.json()["error"]["param"]) == (400, "items")
        long = asking.post("/score", json={"prefix": "a" * 300, "items": ["b", "c" * 300]})
        assert long.json()["error"]["code"] == "context_length_exceeded"
        assert asking.post("/classify", json={"input": "a"}).status_code == 404


def test_the_sigmoid_does_not_overflow() -> None:
    assert (sigmoid(0.0), sigmoid(-1e4), sigmoid(1e4)) == (0.5, 0.0, 1.0)
    assert sigmoid(-2.0) == pytest.approx(1 / (1 + math.exp(2)))
