"""Figures are what Prometheus reads, by the profiler's names, and count what happened."""

import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from slmdeploy.metrics import LATENCIES
from slmdeploy.runtime.opening import load
from slmdeploy.runtime.requests import EngineStats
from slmdeploy.serving.app import create_app
from slmdeploy.serving.metrics import OF_DECODER, OF_ENCODER, PREFIX, EngineCollector, Figures, Stopwatch
from tests.serving.live import client, running, wait_for


def samples(url: str) -> dict[str, float]:
    with client(url) as asking:
        answer = asking.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.text))
    return {s.name: s.value for family in families for s in family.samples if not s.labels}


def at_rest(url: str) -> dict[str, float]:
    """Samples once the engine has told of its last step, which it does when that step's events have left."""
    assert wait_for(lambda: samples(url)[PREFIX + "running"] == 0)
    return samples(url)


def test_every_latency_is_one_of_the_profilers() -> None:
    assert {*OF_DECODER, *OF_ENCODER} <= set(LATENCIES)


def test_a_generation_and_a_score_are_counted(url: str) -> None:
    before = at_rest(url)
    with client(url) as asking:
        asking.post("/v1/completions", json={"model": "tiny", "prompt": "counted", "max_tokens": 5, "ignore_eos": True})
        asking.post("/score", json={"prefix": "counted", "items": ["a", "b"]})
    after = at_rest(url)

    def more(name: str) -> float:
        return after[PREFIX + name] - before.get(PREFIX + name, 0)

    assert more("generated_tokens_total") == 5
    assert more("scored_items_total") == 2
    assert [more(f"{name}_count") for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms", "score_ms")] == [1, 4, 1, 1, 1]
    assert more("batch_size_count") == 4  # the first token comes of the prompt
    assert (after[PREFIX + "ready"], after[PREFIX + "engine_healthy"]) == (1, 1)
    assert 0 < more("ttft_ms_sum") <= more("e2e_ms_sum")
    assert more("queue_ms_count") == 2, "the generation and the score both waited for the engine"
    assert 0 < more("queue_ms_sum") <= more("ttft_ms_sum") + more("score_ms_sum")


def test_a_draft_is_counted_and_changes_no_answer(url: str, decoder: Path) -> None:
    body = {
        "model": "tiny",
        "prompt": "ab ab ab ab",
        "max_tokens": 60,
        "ignore_eos": True,
        "temperature": 0.3,
        "seed": 1,
    }
    with running(create_app(load(decoder, prompt_lookup=True))) as drafted:
        found = []
        for address in (url, drafted):
            with client(address) as asking:
                found.append(asking.post("/v1/completions", json=body).json()["choices"])
        guesses = PREFIX + "drafted_tokens_total"
        assert wait_for(lambda: samples(drafted)[guesses] > 0)
        assert samples(drafted)[PREFIX + "accepted_tokens_total"] <= samples(drafted)[guesses]
    assert found[0] == found[1]
    assert samples(url)[guesses] == 0


def test_the_engines_figures_are_read_when_asked() -> None:
    stats = EngineStats(
        queued=3, batch_sizes={2: 5, 1: 1}, cache_hit_tokens=7, kv_tokens_used=9, drafted_tokens=8, accepted_tokens=6
    )
    found = {
        s.name + str(s.labels.get("le", "")): s.value
        for m in EngineCollector(lambda: stats).collect()
        for s in m.samples
    }
    assert found["slmdeploy_queued"] == 3
    assert found["slmdeploy_kv_tokens_used"] == 9
    assert found["slmdeploy_prefix_cache_hit_tokens_total"] == 7
    assert (found["slmdeploy_drafted_tokens_total"], found["slmdeploy_accepted_tokens_total"]) == (8, 6)
    assert [found[f"slmdeploy_batch_size_bucket{le}"] for le in ("1.0", "2.0", "+Inf")] == [1, 6, 6]
    assert found["slmdeploy_batch_size_sum"] == 11


def test_a_choice_without_tokens_has_no_latency_and_one_token_no_rhythm() -> None:
    figures = Figures(OF_DECODER)
    Stopwatch(figures, time.monotonic()).done()
    count = figures.registry.get_sample_value
    assert count("slmdeploy_e2e_ms_count") == 0
    watch = Stopwatch(figures, time.monotonic() - 1)
    watch.token()
    watch.done()
    assert (count("slmdeploy_ttft_ms_count"), count("slmdeploy_tpot_ms_count")) == (1, 0)
    assert count("slmdeploy_ttft_ms_sum") == pytest.approx(1000, rel=0.5)
    assert count("slmdeploy_e2e_ms_sum") == count("slmdeploy_ttft_ms_sum")
