"""Whatever goes wrong has OpenAI's form, the right status, and nothing of the server's inside."""

import pytest

from slmdeploy.errors import CorruptArtifactError, InputError, ResourceError, SlmdeployError
from slmdeploy.runtime.errors import DeadlineError, EngineStoppedError, QueueFullError
from slmdeploy.serving.failures import ApiError, of_runtime, of_validation
from tests.serving.live import client

HEADERS = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("x."), 400),
        (QueueFullError("x."), 429),
        (EngineStoppedError("x."), 503),
        (DeadlineError("x."), 504),
        (CorruptArtifactError("x."), 500),
        (ResourceError("x."), 500),
    ],
)
def test_an_error_of_the_runtime_has_its_status(error: SlmdeployError, status: int) -> None:
    told = of_runtime(error)
    assert told.status == status
    assert (told.message == "x.") is (status != 500)
    assert told.body()["error"].keys() == {"message", "type", "param", "code"}


def test_only_what_may_be_repeated_says_when() -> None:
    assert "retry-after" in ApiError(429, "x.").response().headers
    assert "retry-after" not in ApiError(400, "x.").response().headers


def test_a_validation_error_names_the_field() -> None:
    told = of_validation([{"type": "int_type", "loc": ("body", "n"), "msg": "Input should be an integer"}])
    assert (told.param, told.message) == ("n", "n: Input should be an integer.")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": 1e999}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": 99999999999999999999999999}',
        b'{"model": "tiny", "prompt": "x", "seed": true}',
        b'{"model": "tiny", "prompt": [[]]}',
        b'{"model": "tiny", "prompt": [300]}',
        b'{"model": "tiny", "prompt": ""}',
    ],
)
def test_a_hostile_body_is_a_400_in_openais_form(url: str, body: bytes) -> None:
    with client(url) as asking:
        answer = asking.post("/v1/completions", content=body, headers=HEADERS)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_other_refusals_have_the_form_too(url: str) -> None:
    with client(url) as asking:
        assert asking.get("/nowhere").json()["error"]["code"] == "not_found"
        wrong = asking.get("/v1/completions")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        plain = asking.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
        assert (plain.status_code, plain.json()["error"]["type"]) == (400, "invalid_request_error")
