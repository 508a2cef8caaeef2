"""Events cross from a thread to the loop whole, in order and bounded."""

import asyncio
import threading
from typing import Any

import pytest

from slmdeploy.errors import InputError
from slmdeploy.runtime.generation import Settings
from slmdeploy.runtime.requests import ChoiceDone, Failed, Finished, GenerateRequest, TokenEvent
from slmdeploy.serving.bridge import Run, SlowReaderError, unless_gone
from slmdeploy.serving.failures import ApiError
from tests.serving.live import ScriptedEngine

REQUEST = GenerateRequest((1, 2), Settings())


async def _from_threads(count: int) -> list[tuple[int, Any]]:
    engine = ScriptedEngine()
    async with Run(engine, [REQUEST, REQUEST], None) as run:

        def speak(number: int) -> None:
            engine.say(number, *map(str, range(count)))
            engine.finish(number)

        threads = [threading.Thread(target=speak, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        found = [pair async for pair in run.events()]
        for thread in threads:
            thread.join()
    assert engine.cancelled == []
    return found


def test_every_event_arrives_in_its_requests_order() -> None:
    found = asyncio.run(_from_threads(300))
    for source in (0, 1):
        own = [event for number, event in found if number == source]
        assert [event.text for event in own if isinstance(event, TokenEvent)] == [str(i) for i in range(300)]
        assert isinstance(own[-2], ChoiceDone)
        assert isinstance(own[-1], Finished)


async def _overflow() -> ScriptedEngine:
    engine = ScriptedEngine()
    async with Run(engine, [REQUEST], 4) as run:
        engine.say(1, *"abcdefgh")
        with pytest.raises(SlowReaderError):
            async for _ in run.events():
                pass
    return engine


def test_a_buffer_that_overflows_cancels() -> None:
    assert asyncio.run(_overflow()).cancelled == [1]


async def _failure() -> ScriptedEngine:
    engine = ScriptedEngine()
    async with Run(engine, [REQUEST, REQUEST], None) as run:
        engine.running.pop(1).on_event(Failed(InputError("Not this one.")))
        with pytest.raises(InputError, match="Not this one"):
            async for _ in run.events():
                pass
    return engine


def test_the_failure_of_one_request_cancels_the_others() -> None:
    assert asyncio.run(_failure()).cancelled == [2]


class Caller:
    """A request whose client hangs up when told."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def _hang_up() -> bool:
    caller, cancelled = Caller(), False

    async def work() -> None:
        nonlocal cancelled
        caller.gone.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled = True
            raise

    with pytest.raises(ApiError, match="hung up"):
        await unless_gone(caller, work())  # type: ignore[arg-type]
    return cancelled


def test_work_is_cancelled_when_its_client_hangs_up() -> None:
    assert asyncio.run(_hang_up())


async def _stays() -> int:
    async def work() -> int:
        return 7

    return await unless_gone(Caller(), work())  # type: ignore[arg-type]


def test_work_is_finished_while_its_client_waits() -> None:
    assert asyncio.run(_stays()) == 7
