"""The page follows from the committed results, agreement is what it says, and an engine is served to the profiler."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import validation
from benchmarks.peers.session import EngineSession
from slmdeploy.profiling.worker import FakeSession, answer

REPOSITORY = Path(__file__).parents[2]


def test_the_page_is_that_of_the_results() -> None:
    data = json.loads(validation.RESULTS.read_text(encoding="utf-8"))
    assert validation.PAGE.read_text(encoding="utf-8") == validation.page(data)
    assert all(len(rounds) >= 5 for rounds in data["rounds"].values())


def test_agreement_is_of_ratios_within_rounds() -> None:
    found = validation.agreement([(10.0, 5.0), (30.0, 10.0), (8.0, 4.0), (20.0, 10.0)])
    assert (found["ours"], found["tool"], found["ratio"]) == (15.0, 7.5, 2.0)
    assert found["interval"] == pytest.approx([2.0, 3.0])


def test_a_tool_that_says_something_else_is_no_figure() -> None:
    assert validation._number(r"First: ([\d.]+) ms", "First: 1.25 ms") == 1.25
    with pytest.raises(SystemExit, match="did not say"):
        validation._number(r"First: ([\d.]+) ms", "usage: tool")


def test_an_engine_answers_the_profiler() -> None:
    clock = FakeSession()

    class Engine:
        def generate(self, prompts: list[list[int]], new_tokens: int):
            assert prompts == [[5, 6]]
            for _ in range(new_tokens):
                clock.now += 0.25
                yield None

    session = EngineSession(Engine())
    reply = answer(session, {"op": "generate", "prompt_ids": [5, 6], "new_tokens": 3}, clock.clock)
    assert all(math.isclose(got, want) for got, want in zip(reply["stamps_ms"], [250, 500, 750], strict=True))
