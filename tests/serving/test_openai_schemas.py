"""Bodies are strict: no unknown field, no coercion, and a field without effect only where it asks for nothing."""

from typing import Any

import pytest
from pydantic import ValidationError

from slmdeploy.serving.openai_schemas import ChatRequest, CompletionRequest, EmbeddingRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("given", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_every_form_of_a_prompt_is_a_list_of_prompts(given: Any, prompts: list[Any]) -> None:
    assert CompletionRequest(model="m", prompt=given).prompts == prompts


@pytest.mark.parametrize("given", ["", [], [[]], [""], [-1], ["a", 1], None, 5])
def test_a_prompt_without_text_or_ids_is_refused(given: Any) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest(model="m", prompt=given)


NEUTRAL: list[dict[str, Any]] = [
    {"user": "u"},
    {"metadata": {"a": "b"}},
    {"store": False},
    {"frequency_penalty": 0},
    {"presence_penalty": 0.0},
    {"logit_bias": {}},
    {"service_tier": "auto"},
    {"parallel_tool_calls": True},
    {"modalities": ["text"]},
    {"max_tokens": 3, "max_completion_tokens": 3},
    {"stop": None},
    {"stream": True, "stream_options": {"include_usage": True}},
]


@pytest.mark.parametrize("extra", NEUTRAL, ids=[next(iter(extra)) for extra in NEUTRAL])
def test_what_clients_send_without_meaning_anything_is_taken(extra: dict[str, Any]) -> None:
    assert ChatRequest(**CHAT, **extra).model == "m"


@pytest.mark.parametrize(
    "extra",
    [
        {"unknown": 1},
        {"n": "2"},
        {"n": True},
        {"stream": 1},
        {"modalities": ["audio"]},
        {"stream_options": {"include_usage": True}},
        {"stop": ["x"] * 17},
        {"stop": ""},
        {"repetition_penalty": 1e-300},
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChatRequest(**CHAT, **extra)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert ChatRequest(**CHAT, stop="a").stops == ("a",)
    assert ChatRequest(**CHAT, stop=["a", "b"]).stops == ("a", "b")
    assert ChatRequest(**CHAT).stops == ()


def test_one_text_is_a_list_of_one() -> None:
    assert EmbeddingRequest(model="m", input="a").texts == ["a"]
