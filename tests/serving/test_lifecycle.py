"""States go one way, and a drain waits for what is in flight but not for ever."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slmdeploy.runtime.model import load
from slmdeploy.runtime.requests import EngineSettings
from slmdeploy.serving.app import create_app
from slmdeploy.serving.lifecycle import Lifecycle
from slmdeploy.serving.settings import ServerSettings
from tests.serving.live import ScriptedEngine, client, running, wait_for

BODY = {"model": "tiny", "prompt": "hello"}


def test_a_server_loads_is_ready_drains_and_may_break() -> None:
    cycle, well = Lifecycle(), threading.Event()
    well.set()
    assert cycle.state == "loading"
    cycle.loaded(well.is_set)
    assert cycle.state == "ready"
    assert asyncio.run(cycle.drain(1)) == 0
    assert cycle.state == "draining"
    cycle.loaded(well.is_set)
    assert cycle.state == "draining"
    well.clear()
    assert cycle.state == "broken"


def test_a_drain_ends_at_its_time_and_says_what_was_left() -> None:
    cycle = Lifecycle()
    cycle.count(2)
    assert asyncio.run(cycle.drain(0.05)) == 2


def test_until_the_model_is_open_there_is_503_and_the_page(decoder: Path) -> None:
    engine = ScriptedEngine()
    engine.opening.clear()
    with running(create_app(load(decoder), engine=engine), ready=False) as url, client(url) as asking:
        assert asking.get("/ready").status_code == 503
        assert asking.get("/health").json() == {"state": "loading"}
        early = asking.post("/v1/completions", json=BODY)
        assert (early.status_code, early.json()["error"]["code"]) == (503, "loading")
        assert early.headers["retry-after"]
        assert asking.get("/").status_code == 200
        engine.opening.set()
        assert wait_for(lambda: asking.get("/ready").status_code == 200)


def test_while_draining_the_old_end_and_the_new_are_refused(decoder: Path) -> None:
    engine = ScriptedEngine()
    app = create_app(load(decoder), engine=engine)
    with running(app) as url, client(url) as asking, ThreadPoolExecutor(2) as pool:
        answer = pool.submit(asking.post, "/v1/completions", json=BODY)
        number = engine.one()
        draining = pool.submit(asyncio.run, app.state.lifecycle.drain(20))
        assert wait_for(lambda: app.state.lifecycle.state == "draining")
        with client(url) as late:
            assert late.get("/ready").status_code == 503
            assert late.get("/health").status_code == 200
            assert late.post("/v1/completions", json=BODY).json()["error"]["code"] == "draining"
        assert not draining.done()
        engine.finish(number)
        assert answer.result().status_code == 200
        assert draining.result() == 0


def test_beyond_slots_queue_and_arrivals_there_is_429_but_not_for_probes(decoder: Path) -> None:
    settings = ServerSettings(engine=EngineSettings(slots=1, max_waiting=1))
    app = create_app(load(decoder), settings, engine=ScriptedEngine())
    with running(app) as url, client(url) as asking:
        app.state.lifecycle.count(settings.max_in_flight)
        full = asking.post("/v1/completions", json=BODY)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert asking.get("/ready").status_code == 200
        app.state.lifecycle.count(-1)
        assert asking.get("/v1/models").status_code == 200
        app.state.lifecycle.count(1 - settings.max_in_flight)
