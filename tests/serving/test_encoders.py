"""Requests to an encoder share its batches, keep their own errors, and never wait for ever."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmdeploy.errors import CorruptArtifactError
from slmdeploy.runtime.encoder_model import EncoderModel, load_encoder
from slmdeploy.runtime.encoding import Row
from slmdeploy.runtime.errors import DeadlineError, EngineStoppedError, QueueFullError
from slmdeploy.serving.encoders import MicroBatcher
from slmdeploy.serving.metrics import OF_ENCODER, Figures
from tests.runtime.encoder_graphs import write_encoder_graph
from tests.serving.live import PATIENCE_S, client, wait_for

ROW = Row((1, 4, 2), (0, 0, 0))
BAD = Row((1, 7, 2), (0, 0, 0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EncoderModel:
    return load_encoder(write_encoder_graph(tmp_path_factory.mktemp("encoders") / "embed"))


class Held:
    """An encoder that waits until it may go, and notes how many rows it was given."""

    def __init__(self, model: EncoderModel) -> None:
        self._encoder, self.go = model.encoder, threading.Event()
        self.calls: list[int] = []

    def rows(self, rows: list[Row], name: str) -> Any:
        self.calls.append(len(rows))
        assert self.go.wait(PATIENCE_S)
        if BAD in rows:
            raise CorruptArtifactError("This row computes NaN.")
        return self._encoder.rows(rows, name)


class HeldModel:
    def __init__(self, model: EncoderModel) -> None:
        self.encoder = Held(model)


@pytest.fixture
def held(model: EncoderModel) -> Iterator[tuple[Held, MicroBatcher]]:
    standing = HeldModel(model)
    batcher = MicroBatcher(standing, "sentence_embedding", 3, Figures(OF_ENCODER))  # type: ignore[arg-type]
    batcher.start()
    yield standing.encoder, batcher
    standing.encoder.go.set()
    batcher.close()


def ask(batcher: MicroBatcher, *rows: Row, deadline_s: float = PATIENCE_S) -> Any:
    return asyncio.run(batcher.run(list(rows), time.monotonic() + deadline_s))


def test_what_waits_meanwhile_runs_together_and_comes_back_apart(held: tuple[Held, MicroBatcher]) -> None:
    encoder, batcher = held
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, batcher, ROW)
        assert wait_for(lambda: encoder.calls == [1])
        others = [pool.submit(ask, batcher, ROW, ROW), pool.submit(ask, batcher, ROW)]
        assert wait_for(lambda: batcher.queued == 2)
        encoder.go.set()
        sizes = [len(each.result()) for each in (first, *others)]
    assert encoder.calls == [1, 3]
    assert sizes == [1, 2, 1]


def test_a_request_that_fails_fails_alone(held: tuple[Held, MicroBatcher]) -> None:
    encoder, batcher = held
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, batcher, ROW)
        assert wait_for(lambda: encoder.calls == [1])
        bad, good = pool.submit(ask, batcher, BAD), pool.submit(ask, batcher, ROW)
        assert wait_for(lambda: batcher.queued == 2)
        encoder.go.set()
        with pytest.raises(CorruptArtifactError, match="NaN"):
            bad.result()
        assert np.array_equal(good.result()[0], first.result()[0])
    assert encoder.calls == [1, 2, 1, 1]
    waited = batcher._figures.registry.get_sample_value("slmdeploy_queue_ms_count")
    assert waited == 3, "each has waited once"


def test_a_full_queue_a_passed_deadline_and_the_end_are_refusals(held: tuple[Held, MicroBatcher]) -> None:
    encoder, batcher = held
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, batcher, ROW)]
        assert wait_for(lambda: encoder.calls == [1])
        late = pool.submit(ask, batcher, ROW, deadline_s=0.0)
        assert wait_for(lambda: batcher.queued == 1)
        running += [pool.submit(ask, batcher, ROW) for _ in range(2)]
        assert wait_for(lambda: batcher.queued == 3)
        with pytest.raises(QueueFullError, match="3 requests"):
            ask(batcher, ROW)
        encoder.go.set()
        with pytest.raises(DeadlineError):
            late.result()
        assert all(len(each.result()) == 1 for each in running)
    batcher.close()
    with pytest.raises(EngineStoppedError):
        ask(batcher, ROW)


def test_limits_on_texts_are_told(encoder_urls: dict[str, str]) -> None:
    with client(encoder_urls["embed"]) as asking:
        many = asking.post("/v1/embeddings", json={"model": "embed", "input": ["a"] * 9})
        assert (many.status_code, many.json()["error"]["param"]) == (400, "input")
        long = {"model": "embed", "input": "a b c d a b c d"}
        refused = asking.post("/v1/embeddings", json=long)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        cut = asking.post("/v1/embeddings", json=long | {"truncate": True})
        assert cut.json()["usage"]["prompt_tokens"] == 8


def test_the_figures_of_an_encoder_are_there(encoder_urls: dict[str, str]) -> None:
    with client(encoder_urls["embed"]) as asking:
        asking.post("/v1/embeddings", json={"model": "embed", "input": "a"})
        text = asking.get("/metrics").text
    counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    assert counts["slmdeploy_encode_ms_count"] > 0
    assert counts["slmdeploy_queue_ms_count"] > 0
    assert counts["slmdeploy_queued"] == 0


def test_an_encoder_that_is_no_graph_leaves_the_server_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from slmdeploy.serving.app import create_app
    from tests.serving.live import running

    model = load_encoder(write_encoder_graph(tmp_path / "embed"))
    (tmp_path / "embed" / "model.onnx").write_bytes(b"nothing")
    app = create_app(model)
    with running(app, ready=False) as url, client(url) as asking:
        assert wait_for(lambda: app.state.lifecycle.state == "broken")
        assert asking.get("/health").status_code == 503
        assert asking.post("/v1/embeddings", json={"model": "embed", "input": "a"}).status_code == 503
    assert "the model cannot be opened" in caplog.text
