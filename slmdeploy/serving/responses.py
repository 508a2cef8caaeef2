"""What answers look like, for the OpenAPI document: models that describe and are not run over any answer.

The tests compare real answers with them. Knows nothing else.
"""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


class ModelObject(BaseModel):
    """A model; `tasks` and `max_model_len` (tokens of context) are ours."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    tasks: list[str]
    max_model_len: int


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelObject]


class CachedTokens(BaseModel):
    """Tokens of the prompt that the prefix cache had."""

    cached_tokens: int


class UsageObject(BaseModel):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class AssistantMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """POST /v1/chat/completions without stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject


class TextChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """POST /v1/completions without stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageObject


class EmbeddingUsage(BaseModel):
    """Tokens counted."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingObject(BaseModel):
    """The vector of one text; as base64 it is float32, little endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """POST /v1/embeddings."""

    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


class ScoreList(BaseModel):
    """POST /score: of each item its score, in the order of the items."""

    id: str
    object: Literal["score"]
    model: str
    scores: list[float]
    usage: EmbeddingUsage


class RerankResult(BaseModel):
    """A document's place in the request and its relevance, 0 to 1: the sigmoid of its score."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RerankList(BaseModel):
    """POST /rerank, best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage


class TokenLabelObject(BaseModel):
    """The label of text[start:end]."""

    label: str
    score: float
    start: int
    end: int


class LabelObject(BaseModel):
    """The best label of a text, and the scores of all; or the labels of its tokens."""

    index: int
    label: str | None = None
    score: float | None = None
    scores: dict[str, float] | None = None
    tokens: list[TokenLabelObject] | None = None


class LabelList(BaseModel):
    """POST /classify."""

    id: str
    object: Literal["list"]
    model: str
    data: list[LabelObject]
    usage: EmbeddingUsage


class HealthBody(BaseModel):
    """GET /health and GET /ready."""

    state: Literal["loading", "ready", "draining", "broken"]


_REASONS = {
    400: "The body cannot be used as given; `param` names the field.",
    401: "No API key, or a wrong one.",
    404: "Another model, or an endpoint that this model has not.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    429: "The queue is full: try again after the seconds of Retry-After.",
    500: "An error of the server.",
    503: "Loading or stopping: try again after the seconds of Retry-After.",
    504: "The deadline of the server passed.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": reason} for status, reason in _REASONS.items()
}
"""What every endpoint may answer besides."""
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "The answer; with stream server-sent events.",
    }
}
