"""The OpenAI client, unchanged, against a real server over the real engine: whole answers, streams, and refusals."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from slmdeploy.runtime.model import load
from tests.serving.live import PATIENCE_S, client

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"good": {"type": "boolean"}},
    "required": ["good"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as made:
        yield made


def test_a_completion_is_what_the_runtime_generates(api: openai.OpenAI, decoder: Path) -> None:
    answer = api.completions.create(model="tiny", prompt="hello", max_tokens=8, temperature=0)
    alone = load(decoder).generate("hello", max_new_tokens=8)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (alone.text, alone.finish_reason)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (alone.prompt_tokens, 8)


def test_a_stream_is_the_answer_in_pieces_with_usage_last(api: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0}
    whole = api.completions.create(**options)
    chunks = list(api.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_choices_of_several_prompts_are_numbered_through(api: openai.OpenAI, decoder: Path) -> None:
    answer = api.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=4, temperature=0)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == load(decoder).generate("a", max_new_tokens=4).text
    assert texts[2] == texts[3] == load(decoder).generate("b", max_new_tokens=4).text


def test_a_prompt_may_be_token_ids(api: openai.OpenAI, decoder: Path) -> None:
    model = load(decoder)
    ids = model.tokenizer.encode("hello").ids
    answer = api.completions.create(model="tiny", prompt=ids, max_tokens=4, temperature=0)
    assert answer.choices[0].text == model.generate("hello", max_new_tokens=4).text


def test_a_chat_goes_through_the_template(api: openai.OpenAI, decoder: Path) -> None:
    answer = api.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=6, temperature=0)
    alone = load(decoder).chat(HELLO, max_new_tokens=6)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].message.role == "assistant"


def test_a_chat_streams_with_its_role_first(api: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "temperature": 0}
    chunks = list(api.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    whole = api.chat.completions.create(**options).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"


def test_log_probabilities_name_tokens_and_alternatives(api: openai.OpenAI) -> None:
    chat = api.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert len(content) == 3
    assert all(token.logprob == max(top.logprob for top in token.top_logprobs) for token in content)
    plain = api.completions.create(model="tiny", prompt="hello", max_tokens=3, temperature=0, logprobs=0)
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.text_offset == [0, 1, 2]
    assert plain.choices[0].logprobs.top_logprobs is None


def test_the_same_seed_gives_the_same_text_and_stop_ends_it(api: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": "hello", "max_tokens": 12, "temperature": 1.0, "seed": 3}
    first, second = (api.completions.create(**options).choices[0].text for _ in range(2))
    assert first == second
    assert len(first) > 3
    cut = api.completions.create(**options, stop=first[2])
    assert cut.choices[0].text == first[: first.index(first[2])]
    assert cut.choices[0].finish_reason == "stop"


def test_an_answer_follows_its_schema(api: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}
    answer = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=40, response_format=form)
    assert set(json.loads(answer.choices[0].message.content or "")) == {"good"}
    assert answer.choices[0].finish_reason == "stop"


def test_tools_reach_a_template_that_reads_them(api: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    plain = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1)
    told = api.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1, tools=[tool])
    assert plain.usage is not None
    assert told.usage is not None
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens


def test_the_history_of_a_tool_is_taken(api: openai.OpenAI) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "be short"}]},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "nothing"},
    ]
    assert api.chat.completions.create(model="tiny", messages=messages, max_tokens=1).choices[0].finish_reason


REFUSED = [
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"store": True}, "store"),
    ({"temperature": 3}, "temperature"),
    ({"n": 9}, "n"),
    ({"max_tokens": 401}, "max_tokens"),
    ({"top_logprobs": 2}, None),
    ({"max_tokens": 1, "max_completion_tokens": 2}, None),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
    ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages.0.colour"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}},
        None,
    ),
]


@pytest.mark.parametrize(
    ("extra", "param"), REFUSED, ids=[next(iter(extra)) + str(i) for i, (extra, _) in enumerate(REFUSED)]
)
def test_what_is_not_supported_is_refused_by_name(api: openai.OpenAI, extra: dict[str, Any], param: str | None) -> None:
    with client(str(api.base_url)) as plain:
        answer = plain.post("chat/completions", json={"model": "tiny", "messages": HELLO, "max_tokens": 2} | extra)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".")
    assert param is None or error["param"] == param


def test_the_client_gets_its_own_kinds_of_errors(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        api.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError, match="at most 511") as caught:
        api.completions.create(model="tiny", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="best_of"):
        api.completions.create(model="tiny", prompt="x", best_of=3)
    with pytest.raises(openai.NotFoundError, match="needs a model made for embed"):
        api.embeddings.create(model="tiny", input="x")


def test_the_models_are_listed(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").owned_by == "slmdeploy"
