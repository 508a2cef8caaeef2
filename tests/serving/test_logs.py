"""A log line is one JSON object, and nothing of a prompt is in it."""

import io
import json
import logging
import sys

import pytest

from slmdeploy.serving.logs import DETAILS, JsonFormatter
from tests.serving.live import client, wait_for


def line(message: str, **extra: object) -> dict[str, object]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.error(message, **extra)  # type: ignore[arg-type]
    (only,) = stream.getvalue().splitlines()
    found: dict[str, object] = json.loads(only)
    return found


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [getattr(record, DETAILS) for record in caplog.records if hasattr(record, DETAILS)]


def test_a_record_is_one_line_with_its_details() -> None:
    found = line("two\nlines", extra={DETAILS: {"status": 200}})
    assert (found["message"], found["level"], found["status"]) == ("two\nlines", "error", 200)


def test_a_traceback_is_in_the_line() -> None:
    try:
        raise ValueError("odd")
    except ValueError:
        found = line("failed", exc_info=sys.exc_info())
    assert "ValueError: odd" in str(found["traceback"])


def test_a_request_is_logged_by_its_id_and_without_its_prompt(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slmdeploy")
    with client(url) as asking:
        body = {"model": "tiny", "prompt": "a secret", "max_tokens": 2}
        answer = asking.post("/v1/completions", json=body, headers={"X-Request-ID": "my-id.1"})
        assert answer.headers["x-request-id"] == "my-id.1"
        odd = asking.post("/v1/secret-path", headers={"X-Request-ID": "spaces are odd"})
        assert odd.headers["x-request-id"] != "spaces are odd"
    # The line is written after the answer has left, so the client may be ahead of it.
    assert wait_for(lambda: len(lines(caplog)) == 2)
    first, second = lines(caplog)
    assert (first["request_id"], first["status"], first["completion_tokens"]) == ("my-id.1", 200, 2)
    assert (second["path"], second["status"]) == ("unknown", 404)
    assert "secret" not in caplog.text
