"""The decoder behind the endpoints that generate: from a request's body to requests of the engine, and to an answer.

Both endpoints share what lies between their bodies and their forms (openai_schemas.py, answers.py): limits on tokens,
the deadline, collecting or streaming, and what is measured on the way. Knows no route.
"""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from slmdeploy.runtime.chat import ChatTemplates
from slmdeploy.runtime.decoding import token_array
from slmdeploy.runtime.generation import Settings
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.requests import (
    Begun,
    ChoiceDone,
    Event,
    Finished,
    GenerateRequest,
    ScoreEvent,
    ScoreRequest,
    TokenConstraint,
    TokenEvent,
    Usage,
)
from slmdeploy.runtime.text import TextCodec
from slmdeploy.serving.answers import Choice, Form, usage_object
from slmdeploy.serving.bridge import EngineLike, Run, unless_gone
from slmdeploy.serving.failures import ApiError, refuse
from slmdeploy.serving.metrics import Figures, Stopwatch
from slmdeploy.serving.observing import note
from slmdeploy.serving.openai_schemas import Generation, ResponseFormat
from slmdeploy.serving.settings import ServerSettings
from slmdeploy.serving.streaming import EventStream, event, with_errors
from slmdeploy.serving.structured import ANY_OBJECT, Schemas
from slmdeploy.serving.tokens import TextThreads, TokenNames

_LATE = "The answer was not complete after {:g} s, the longest that this server works on a request."


class Generator:
    """One model, its engine, and what stands between them and HTTP."""

    def __init__(
        self, model: Model, engine: EngineLike, settings: ServerSettings, figures: Figures, threads: TextThreads
    ) -> None:
        self.model, self.engine, self.settings, self._figures, self._threads = model, engine, settings, figures, threads
        self.names = TokenNames(model.tokenizer)
        self._codec = TextCodec(model.tokenizer)
        runtime = model.runtime
        self._schemas = Schemas(model.tokenizer, runtime.vocab_size, runtime.eos_token_ids)
        self._templates: ChatTemplates | None = None

    @property
    def prompt_limit(self) -> int:
        """The most tokens that a prompt may have."""
        context = self.model.runtime.max_length - 1
        return min(context, self.settings.max_prompt_tokens or context)

    async def prompt(self, given: str | Sequence[int]) -> tuple[int, ...]:
        """The ids of a prompt; ApiError for one that is too long or has ids outside the vocabulary."""
        if isinstance(given, str):
            ids = tuple(await self._threads.run(self._codec.prompt, given, "prompt"))
        else:
            ids = tuple(token_array(given, self.model.runtime.vocab_size).tolist())
        return self._short_enough(ids)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> tuple[int, ...]:
        """The ids of a chat's prompt; ApiError where the chat template does not read the tools."""
        return self._short_enough(await self._threads.run(self._chat_ids, messages, tools, variables))

    def _chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> tuple[int, ...]:
        self._templates = self._templates or ChatTemplates(self.model.path)
        text = self._templates.render(messages, tools=tools, variables=variables)
        if tools and text == self._templates.render(messages, variables=variables):
            raise refuse("tools", "The chat template of this model does not read tools.")
        return tuple(self._codec.item(text, "chat"))

    def _short_enough(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if len(ids) > self.prompt_limit:
            raise ApiError(
                400,
                f"The prompt has {len(ids)} tokens, but this server takes at most {self.prompt_limit}.",
                code="context_length_exceeded",
            )
        return ids

    async def constraint(self, wanted: ResponseFormat | None) -> Callable[[], TokenConstraint] | None:
        """What keeps an answer to its format; ApiError for a schema that cannot be followed."""
        if wanted is None or wanted.type == "text":
            return None
        schema = ANY_OBJECT if wanted.json_schema is None else wanted.json_schema.schema_
        return await self._threads.run(self._schemas.compile, schema)

    def request(
        self,
        prompt_ids: tuple[int, ...],
        body: Generation,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        constraint: Callable[[], TokenConstraint] | None,
    ) -> GenerateRequest:
        """What the engine is asked; ApiError for more tokens or choices than the server gives."""
        limits = self.settings
        most = limits.max_output_tokens
        if max_tokens is not None and max_tokens > most:
            raise refuse("max_tokens", f"{max_tokens} tokens are asked for, but this server makes at most {most}.")
        if body.n > limits.max_choices:
            raise refuse("n", f"{body.n} choices are asked for, but this server makes at most {limits.max_choices}.")
        settings = Settings(
            max_new_tokens=max_tokens or most,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k,
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            seed=body.seed,
            stop=body.stops,
            ignore_eos=body.ignore_eos,
        )
        return GenerateRequest(prompt_ids, settings, body.n, logprobs, constraint)

    async def respond(
        self, http: HttpRequest, requests: Sequence[GenerateRequest], form: Form, body: Generation
    ) -> Response:
        """The answer at once, or as a stream that begins when all requests are accepted."""
        deadline = http.state.arrived + self.settings.deadline_s
        requests = [replace(request, deadline=deadline) for request in requests]
        if not body.stream:
            return JSONResponse(await unless_gone(http, self._whole(http, requests, form)))
        run = Run(self.engine, requests, self.settings.stream_events)
        run.submit()
        events = with_errors(self._events(http, run, requests, form, counted=body.wants_usage))
        return EventStream(events, self.settings.stall_s, run.cancel)

    async def _whole(self, http: HttpRequest, requests: Sequence[GenerateRequest], form: Form) -> dict[str, Any]:
        async with Run(self.engine, requests, None) as run:
            answer = _Answer(self._figures, requests, http.state.arrived)
            async with aclosing(run.events()) as events:
                async for source, each in events:
                    answer.take(source, each)
        for choice in answer.choices:
            self._check_end(choice.finish_reason)
        note(http, usage := usage_object(answer.usages))
        return form.whole(answer.choices, usage)

    async def _events(
        self, http: HttpRequest, run: Run, requests: Sequence[GenerateRequest], form: Form, *, counted: bool
    ) -> AsyncGenerator[str, None]:
        answer = _Answer(self._figures, requests, http.state.arrived)
        for index in range(len(answer.choices)):
            if (opening := form.opening(index)) is not None:
                yield event(opening)
        async with aclosing(run.events()) as events:
            async for source, each in events:
                answer.take(source, each)
                if isinstance(each, TokenEvent):
                    yield event(form.piece(answer.index(source, each.choice), each))
                elif isinstance(each, ChoiceDone):
                    self._check_end(each.finish_reason)
                    for piece in form.closing(answer.index(source, each.choice), each.text, each.finish_reason):
                        yield event(piece)
        note(http, usage := usage_object(answer.usages))
        if counted:
            yield event(form.counted(usage))

    def _check_end(self, reason: str | None) -> None:
        if reason == "deadline":
            raise ApiError(504, _LATE.format(self.settings.deadline_s), code="deadline_exceeded")
        if reason == "cancelled":
            raise ApiError(503, "The server is stopping and has ended this request.", code="unavailable")

    async def score(self, http: HttpRequest, prefix: str, items: Sequence[str]) -> tuple[list[float], dict[str, Any]]:
        """logit(labels[1]) - logit(labels[0]) of each item behind the prefix, and the tokens counted."""
        prefix_ids, item_ids = await self._threads.run(self._score_ids, prefix, items)
        self._short_enough(prefix_ids + max(item_ids, key=len))
        asked = ScoreRequest(prefix_ids, item_ids, deadline=http.state.arrived + self.settings.deadline_s)
        found = await unless_gone(http, self._scored(asked, http.state.arrived))
        self._figures.latency("score_ms", 1e3 * (time.monotonic() - http.state.arrived))
        prompt = len(prefix_ids) + sum(map(len, item_ids))
        usage = usage_object([Usage(prompt, found.cached_tokens, 0)])
        note(http, usage)
        return (found.logits[:, 1] - found.logits[:, 0]).tolist(), usage

    def _score_ids(self, prefix: str, items: Sequence[str]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        ids = tuple(self._codec.prompt(prefix, "prefix"))
        return ids, tuple(tuple(self._codec.item(item, f"item {i}")) for i, item in enumerate(items))

    async def _scored(self, asked: ScoreRequest, arrived: float) -> ScoreEvent:
        async with Run(self.engine, [asked], None) as run, aclosing(run.events()) as events:
            async for _, each in events:
                if isinstance(each, Begun):
                    self._figures.latency("queue_ms", 1e3 * (time.monotonic() - arrived))
                elif isinstance(each, ScoreEvent):
                    return each
        raise AssertionError("a request ends with its answer or an error")


class _Answer:
    """The choices of all prompts of one HTTP request as their events come; each has a stopwatch."""

    def __init__(self, figures: Figures, requests: Sequence[GenerateRequest], arrived: float) -> None:
        self._figures, self._arrived = figures, arrived
        self._each = requests[0].n
        self.choices = [Choice() for request in requests for _ in range(request.n)]
        self.usages: list[Usage] = []
        self._watches = [Stopwatch(figures, arrived) for _ in self.choices]

    def index(self, source: int, choice: int) -> int:
        """The number of a prompt's choice over all prompts."""
        return source * self._each + choice

    def take(self, source: int, each: Event) -> None:
        """Add an event."""
        if isinstance(each, Begun):
            self._figures.latency("queue_ms", 1e3 * (time.monotonic() - self._arrived))
        elif isinstance(each, Finished):
            self.usages.append(each.usage)
        elif isinstance(each, TokenEvent):
            index = self.index(source, each.choice)
            self.choices[index].tokens.append(each)
            self._watches[index].token()
        elif isinstance(each, ChoiceDone):
            index = self.index(source, each.choice)
            self.choices[index].rest, self.choices[index].finish_reason = each.text, each.finish_reason
            self._watches[index].done()
