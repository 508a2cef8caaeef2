"""What lies between a body and an answer, on an engine that does as the test tells it: ends, failures, hanging up."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.runtime.errors import CorruptArtifactError, EngineStoppedError, QueueFullError
from slmdeploy.runtime.model import load
from slmdeploy.runtime.requests import Failed
from slmdeploy.serving.app import create_app
from slmdeploy.serving.settings import ServerSettings
from tests.graphs import write_manifest, write_tiny_graph
from tests.serving.live import ScriptedEngine, client, running, wait_for

BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 8}


@contextmanager
def scripted(decoder: Path, **settings: Any) -> Iterator[tuple[ScriptedEngine, Any]]:
    engine = ScriptedEngine()
    app = create_app(load(decoder), ServerSettings(**settings), engine=engine)
    with running(app) as url, client(url) as asking:
        yield engine, asking


@pytest.fixture(scope="module")
def shared(decoder: Path) -> Iterator[tuple[ScriptedEngine, Any]]:
    with scripted(decoder) as pair:
        yield pair


def test_text_that_was_held_back_comes_with_the_end(shared: tuple[ScriptedEngine, Any]) -> None:
    engine, asking = shared
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asking.post, "/v1/completions", json=BODY)
        number = engine.one()
        engine.say(number, "ab", "c")
        engine.finish(number, rest="d")
    assert answer.result().json()["choices"][0]["text"] == "abcd"
    assert answer.result().json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_a_full_queue_is_429_with_a_time_to_come_again(decoder: Path) -> None:
    with scripted(decoder) as (engine, asking):
        engine.refusal = QueueFullError("4 requests are waiting already: try again later.")
        for stream in (False, True):
            answer = asking.post("/v1/completions", json=BODY | {"stream": stream})
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) > 0
        engine.refusal = EngineStoppedError("The engine was closed.")
        assert asking.post("/v1/completions", json=BODY).status_code == 503


def test_of_several_prompts_none_runs_where_one_is_refused(decoder: Path) -> None:
    with scripted(decoder) as (engine, asking):
        submit = engine.submit

        def once(request: Any, on_event: Any) -> Any:
            ticket = submit(request, on_event)
            engine.refusal = QueueFullError("full.")
            return ticket

        engine.submit = once  # type: ignore[method-assign]
        assert asking.post("/v1/completions", json=BODY | {"prompt": ["a", "b"]}).status_code == 429
        assert engine.cancelled == [1]


def test_a_deadline_is_504_and_in_a_stream_an_error(shared: tuple[ScriptedEngine, Any]) -> None:
    engine, asking = shared
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asking.post, "/v1/completions", json=BODY)
        engine.finish(engine.one(), "deadline")
        assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (504, "deadline_exceeded")
        answer = pool.submit(asking.post, "/v1/completions", json=BODY | {"stream": True})
        number = engine.one()
        engine.say(number, "a")
        engine.finish(number, "deadline")
    events = [json.loads(line[6:]) for line in answer.result().text.split("\n\n") if line]
    assert events[0]["choices"][0]["text"] == "a"
    assert events[-1]["error"]["code"] == "deadline_exceeded"


def test_the_deadline_counts_from_the_arrival_also_while_the_body_is_on_its_way(
    shared: tuple[ScriptedEngine, Any],
) -> None:
    engine, asking = shared
    body = json.dumps(BODY).encode()
    arrived: list[float] = []

    def slowly() -> Iterator[bytes]:
        yield body[:5]
        assert wait_for(lambda: "slmdeploy_http_in_flight 2.0" in asking.get("/metrics").text)
        arrived.append(time.monotonic())
        yield body[5:]

    with ThreadPoolExecutor(1) as pool, client(str(asking.base_url)) as other:
        answer = pool.submit(
            other.post, "/v1/completions", content=slowly(), headers={"Content-Type": "application/json"}
        )
        number = engine.one()
        deadline = engine.running[number].request.deadline
        engine.finish(number)
        assert answer.result().status_code == 200
    assert deadline is not None
    assert deadline <= arrived[0] + ServerSettings().deadline_s


def test_a_damaged_model_is_the_servers_fault_and_tells_nothing(
    shared: tuple[ScriptedEngine, Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine, asking = shared
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asking.post, "/v1/completions", json=BODY)
        run = engine.running.pop(engine.one())
        run.on_event(Failed(CorruptArtifactError("/secret/path computes NaN.")))
    assert answer.result().status_code == 500
    assert "/secret" not in answer.result().text
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_cancels(shared: tuple[ScriptedEngine, Any], stream: bool) -> None:
    engine, asking = shared
    before = len(engine.cancelled)
    body = json.dumps(BODY | {"stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", asking.base_url.port)) as leaving:
        leaving.sendall(head.encode() + b"\r\n\r\n" + body)
        number = engine.one()
        engine.say(number, "a")
    assert wait_for(lambda: len(engine.cancelled) > before)
    assert engine.cancelled[-1] == number


def test_hanging_up_frees_the_slot_of_the_real_engine(url: str) -> None:
    body = BODY | {"max_tokens": 400, "ignore_eos": True, "stream": True}

    def figure(name: str) -> float:
        with client(url) as asking:
            lines = asking.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"slmdeploy_{name} "))

    with client(url) as asking:
        with asking.stream("POST", "/v1/completions", json=body) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
        assert wait_for(lambda: figure("running") == 0)
        made = figure("generated_tokens_total")
        assert asking.post("/v1/completions", json=BODY).status_code == 200
        assert figure("generated_tokens_total") <= made + 8


def test_tools_that_a_template_does_not_read_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_graph(tmp_path / "plain", max_length=128)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    write_manifest(folder)
    body = {"model": "plain", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    tool = {"type": "function", "function": {"name": "look"}}
    with running(create_app(load(folder), ServerSettings(max_prompt_tokens=20))) as url, client(url) as asking:
        answer = asking.post("/v1/chat/completions", json=body | {"tools": [tool]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        assert asking.post("/v1/chat/completions", json=body).status_code == 200
        long = body | {"messages": [{"role": "user", "content": "x" * 30}]}
        assert asking.post("/v1/chat/completions", json=long).json()["error"]["code"] == "context_length_exceeded"


def test_a_bug_is_a_500_with_the_requests_id_and_nothing_else(decoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with scripted(decoder) as (engine, asking):
        engine.refusal = RuntimeError("inner secret")
        answer = asking.post("/v1/completions", json=BODY, headers={"X-Request-ID": "bug-1"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "bug")
        assert "bug-1" in answer.text
        assert "inner secret" not in answer.text
        assert 'slmdeploy_requests_total{path="/v1/completions",status="500"} 1.0' in asking.get("/metrics").text
    assert "inner secret" in caplog.text
