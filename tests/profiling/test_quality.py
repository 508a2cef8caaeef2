"""Quality metrics against brute force and known models; bad data is refused with file and line."""

import dataclasses
import json
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from slmdeploy.errors import InputError, SpecError
from slmdeploy.profiling.quality import Candidate, auc, divergence, encode, evaluate, reciprocal_rank
from slmdeploy.profiling.quality_cache import Cache
from slmdeploy.profiling.statistics import interval
from slmdeploy.profiling.worker import FakeSession, answer

# No deadline: a busy machine is no failure.
PROPERTY = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
WORDS = ["<s>", "a", "b", "c", "d", "e", "f", "g"]


class Local:
    def __init__(self, session):
        self.session = session

    def ask(self, op, **fields):
        return answer(self.session, {"op": op, **fields}, self.session.clock)


class Sharp(FakeSession):
    """Gives the token after the last one in the vocabulary the logit ``peak``, all others 0."""

    def __init__(self, peak):
        super().__init__(vocab_size=len(WORDS))
        self.peak, self.calls = peak, 0

    def score_ids(self, prefix_ids, item_ids):
        self.calls += 1
        return super().score_ids(prefix_ids, item_ids)

    def logits(self, input_ids):
        self.calls += 1
        rows = super().logits(input_ids)
        rows[np.arange(len(input_ids)), (np.array(input_ids) + 1) % len(WORDS)] = self.peak
        return rows


@pytest.fixture
def tokenizer(tmp_path):
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<s>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    return path


def write(folder, name, records):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def candidate(tokenizer, session=None, max_length=32, tasks=("generate", "score")):
    return Candidate(Local(session or FakeSession(vocab_size=len(WORDS))), tokenizer, max_length, tasks)


def run(candidates, data, baseline=None, tokens=1000, cache=None):
    return evaluate(candidates, data, baseline=baseline, tokens=tokens, seed=0, cache=cache or Cache(None))


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12))
def test_auc_and_mrr_against_brute_force(pairs):
    scores, labels = np.array([score for score, _ in pairs]), np.array([label for _, label in pairs])
    positive, negative = scores[labels], scores[~labels]
    if not len(positive) or not len(negative):
        assert np.isnan(auc(scores, labels))
        return
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in product(positive, negative)]
    assert auc(scores, labels) == pytest.approx(np.mean(wins))
    order = sorted(range(len(pairs)), key=lambda index: (-scores[index], labels[index]))
    rank = 1 + next(place for place, index in enumerate(order) if labels[index])
    assert reciprocal_rank(scores, labels, cutoff=3) == (1 / rank if rank <= 3 else 0)


def test_divergence_of_known_distributions():
    p, q = (
        np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32)),
        np.log(np.full((2, 3), 1 / 3, np.float32)),
    )
    kl, same, positions = divergence(p, q)
    assert kl == pytest.approx(float((np.exp(p) * (p - q)).sum()))
    assert (same, positions) == (1, 2)
    assert divergence(p, p) == (0.0, 2, 2)


def test_encode_puts_special_tokens_on_the_head_only(tokenizer):
    assert encode(Tokenizer.from_file(str(tokenizer)), "a b", ["c", "d e"]) == ([0, 1, 2], [[3], [4, 5]])


def test_bits_per_byte_of_a_uniform_model(tokenizer, tmp_path):
    data = write(tmp_path / "data", "generate.test.jsonl", [{"prompt": "a", "completion": "b c d"}])
    quality = run({"m": candidate(tokenizer)}, data)["m"]
    assert quality.metrics == {
        "bits_per_byte": pytest.approx(3 * 3 / 5),  # 3 tokens of log2(8) bits over 5 bytes
        "perplexity": pytest.approx(8),
        "exact_match": 0.0,
    }
    assert quality.counts == {"generate_records": 1, "generate_bytes": 5}


def test_closeness_to_the_baseline_and_the_bits_that_a_better_model_saves(tokenizer, tmp_path):
    data = write(tmp_path / "data", "generate.test.jsonl", [{"prompt": "a", "completion": "b c d"}] * 3)
    models = {name: candidate(tokenizer, Sharp(peak)) for name, peak in (("near", 4.0), ("far", 0.0), ("base", 4.1))}
    found = run(models, data, baseline="base")
    assert "kl_to_baseline" not in found["base"].metrics
    assert 0 < found["near"].metrics["kl_to_baseline"] < 0.01 < found["far"].metrics["kl_to_baseline"]
    assert found["near"].metrics["top1_agreement"] == 1.0
    expected = -np.log2(np.exp(4.0) / (np.exp(4.0) + 7)) * 3 / 5
    assert found["near"].metrics["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_another_tokenizer_has_no_closeness(tokenizer, tmp_path):
    data = write(tmp_path / "data", "generate.test.jsonl", [{"prompt": "a", "completion": "b c d"}])
    other = tmp_path / "other.json"
    other.write_bytes(tokenizer.read_bytes())
    found = run({"base": candidate(tokenizer), "m": candidate(other)}, data, baseline="base")
    assert set(found["m"].metrics) == {"bits_per_byte", "perplexity", "exact_match"}


def test_closeness_to_the_fp32_build_of_the_same_graph(tokenizer, tmp_path):
    data = write(tmp_path / "data", "generate.test.jsonl", [{"prompt": "a", "completion": "b c d"}] * 3)
    models = {
        "int8": dataclasses.replace(candidate(tokenizer, Sharp(4.0)), fp32="fp32"),
        "fp32": candidate(tokenizer, Sharp(4.1)),
        "base": candidate(tokenizer, Sharp(1.0)),
    }
    found = run(models, data, baseline="base")
    assert 0 < found["int8"].metrics["kl_to_fp32"] < found["int8"].metrics["kl_to_baseline"]
    assert found["int8"].metrics["top1_to_fp32"] == 1.0
    assert "kl_to_fp32" not in found["fp32"].metrics
    assert "kl_to_baseline" in found["fp32"].metrics


def test_what_was_asked_before_is_not_asked_again_unless_a_part_of_it_changed(tokenizer, tmp_path):
    write(tmp_path / "data", "score.test.jsonl", [{"prefix": "a", "items": ["b", "c"], "labels": [0, 1]}])
    data = write(tmp_path / "data", "generate.test.jsonl", [{"prompt": "a", "completion": "b c d"}])
    cache = Cache(tmp_path / "cache")

    def asked(keys):
        sessions = {name: Sharp(4.0) for name in keys}
        models = {
            name: dataclasses.replace(candidate(tokenizer, sessions[name]), key=key) for name, key in keys.items()
        }
        found = run(models, data, baseline="base", cache=cache)
        return found, {name for name, session in sessions.items() if session.calls}

    first, who = asked({"m": "1", "base": "2"})
    assert who == {"m", "base"}
    again, who = asked({"m": "1", "base": "2"})
    assert who == set()
    assert again["m"].metrics == first["m"].metrics
    assert again["m"].counts == first["m"].counts
    _, who = asked({"m": "1", "n": "3", "base": "2"})
    assert who == {"n", "base"}  # the new one is compared with the baseline, which has to answer again
    _, who = asked({"m": "1", "base": "4"})
    assert who == {"m", "base"}
    _, who = asked({"m": None, "base": "4"})
    assert who == {"m", "base"}


def test_a_damaged_cache_is_no_cache(tokenizer, tmp_path):
    data = write(tmp_path / "data", "generate.test.jsonl", [{"prompt": "a", "completion": "b c d"}])
    model = dataclasses.replace(candidate(tokenizer, Sharp(4.0)), key="1")
    cache = Cache(tmp_path / "cache")
    first = run({"m": model}, data, cache=cache)["m"].metrics
    for file in (tmp_path / "cache").iterdir():
        file.write_text('{"metrics": 3}')
    assert run({"m": model}, data, cache=cache)["m"].metrics == first


def test_ranking_scores_and_intervals(tokenizer, tmp_path):
    right = {"prefix": "a", "items": ["b", "c d", "g"], "labels": [0, 0, 1]}  # the fake scores by the last token
    wrong = {"prefix": "b", "items": ["g", "c"], "labels": [0, 1]}
    data = write(tmp_path / "data", "score.test.jsonl", [right, wrong] * 4)
    quality = run({"m": candidate(tokenizer)}, data)["m"]
    scores, labels = np.tile([2, 4, 7, 7, 3], 4), np.tile([0, 0, 1, 0, 1], 4)
    assert quality.metrics["auc"] == pytest.approx(auc(scores, labels))
    assert quality.metrics["auc_per_query"] == pytest.approx(0.5)
    assert quality.metrics["mrr_at_10"] == pytest.approx(0.75)
    assert quality.metrics["ndcg_at_10"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert quality.metrics["accuracy"] == pytest.approx(0.4)  # every score is above 0, and 2 of 5 labels are 1
    for name, drawn in quality.drawn.items():
        low, high = interval(drawn)
        assert low <= quality.metrics[name] <= high
    assert quality.counts == {"score_queries": 8, "score_items": 20}


def test_only_the_tasks_that_a_candidate_has(tokenizer, tmp_path):
    write(tmp_path / "data", "generate.test.jsonl", [{"prompt": "a", "completion": "b"}])
    data = write(tmp_path / "data", "score.test.jsonl", [{"prefix": "a", "items": ["b", "c"], "labels": [0, 1]}])
    found = run({"g": candidate(tokenizer, tasks=("generate",)), "both": candidate(tokenizer)}, data)
    assert set(found["g"].metrics) == {"bits_per_byte", "perplexity", "exact_match"}
    assert {"bits_per_byte", "auc"} <= set(found["both"].metrics)


def test_subset_is_the_same_for_all_and_grows_with_the_budget(tokenizer, tmp_path):
    records = [{"prompt": "a " * length, "completion": "b"} for length in range(1, 20)]
    data = write(tmp_path / "data", "generate.test.jsonl", records)
    small, large = candidate(tokenizer, max_length=12), candidate(tokenizer)
    found = run({"small": small, "large": large}, data, tokens=20)
    assert found["small"].counts == found["large"].counts
    more = run({"small": small, "large": large}, data, tokens=10_000)["small"].counts
    assert more["generate_records"] == 10  # BOS, at most 10 words and the completion fit 12 tokens


@pytest.mark.parametrize(
    ("file", "records", "message"),
    [
        ("other.jsonl", [], "neither generate.test.jsonl nor score.test.jsonl"),
        ("generate.test.jsonl", [], "no record that fits"),
        ("generate.test.jsonl", [{"prompt": "a " * 99, "completion": "b"}], "no record that fits"),
        ("generate.test.jsonl", [{"prompt": "a"}], r"jsonl:1: 'completion' must be there and be a str"),
        ("generate.test.jsonl", ["text"], r"jsonl:1: 'prompt' must be there"),
        ("score.test.jsonl", [{"prefix": "a", "items": ["b"], "labels": [2]}], "labels must be one 0 or 1"),
        ("score.test.jsonl", [{"prefix": "a", "items": ["b", "c"], "labels": [1]}], "each of the 2 items"),
        ("score.test.jsonl", [{"prefix": "a", "items": ["b"], "labels": [1]}], "one label only"),
    ],
)
def test_bad_data_is_refused(tokenizer, tmp_path, file, records, message):
    data = write(tmp_path / "data", file, records)
    with pytest.raises(InputError, match=message):
        run({"m": candidate(tokenizer)}, data)


def test_a_broken_line_is_named(tokenizer, tmp_path):
    data = write(tmp_path / "data", "score.test.jsonl", [])
    (data / "score.test.jsonl").write_text('{"prefix": \n')
    with pytest.raises(SpecError, match=r"score\.test\.jsonl:1: not a line of JSON"):
        run({"m": candidate(tokenizer)}, data)
