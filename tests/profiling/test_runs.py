"""The runs that a request makes are those that the runtime makes of it."""

from dataclasses import replace

import numpy as np
import pytest

from slmdeploy.errors import InputError
from slmdeploy.profiling.facts import BuildFacts
from slmdeploy.profiling.graph_facts import GraphFacts
from slmdeploy.profiling.runs import Run, request_of
from slmdeploy.runtime import scoring
from slmdeploy.runtime.model import load
from slmdeploy.specs.workloads import named_workload
from tests.graphs import write_tiny_graph

GRAPH = GraphFacts((), 10)
DECODER = BuildFacts(
    name="d",
    content_key=None,
    tasks=("generate", "score"),
    graphs={"steps": GRAPH, "prompts": GRAPH, "score": GRAPH},
    widths=(64,),
    kv_widths=(32,),
    vocab_size=100,
    max_length=4096,
    chunk=128,
)
ENCODER = replace(DECODER, graphs={"encode": GRAPH}, kv_widths=(), chunk=0, max_length=512)


def runs(name, facts=DECODER, threads=2):
    request = request_of(named_workload(name), facts, threads)
    return request.first, request.later


def test_a_prompt_runs_in_chunks_whose_last_gives_logits():
    first, _ = runs("generate-300-1")
    assert first == (
        Run("prompts", 128, 0, 128 * 128, 128),
        Run("prompts", 128, 0, 128 * 256, 256),
        Run("prompts", 44, 1, 44 * 300, 300),
    )
    whole, later = runs("generate-300-1", replace(DECODER, chunk=0))
    assert whole == (Run("prompts", 300, 1, 300 * 300, 300),)
    assert later == ()


def test_steps_are_as_many_as_tokens_behind_the_first():
    _, later = runs("generate-100-41")
    assert sum(run.times for run in later) == pytest.approx(40)
    assert {run.tokens for run in later} == {1}
    assert 100 < min(run.keys for run in later) <= max(run.keys for run in later) <= 141


def test_steps_of_a_batch_run_together_and_its_prompts_one_by_one():
    first, later = runs("generate-8-9-offline-batch-4", replace(DECODER, step_rows=4))
    assert [run.tokens for run in first] == [8] * 4
    assert {(run.role, run.tokens, run.kept) for run in later} == {("prompts", 4, 4)}
    _, few = runs("generate-8-9-offline-batch-2", replace(DECODER, step_rows=4))
    assert {run.role for run in few} == {"steps"}


@pytest.mark.parametrize("name", ["score-20-3x4", "score-20-3x4-hot", "score-600-40x16", "score-600-40x16-hot"])
def test_scores_run_what_the_runtime_runs(tmp_path, monkeypatch, name):
    model = load(write_tiny_graph(tmp_path / "b", max_length=1024))
    seen = []
    lay_out = scoring.lay_out

    def watch(past, prefix, sizes, slots):
        seen.append((prefix + sum(sizes), len(sizes), lay_out(past, prefix, sizes, slots)["attention_bias"].size))
        return lay_out(past, prefix, sizes, slots)

    workload = named_workload(name)
    prefix = np.arange(workload.prefix_tokens) % 200 + 10
    items = [[5] * workload.item_tokens] * workload.items
    if workload.hot:
        model.score_ids(prefix.tolist(), items)
    monkeypatch.setattr(scoring, "lay_out", watch)
    model.score_ids(prefix.tolist(), items)
    first, _ = runs(name, replace(DECODER, max_length=1024))
    assert [(run.tokens, run.kept, run.pairs) for run in first] == seen


def test_lanes_share_the_items_behind_a_short_prefix():
    lanes = replace(DECODER, parallel_items=True)
    (run,) = runs("score-20-8x4", lanes)[0]
    assert (run.lanes, run.kept, run.tokens) == (2, 4, 20 + 16)
    assert {run.lanes for run in runs("score-200-8x4", lanes)[0]} == {1}
    assert {run.lanes for run in runs("score-20-1x4", lanes)[0]} == {1}


def test_texts_run_in_batches():
    first, _ = runs("embed-5x100", ENCODER)
    assert [(run.tokens, run.pairs) for run in first] == [(200, 20000), (200, 20000), (100, 10000)]
    assert runs("embed-600", ENCODER)[0][0].tokens == 512
    request = request_of(named_workload("classify-3x8"), ENCODER, 2)
    assert (request.counts, len(request.first)) == (3, 1)


def test_a_cross_encoder_scores_pairs():
    (run,) = runs("score-20-4x10", ENCODER)[0]
    assert (run.role, run.tokens) == ("encode", 4 * 30)


@pytest.mark.parametrize("name", ["generate-8-4-server-3", "score-8-2x4-concurrent-2"])
def test_requests_that_wait_are_refused(name):
    with pytest.raises(InputError, match="estimates are of single-stream and offline"):
        runs(name)
