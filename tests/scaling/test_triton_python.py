"""Triton's models over a stand-in of its module: answers of the runtime, streams, cancellation and refusals."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmdeploy.runtime.model import Model, load
from slmdeploy.scaling.triton_python import Generating, Scoring
from tests.graphs import write_tiny_graph
from tests.scaling import triton_stand_in as triton


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_graph(tmp_path_factory.mktemp("triton") / "tiny", max_length=512)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder)


@pytest.fixture
def generating(folder: Path) -> Iterator[Generating]:
    served = Generating()
    served.package, served.utils = folder, triton
    served.initialize({})
    yield served
    served.finalize()


def text(responses: list[triton.InferenceResponse]) -> str:
    return "".join(one.values()["text_output"][0] for one in responses)


def test_streams_and_whole_answers_are_those_of_the_model(generating: Generating, model: Model) -> None:
    wanted = model.generate("abc", max_new_tokens=12)
    streamed = triton.request(text_input="abc", max_tokens=12, stream=True)
    whole = triton.request(text_input="abc", max_tokens=12)
    generating.execute([streamed, whole])
    pieces, (answer,) = streamed.responses(), whole.responses()
    assert len(pieces) > 2
    assert text(pieces) == text([answer]) == wanted.text
    assert [one.values()["finish_reason"] for one in pieces[:-1]] == [[""]] * (len(pieces) - 1)
    assert pieces[-1].values()["finish_reason"] == answer.values()["finish_reason"] == [wanted.finish_reason]


def test_settings_reach_the_model(generating: Generating, model: Model) -> None:
    sampled = triton.request(text_input="abc", max_tokens=8, temperature=1.5, top_k=20, top_p=0.5, seed=7)
    stopped = triton.request(text_input="abc", max_tokens=8, stop=[model.generate("abc", max_new_tokens=8).text[1:3]])
    generating.execute([sampled, stopped])
    wanted = model.generate("abc", max_new_tokens=8, temperature=1.5, top_k=20, top_p=0.5, seed=7)
    assert text(sampled.responses()) == wanted.text
    (answer,) = stopped.responses()
    assert answer.values() == {"text_output": [model.generate("abc", max_new_tokens=1).text], "finish_reason": ["stop"]}


def test_a_client_that_is_gone_frees_its_row(generating: Generating) -> None:
    gone = triton.request(text_input="abc", max_tokens=400, stream=True)
    gone.sender.gone = True
    generating.execute([gone])
    assert gone.responses()[-1].values()["finish_reason"] == ["cancelled"]
    until = time.monotonic() + 30
    while generating._engine.stats().running and time.monotonic() < until:
        time.sleep(0.01)
    assert generating._engine.stats().kv_tokens_used == 0


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"text_input": ""}, "text_input is empty"),
        ({"text_input": ["a", "b"]}, "text_input has 2 texts: give one."),
        ({}, "text_input has 0 texts"),
        ({"text_input": b"\xff"}, "text_input is no text in UTF-8"),
        ({"text_input": "a", "max_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"text_input": "a " * 600}, "the context of this model holds 512"),
        ({"text_input": "a", "stop": [""]}, "stop must be"),
    ],
)
def test_what_cannot_be_used_is_refused_alone(generating: Generating, inputs: dict[str, object], said: str) -> None:
    bad, good = triton.request(**inputs), triton.request(text_input="a", max_tokens=1)
    generating.execute([bad, good])
    (refusal,) = bad.responses()
    error = refusal.error()
    assert error is not None
    assert error.code() == triton.TritonError.INVALID_ARG
    assert said in error.message()
    assert good.responses()[-1].error() is None


def test_an_engine_that_ends_fails_what_comes_later(folder: Path) -> None:
    served = Generating()
    served.package, served.utils = folder, triton
    served.initialize({})
    served._engine.close()
    late = triton.request(text_input="a")
    served.execute([late])
    error = late.responses()[0].error()
    assert error is not None
    assert error.code() == triton.TritonError.UNAVAILABLE
    served.finalize()


def test_scores_are_those_of_the_model(folder: Path, model: Model) -> None:
    served = Scoring()
    served.package, served.utils = folder, triton
    served.initialize({})
    good, bad = triton.request(prefix="p", items=["one", "two"]), triton.request(prefix="p", items=[""])
    first, second = served.execute([good, bad])
    assert first.values()["scores"] == pytest.approx(model.score("p", ["one", "two"]), abs=1e-5)
    assert second.error() is not None
    assert "item 0 is empty" in second.error().message()
