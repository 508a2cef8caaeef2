"""Rows over pages: an engine over an OpenVINO decoder, float32 throughout; pages are shared and none is lost."""

import json
from pathlib import Path

import numpy as np
import openvino
import pytest

from slmdeploy.building.openvino_graph import stateful_decoder
from slmdeploy.runtime.engine import Engine
from slmdeploy.runtime.errors import InputError
from slmdeploy.runtime.model import Model, load
from slmdeploy.runtime.openvino_session import GRAPH
from slmdeploy.runtime.paged_rows import PagedRows
from slmdeploy.runtime.requests import EngineSettings, ScoreEvent, ScoreRequest
from slmdeploy.runtime.segments import token_bytes
from tests.graphs import write_manifest, write_tiny_graph
from tests.runtime.receivers import PATIENCE_S, generation, submit

PAGES = 3
LONG = tuple(np.random.default_rng(1).integers(2, 200, 150).tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder as a build of the engine openvino would hold it, nothing quantised."""
    folder = write_tiny_graph(tmp_path_factory.mktemp("paged") / "build", kv_heads=(2, 4), max_length=256)
    openvino.save_model(stateful_decoder(folder / "model.onnx"), folder / GRAPH, compress_to_fp16=False)
    changes = {"interface": "stateful", "openvino": {"inference_precision": "f32"}}
    runtime = json.loads((folder / "runtime.json").read_text())
    (folder / "runtime.json").write_text(json.dumps(runtime | changes))
    write_manifest(folder)
    return folder


@pytest.fixture
def paged(folder: Path) -> Model:
    return load(folder, threads=1)


@pytest.fixture
def rows(paged: Model) -> PagedRows:
    """Two rows, and room for so many pages in the cache."""
    assert paged.pages is not None
    return PagedRows(paged.pages, 2, PAGES * paged.pages.pool.page * token_bytes(paged.runtime))


def run(rows: PagedRows, prompt: tuple[int, ...], piece: int = 20) -> tuple[int, np.ndarray]:
    """Compute a prompt in pieces in the next row; the tokens that were found, and the logits behind it."""
    ids = np.array(prompt)
    found = rows.begin(ids, ids.size + 5)
    for start in range(found, ids.size, piece):
        logits = rows.extend(ids[start : start + piece], last=start + piece >= ids.size)
    rows.join()
    assert logits is not None
    return found, logits


def test_prompts_in_pieces_find_the_pages_of_others(rows: PagedRows, paged: Model) -> None:
    page = rows.page
    prompt = LONG[: 2 * page + 5]
    expected = paged.logits(prompt)[-1]
    for found_before in (0, 2 * page):
        found, logits = run(rows, prompt)
        assert found == found_before
        assert np.abs(logits - expected).max() < 1e-4
        rows.keep(0, prompt)
        rows.release(0)
    other = (*prompt[: page + 3], 7, 8, 9, *prompt)
    found, logits = run(rows, other)
    assert found == page
    assert np.abs(logits - paged.logits(other)[-1]).max() < 1e-4


def test_a_whole_page_is_not_found_where_no_token_would_be_left_to_compute(rows: PagedRows) -> None:
    prompt = LONG[: rows.page]
    run(rows, prompt)
    rows.keep(0, prompt)
    assert run(rows, prompt)[0] == 0


def test_forks_share_pages_and_go_their_own_ways(rows: PagedRows, paged: Model) -> None:
    prompt = LONG[: rows.page + 3]
    run(rows, prompt)
    rows.fork()
    logits = rows.step(np.array([5, 6])).copy()
    for row, token in enumerate((5, 6)):
        assert np.abs(logits[row] - paged.logits([*prompt, token])[-1]).max() < 1e-4
    rows.release(0)
    logits = rows.step(np.array([7])).copy()
    assert np.abs(logits[0] - paged.logits([*prompt, 6, 7])[-1]).max() < 1e-4


def test_pages_come_back_when_the_cache_gives_them_up(rows: PagedRows, paged: Model) -> None:
    assert paged.pages is not None
    pool = paged.pages.pool
    for seed in range(4):
        prompt = tuple(np.random.default_rng(seed).integers(2, 200, 2 * rows.page + 1).tolist())
        run(rows, prompt)
        rows.keep(0, prompt)
        rows.release(0)
        assert rows.tree.size <= PAGES
        assert pool.held == rows.tree.size
    rows.begin(np.array(LONG), 200)
    rows.extend(np.array(LONG), last=False)
    rows.abandon()
    rows.shrink(0)
    assert pool.held == rows.tree.size
    with pytest.raises(InputError, match="257 tokens are needed"):
        rows.begin(np.array(LONG), 257)


def test_an_engine_over_pages(folder: Path, paged: Model) -> None:
    prompts = [LONG[:40], LONG[:100], (5,), LONG[20:60]]
    alone = [list(paged.generate_ids(prompt, max_new_tokens=6, ignore_eos=True)) for prompt in prompts]
    scores = paged.score_ids(LONG[:40], [[4, 5], [6]])
    with Engine(load(folder, threads=1), EngineSettings(slots=3, prefill_tokens_per_step=16)) as engine:
        for _ in range(2):
            requests = [generation(prompt, max_new_tokens=6, ignore_eos=True, n=2) for prompt in prompts]
            *generated, scored = submit(engine, *requests, ScoreRequest(LONG[:40], ((4, 5), (6,))))
            for receiver, tokens in zip(generated, alone, strict=True):
                usage = receiver.usage()
                assert receiver.tokens(0) == receiver.tokens(1) == tokens
            event = scored.last()
            assert isinstance(event, ScoreEvent)
            assert np.abs(event.logits - scores).max() < 1e-4
        assert usage.cached_tokens > 0
        assert engine.drain(PATIENCE_S)
        stats = engine.stats()
    assert 0 < stats.cache_tokens_used <= stats.cache_tokens_capacity
    assert stats.kv_tokens_used == 0
