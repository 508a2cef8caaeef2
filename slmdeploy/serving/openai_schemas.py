"""What OpenAI's clients send, as strict models: a field that is unknown, or that would change the answer and is not
implemented, is refused by name; one that only labels a request (user, metadata, …) is taken and has no effect.

Answers are plain dictionaries made in answers.py. Knows neither engine nor tokenizer.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Texts = Annotated[str | list[Annotated[str, Field(min_length=1)]], Field(description="A text, or several.")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 24)]], Field(min_length=1)]


def _neutral(*values: Any) -> AfterValidator:
    """A field that is taken only where it asks for nothing."""

    def check(value: Any) -> Any:
        if value not in values:
            shown = " or ".join(map(repr, values))
            raise ValueError(f"only {shown} is supported")
        return value

    return AfterValidator(check)


class Body(BaseModel):
    """A request's body: nothing in it is unknown, nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """`include_usage`: a last event with the tokens counted."""

    include_usage: bool = False
    include_obfuscation: Annotated[bool, _neutral(False)] = False


class JsonSchema(Body):
    """A schema that the answer has to follow; `strict` changes nothing, as it is always followed."""

    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """text, json_object (any JSON object) or json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema")
        return self


class Labels(Body):
    """What only labels a request: taken, since clients send it, and without effect on any answer."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Annotated[bool | None, _neutral(None, False)] = None


class Generation(Labels):
    """How to generate, left out as OpenAI has it; top_k, min_p, repetition_penalty and ignore_eos are ours."""

    model: str = Field(description="The id that /v1/models gives.")
    n: int = Field(1, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; 1 where left out.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 is off.")
    min_p: float = Field(0.0, ge=0, le=1, description="0 is off.")
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="1 is off.")
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
        | None
    ) = None
    ignore_eos: bool = Field(False, description="Go on behind an end token; for measuring.")
    frequency_penalty: Annotated[float | None, _neutral(None, 0)] = None
    presence_penalty: Annotated[float | None, _neutral(None, 0)] = None
    logit_bias: Annotated[dict[str, float] | None, _neutral(None, {})] = None

    @model_validator(mode="after")
    def _options_go_with_stream(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as the runtime takes them."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the tokens counted."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Body):
    """A piece of a message; pictures and sounds are not read."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """A call that an earlier answer made; `arguments` is JSON as text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call of a tool in the history."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One message of a chat. `developer` reaches the template as `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: Annotated[None, Field(description="Only null.")] = None


class Function(Body):
    """A function that the model may ask for, with the JSON schema of its arguments."""

    name: str = Field(max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool | None, _neutral(None, False)] = None


class Tool(Body):
    """A tool that the chat template writes into the prompt."""

    type: Literal["function"]
    function: Function


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "MODEL", "messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 16}
            ]
        }
    )
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto"] | None = Field(
        None, description="Calls come back as text: this server parses none."
    )
    parallel_tool_calls: Annotated[bool | None, _neutral(None, True)] = None
    modalities: Annotated[list[str] | None, _neutral(None, ["text"])] = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template.")

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        return self


class CompletionRequest(Generation):
    """POST /v1/completions. A prompt may be ids of this model's own tokens."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "MODEL", "prompt": "Once upon a time", "max_tokens": 16}]}
    )
    prompt: (
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(min_length=1)] | TokenIds], Field(min_length=1)]
    )
    max_tokens: int | None = Field(None, ge=1, description="16 where left out, as OpenAI has it.")
    logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    echo: Annotated[bool | None, _neutral(None, False)] = None
    suffix: Annotated[str | None, _neutral(None, "")] = None
    best_of: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _best_of_is_n(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is supported only where it is n")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        given = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        ids = [each for each in given if isinstance(each, int)]
        return [ids] if ids else [each for each in given if not isinstance(each, int)]


class EmbeddingRequest(Labels):
    """POST /v1/embeddings. `prompt` and `truncate` are ours."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "MODEL", "input": ["a text", "another"]}]})
    model: str
    input: (
        Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    ) = Field(description="Texts. Ids of tokens are refused: clients send those of OpenAI's tokenizer.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: float32, little endian.")
    dimensions: int | None = Field(None, ge=1, description="Only the model's own.")
    prompt: str | None = Field(None, description="The name of a text of the model's that goes in front.")
    truncate: bool = Field(False, description="Cut a text that is too long rather than refuse it.")

    @property
    def texts(self) -> list[str]:
        """The texts, one or several."""
        return [self.input] if isinstance(self.input, str) else self.input
