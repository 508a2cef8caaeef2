"""POST /v1/completions and /v1/chat/completions: from a body to the engine's requests. All else is in generator.py."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from slmdeploy.serving.answers import ChatForm, CompletionForm
from slmdeploy.serving.failures import refuse
from slmdeploy.serving.generator import Generator
from slmdeploy.serving.models_api import Identity
from slmdeploy.serving.openai_schemas import ChatMessage, ChatRequest, CompletionRequest, ToolCall
from slmdeploy.serving.responses import ERRORS, STREAM, ChatCompletion, Completion

DEFAULT_TOKENS = 16
"""What OpenAI gives a completion that asks for no number."""
MAX_PROMPTS = 64
"""Prompts in one request: each waits for a slot of its own."""


def routes(generator: Generator, identity: Identity) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(tags=["generation"])

    @router.post("/v1/completions", response_model=Completion, responses=ERRORS | STREAM)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """Continue one prompt or several. With `stream` the answer is server-sent events that end in `[DONE]`."""
        identity.check(body.model)
        prompts = body.prompts
        if len(prompts) > MAX_PROMPTS:
            raise refuse("prompt", f"There are {len(prompts)} prompts; at most {MAX_PROMPTS} go into one request.")
        constraint = await generator.constraint(body.response_format)
        requests = [
            generator.request(
                await generator.prompt(prompt),
                body,
                max_tokens=body.max_tokens or min(DEFAULT_TOKENS, generator.settings.max_output_tokens),
                logprobs=body.logprobs,
                constraint=constraint,
            )
            for prompt in prompts
        ]
        shown = body.logprobs is not None
        form = CompletionForm(identity.name, generator.names, logprobs=shown, usage=body.wants_usage)
        return await generator.respond(http, requests, form, body)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS | STREAM)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        """Answer a chat through the model's own chat template. With `stream` as for completions."""
        identity.check(body.model)
        messages = [_message(index, message) for index, message in enumerate(body.messages)]
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
        ids = await generator.chat(messages, tools or None, body.chat_template_kwargs)
        request = generator.request(
            ids,
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            constraint=await generator.constraint(body.response_format),
        )
        form = ChatForm(identity.name, generator.names, logprobs=bool(body.logprobs), usage=body.wants_usage)
        return await generator.respond(http, [request], form, body)

    return router


def _message(index: int, message: ChatMessage) -> Mapping[str, Any]:
    """A message as chat templates read it: text in one piece, and the arguments of calls as objects."""
    content = message.content
    calls = [_call(index, call) for call in message.tool_calls or ()]
    if content is None and not calls:
        raise refuse(f"messages.{index}.content", "A message needs content, or of an assistant calls of tools.")
    return {
        "role": "system" if message.role == "developer" else message.role,
        "content": "\n".join(part.text for part in content) if isinstance(content, list) else content,
        "name": message.name,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
    }


def _call(index: int, call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        raise refuse(f"messages.{index}.tool_calls", "The arguments of a call are no JSON.") from None
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
