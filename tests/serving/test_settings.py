"""Limits that make no sense are refused before a server begins."""

from typing import Any

import pytest

from slmdeploy.errors import InputError
from slmdeploy.serving.settings import ServerSettings


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_body_bytes": 0},
        {"max_output_tokens": 0},
        {"max_prompt_tokens": 0},
        {"max_choices": -1},
        {"deadline_s": 0},
        {"deadline_s": float("nan")},
        {"stall_s": -1},
        {"drain_s": -1},
        {"drain_s": float("nan")},
        {"stream_events": 0},
    ],
)
def test_a_limit_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ServerSettings(**wrong)


def test_a_key_is_not_in_the_settings_text() -> None:
    assert "secret" not in repr(ServerSettings(api_keys=("secret-secret-secret",)))
