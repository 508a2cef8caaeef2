"""One request over HTTP: what is sent, what is read of good answers, and a sentence for every bad one."""

import threading
from pathlib import Path
from typing import Any

import pytest

from slmdeploy.errors import InputError
from slmdeploy.profiling.live_http import Server, UnansweredError, answer, first_model, read_key
from tests.profiling.live_server import TOKEN, Script, line, serving, tokens

REQUEST = {"op": "generate", "prompt": [20, 21, 22], "new_tokens": 4}


def ask(script: Script, request: dict[str, Any] | None = None, task: str = "generate", timeout_s: float = 60.0) -> Any:
    """The reply of a server that follows a script."""
    with serving(script) as url:
        return answer(Server.at(url, "tiny"), REQUEST if request is None else request, task, timeout_s)


def test_a_generation_sends_ids_and_gives_the_time_of_each_token() -> None:
    script = Script()
    reply = ask(script)
    assert len(reply["stamps_ms"]) == 4
    assert reply["stamps_ms"] == sorted(reply["stamps_ms"])
    assert not reply["spread"]
    ((path, body),) = script.seen
    assert path == "/v1/completions"
    assert (body["prompt"], body["max_tokens"], body["ignore_eos"], body["model"]) == ([20, 21, 22], 4, True, "tiny")


def test_events_of_several_tokens_are_spread_between_the_first_and_the_last() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 4}}
    reply = ask(Script([line(TOKEN), line(TOKEN), line(usage), b"data: [DONE]\n\n"]))
    assert reply["spread"]
    stamps = reply["stamps_ms"]
    assert len(stamps) == 4
    assert stamps[1] - stamps[0] == pytest.approx(stamps[3] - stamps[2])


def test_the_last_token_may_come_with_the_end() -> None:
    last = {"choices": [{"text": "x", "finish_reason": "length"}]}
    reply = ask(Script([*[line(TOKEN)] * 3, line(last), b"data: [DONE]\n\n"]))
    assert (len(reply["stamps_ms"]), reply["spread"]) == (4, False)


def test_an_answer_that_ended_by_its_length_has_all_tokens() -> None:
    last = {"choices": [{"text": "", "finish_reason": "length"}]}
    reply = ask(Script([line(TOKEN), line(TOKEN), line(last), b"data: [DONE]\n\n"]))
    assert (len(reply["stamps_ms"]), reply["spread"]) == (4, True)


def test_an_answer_without_text_came_when_it_ended() -> None:
    last = {"choices": [{"text": "", "finish_reason": "length"}]}
    reply = ask(Script([line(last), b"data: [DONE]\n\n"]))
    assert len(set(reply["stamps_ms"])) == 1
    assert (len(reply["stamps_ms"]), reply["spread"]) == (4, True)


@pytest.mark.parametrize(
    ("task", "request_", "path", "body"),
    [
        ("score", {"prefix": "a", "items": ["b"]}, "/score", {"prefix": "a", "items": ["b"]}),
        ("embed", {"texts": ["a"]}, "/v1/embeddings", {"model": "tiny", "input": ["a"]}),
        ("classify", {"texts": ["a"]}, "/classify", {"input": ["a"]}),
    ],
)
def test_texts_go_where_their_task_is_done(task: str, request_: Any, path: str, body: Any) -> None:
    script = Script()
    assert ask(script, request_, task) == {}
    assert script.seen == [(path, body)]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script(status=429), r"answered 429: too many \[31m requests"),
        (Script(tokens(3)), "3 tokens came of 4"),
        (Script([line(TOKEN)]), "1 tokens came of 4"),
        (Script([line({"error": {"message": "no slot"}})]), "no slot"),
        (Script([b"data: {nonsense\n\n"]), "is no JSON"),
        (Script([b"data: [1]\n\n"]), "is no JSON object"),
        (Script([line({"choices": 1})]), "the choices of an event are no objects: 1"),
        (Script([line({"choices": ["x"]})]), "the choices of an event are no objects"),
        (Script([line({"choices": [], "usage": [4]})]), "0 tokens came of 4"),
        (Script([b"data: " + b"x" * (2 << 20) + b"\n\n"]), "larger than 1 MiB"),
    ],
)
def test_a_bad_answer_is_a_sentence(script: Script, reason: str) -> None:
    with pytest.raises(UnansweredError, match=reason):
        ask(script)


def test_a_server_that_hangs_is_left_when_the_time_is_over() -> None:
    with pytest.raises(UnansweredError, match="did not answer within") as caught:
        ask(Script(hang=threading.Event()), timeout_s=0.2)
    assert caught.value.too_late


def test_the_model_and_the_key() -> None:
    with serving(Script(key="secret")) as url:
        assert first_model(Server.at(f"{url}/v1/", key="secret"), 20.0) == "tiny"
        with pytest.raises(InputError, match=r"does not name a model .*a key is needed.*check the address and the key"):
            first_model(Server.at(url), 20.0)
    with pytest.raises(InputError, match="cannot be reached"):
        first_model(Server.at(url), 20.0)
    with pytest.raises(InputError, match="cannot be reached"):
        first_model(Server.at(f"http://{'a' * 70}.example"), 20.0)
    assert "secret" not in repr(Server.at(url, key="secret"))


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://a@b", "http://h?q"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="is no address of a server"):
        Server.at(url)


def test_a_key_file_has_one_line(tmp_path: Path) -> None:
    file = tmp_path / "key"
    with pytest.raises(InputError, match="cannot be read as a key"):
        read_key(file)
    file.write_text("\n")
    with pytest.raises(InputError, match="has no key on its first line"):
        read_key(file)
    file.write_text("abc\n")
    assert read_key(file) == "abc"
