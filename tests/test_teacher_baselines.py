"""The simple baselines of the model card: identifiers split, BM25 in the right order, n-gram bits by hand."""

import importlib.util
import math
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "examples" / "teacher_baselines.py"


@pytest.fixture(scope="module")
def baselines():
    spec = importlib.util.spec_from_file_location("teacher_baselines", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_identifiers_are_split(baselines):
    assert baselines.words("http.HTTPServer.get_itemAt2(self)") == [
        "http",
        "http",
        "server",
        "get",
        "item",
        "at",
        "2",
        "self",
    ]


def test_bm25_prefers_rare_shared_words(baselines):
    record = {
        "prefix": "close the socket",
        "items": ["the the file", "socket.close", "the socket", "other"],
        "labels": [],
    }
    ((the, both, socket, other),) = baselines.bm25_scores([record])
    assert both > socket > the > other == 0


def test_ngram_of_order_one_by_hand(baselines):
    # Counts a: 3, b: 1, two different bytes: p(a) = (3 + 2/256) / 6, p(b) = (1 + 2/256) / 6.
    bits = baselines.ngram_bits_per_byte(["aaab"], [("a", "ab")], order=1)
    assert bits == pytest.approx(-(math.log2((3 + 2 / 256) / 6) + math.log2((1 + 2 / 256) / 6)) / 2)


def test_longer_contexts_help_on_repetitive_text_and_any_byte_has_a_probability(baselines):
    train, test = ["abcabcabc" * 20], [("abc", "abcabc")]
    assert baselines.ngram_bits_per_byte(train, test, order=3) < baselines.ngram_bits_per_byte(train, test, order=1) / 5
    assert baselines.ngram_bits_per_byte(train, [("", "ÿ")], order=3) < 16
