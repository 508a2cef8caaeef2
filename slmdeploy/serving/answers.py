"""What goes out for a generation, as OpenAI's clients read it: whole answers, pieces of a stream, log-probabilities.

Two forms of one interface, chat and completion; they differ in names alone. Plain dictionaries, made of the engine's
events. Knows neither HTTP nor the engine.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from slmdeploy.runtime.requests import TokenEvent, Usage
from slmdeploy.serving.tokens import TokenNames

Json = dict[str, Any]
LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot come: JSON has no infinity."""


@dataclass
class Choice:
    """One choice as it grows."""

    tokens: list[TokenEvent] = field(default_factory=list)
    rest: str = ""
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(token.text for token in self.tokens) + self.rest


def usage_object(usages: Sequence[Usage]) -> Json:
    """Tokens counted over all prompts of a request."""
    prompt, made = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages)},
    }


def finite(logprob: float | None) -> float | None:
    """A log-probability that JSON can hold."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def new_id(kind: str) -> str:
    """An id that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


class Form(Protocol):
    """How one endpoint writes its answers. `index` counts choices over all prompts of a request."""

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        """The answer at once."""

    def opening(self, index: int) -> Json | None:
        """What a choice's stream begins with, if with anything."""

    def piece(self, index: int, token: TokenEvent) -> Json:
        """A token."""

    def closing(self, index: int, rest: str, finish_reason: str) -> list[Json]:
        """What a choice's stream ends with."""

    def counted(self, usage: Json) -> Json:
        """The last event of a stream that asked for the tokens counted."""


class _Envelope:
    """What both forms have around their choices."""

    kind, object_whole, object_piece = "", "", ""

    def __init__(self, model: str, names: TokenNames, *, logprobs: bool, usage: bool) -> None:
        self._model, self._names, self._logprobs, self._usage = model, names, logprobs, usage
        self.id, self.created = new_id(self.kind), int(time.time())

    def _around(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self._model, "choices": choices}

    def _chunk(self, choice: Json) -> Json:
        # With stream_options.include_usage every event but the last has the key, and null in it.
        return self._around(self.object_piece, [choice]) | ({"usage": None} if self._usage else {})

    def counted(self, usage: Json) -> Json:
        """See Form."""
        return self._around(self.object_piece, []) | {"usage": usage}


class ChatForm(_Envelope):
    """POST /v1/chat/completions."""

    kind, object_whole, object_piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        """See Form."""
        answers = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._probabilities(choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        return self._around(self.object_whole, answers) | {"usage": usage}

    def opening(self, index: int) -> Json:
        """See Form."""
        return self._delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, token: TokenEvent) -> Json:
        """See Form."""
        return self._delta(index, {"content": token.text}, self._probabilities([token]))

    def closing(self, index: int, rest: str, finish_reason: str) -> list[Json]:
        """See Form."""
        held_back = [self._delta(index, {"content": rest})] if rest else []
        return [*held_back, self._delta(index, {}, reason=finish_reason)]

    def _delta(self, index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        return self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _probabilities(self, tokens: Sequence[TokenEvent]) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            self._named(token.token_id, token.logprob)
            | {"top_logprobs": [self._named(other, value) for other, value in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float | None) -> Json:
        text, data = self._names[token]
        return {"token": text, "logprob": finite(logprob), "bytes": list(data)}


class CompletionForm(_Envelope):
    """POST /v1/completions."""

    kind, object_whole, object_piece = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, names: TokenNames, *, logprobs: bool, usage: bool) -> None:
        super().__init__(model, names, logprobs=logprobs, usage=usage)
        self._offsets: dict[int, int] = {}

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        """See Form."""
        answers = [
            self._choice(i, choice.text, self._probabilities(i, choice.tokens), choice.finish_reason)
            for i, choice in enumerate(choices)
        ]
        return self._around(self.object_whole, answers) | {"usage": usage}

    def opening(self, index: int) -> None:
        """See Form."""

    def piece(self, index: int, token: TokenEvent) -> Json:
        """See Form."""
        return self._chunk(self._choice(index, token.text, self._probabilities(index, [token])))

    def closing(self, index: int, rest: str, finish_reason: str) -> list[Json]:
        """See Form."""
        return [self._chunk(self._choice(index, rest, reason=finish_reason))]

    def _choice(self, index: int, text: str, logprobs: Json | None = None, reason: str | None = None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _probabilities(self, index: int, tokens: Sequence[TokenEvent]) -> Json | None:
        if not self._logprobs:
            return None
        names = [self._names[token.token_id][0] for token in tokens]
        offsets = []
        for name in names:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(name)
        tops = [{self._names[other][0]: finite(value) for other, value in token.top} for token in tokens]
        return {
            "tokens": names,
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": offsets,
        }
