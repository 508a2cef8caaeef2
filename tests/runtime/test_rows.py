"""Rows over any interface: an engine gets from a decoder of one sequence what it gets from a batch."""

from pathlib import Path

import numpy as np
import pytest

from slmdeploy.runtime.batch_generation import BatchOfOne
from slmdeploy.runtime.batching import BatchDecoder
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.decoding import Decoder
from slmdeploy.runtime.engine import Engine
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.requests import EngineSettings, ScoreEvent, ScoreRequest
from slmdeploy.runtime.rows import BatchRows, Rows, WholePrompts
from slmdeploy.runtime.segments import Segment, segment_tree
from tests.runtime.receivers import PATIENCE_S, PROMPTS, generation, submit
from tests.runtime.test_standard import write_standard_graph

PROMPT = np.array(PROMPTS[2])


@pytest.fixture(params=["batch", "whole prompts", "one sequence"])
def rows(request: pytest.FixtureRequest, tiny: Path) -> Rows:
    config = read_runtime(tiny)
    decoder = Decoder(tiny, config, threads=1)
    if request.param == "one sequence":
        return WholePrompts(BatchOfOne(decoder))
    batch = BatchDecoder(decoder, 3)
    return WholePrompts(batch) if request.param == "whole prompts" else BatchRows(batch, segment_tree(1 << 20, config))


def test_a_prompt_in_pieces_and_steps_behind_it(rows: Rows, model: Model) -> None:
    for _ in range(2):
        found = rows.begin(PROMPT, 14)
        assert found < PROMPT.size
        if found < 4:
            assert rows.extend(PROMPT[found:4], last=False) is None
        behind = rows.extend(PROMPT[max(found, 4) :], last=True)
        assert behind is not None
        assert np.abs(behind - model.prefill(PROMPT.tolist())).max() < 1e-5
        rows.join()
        rows.keep(0, PROMPT.tolist())
        assert np.abs(rows.step(np.array([9]))[0] - model.decode(9)).max() < 1e-5
        rows.keep(0, [*PROMPT.tolist(), 9, 10])
        rows.release(0)
    rows.begin(PROMPT[:3], 4)
    rows.abandon()
    rows.shrink(0)


@pytest.mark.parametrize("rows", ["batch", "whole prompts"], indirect=True)
def test_a_fork_goes_its_own_way(rows: Rows, model: Model) -> None:
    rows.begin(PROMPT, 14)
    rows.extend(PROMPT, last=True)
    rows.join()
    rows.fork()
    logits = rows.step(np.array([5, 6]))
    for row, token in enumerate((5, 6)):
        assert np.abs(logits[row] - model.logits([*PROMPT.tolist(), token])[-1]).max() < 1e-5
    rows.keep(1, [*PROMPT.tolist(), 6])
    rows.release(0)
    assert np.abs(rows.step(np.array([7]))[0] - model.logits([*PROMPT.tolist(), 6, 7])[-1]).max() < 1e-5
    rows.release(0)


def test_what_rows_hold_of_the_tree_is_let_go(tiny: Path, model: Model) -> None:
    tree = segment_tree(1 << 20, model.runtime)
    rows = BatchRows(BatchDecoder(Decoder(tiny, model.runtime, threads=1), 2), tree)
    for prompt in (PROMPT, PROMPT[:5]):
        found = rows.begin(prompt, 20)
        rows.extend(prompt[found:], last=True)
        rows.join()
        rows.keep(0 if prompt is PROMPT else 1, prompt.tolist())
    assert max(node.holds for node in tree.nodes()) == 2
    rows.release(0)
    rows.release(0)
    assert {node.holds for node in tree.nodes()} == {0}
    assert rows.begin(PROMPT, 20) == PROMPT.size - 1


def test_an_engine_over_a_graph_of_one_sequence(tmp_path: Path, model: Model) -> None:
    folder = write_standard_graph(tmp_path / "standard")
    engine = Engine(load(folder), EngineSettings(slots=8, prefill_tokens_per_step=4))
    with engine:
        receivers = submit(engine, *(generation(p, max_new_tokens=5, ignore_eos=True, n=2) for p in PROMPTS))
        for prompt, receiver in zip(PROMPTS, receivers, strict=True):
            receiver.last()
            alone = list(model.generate_ids(prompt, max_new_tokens=5, ignore_eos=True))
            assert receiver.tokens(0) == receiver.tokens(1) == alone
        assert engine.drain(PATIENCE_S)
        assert engine.stats().batch_sizes.keys() == {1}


def test_an_engine_over_the_same_graph_scores_too(tiny: Path, model: Model) -> None:
    with Engine(load(tiny)) as engine:
        (receiver,) = submit(engine, ScoreRequest(PROMPTS[0], ((4, 5), (6,))))
        event = receiver.last()
    assert isinstance(event, ScoreEvent)
    assert np.abs(event.logits - model.score_ids(PROMPTS[0], [[4, 5], [6]])).max() < 1e-4


def test_without_memory_for_the_cache_sequences_run_all_the_same(
    tiny: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = segment_tree(1 << 20, model.runtime)
    batch = BatchDecoder(Decoder(tiny, model.runtime, threads=1), 2)
    rows = BatchRows(batch, tree)
    rows.begin(PROMPT, 20)
    rows.extend(PROMPT, last=True)
    rows.join()

    def out_of_memory(row: int, start: int, stop: int) -> Segment:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(batch, "read", out_of_memory)
        rows.keep(0, PROMPT.tolist())
    assert tree.size == 0
    assert np.abs(rows.step(np.array([7]))[0] - model.logits([*PROMPT.tolist(), 7])[-1]).max() < 1e-5
    rows.keep(0, PROMPT.tolist())
    assert tree.size == PROMPT.size
    rows.release(0)
