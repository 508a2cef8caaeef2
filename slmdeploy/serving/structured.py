"""Answers that follow a JSON schema: llguidance says before each token which ones the schema leaves open.

A schema is a stranger's program for a grammar compiler, so its size and the compiler's effort are bounded, and it is
compiled off the event loop and before the request is queued: a bad one is refused in one sentence. Knows neither engine
nor HTTP.
"""

import json
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from slmdeploy.errors import InputError
from slmdeploy.runtime.requests import TokenConstraint

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

ANY_OBJECT: dict[str, Any] = {"type": "object"}
_MAX_SCHEMA = 64 << 10
# Without optional white space a model cannot fill its answer with it.
_COMPACT: "JsonCompileOptions" = {"whitespace_flexible": False}


class SchemaError(InputError):
    """A JSON schema that cannot be followed."""


class Schemas:
    """Compiles schemas for one tokenizer, which is read when the first schema comes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self._source, self._vocab_size, self._end_ids = tokenizer, vocab_size, end_ids
        self._limits = llguidance.LLParserLimits(verbose_errors=False, max_grammar_size=100_000)

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(self._source.to_str(), n_vocab=self._vocab_size, eos_token=list(self._end_ids))

    def compile(self, schema: dict[str, Any]) -> Callable[[], TokenConstraint]:
        """What makes a fresh constraint for each choice; SchemaError for a schema that cannot be followed."""
        if not self._end_ids:
            raise SchemaError("This model has no end token, so an answer cannot end where its schema does.")
        text = json.dumps(schema)
        if len(text) > _MAX_SCHEMA:
            raise SchemaError(f"The JSON schema has {len(text)} bytes, but at most {_MAX_SCHEMA} are read.")
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_COMPACT)
        except ValueError as error:
            raise SchemaError(f"The JSON schema cannot be followed ({_one_line(str(error))}).") from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise SchemaError(f"The JSON schema cannot be followed ({_one_line(matcher.get_error())}).")
        return lambda: SchemaConstraint(matcher.deep_copy(), self._vocab_size)


class SchemaConstraint:
    """Where one choice stands in its schema; see TokenConstraint."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def finished(self) -> bool:
        """Whether the value is complete and nothing may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [vocab]: what may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little", count=self._vocab_size).astype(np.bool_)

    def accept(self, token: int) -> None:
        """Go on behind this token; SchemaError where the schema has become too much to follow."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _one_line(self._matcher.get_error())
            raise SchemaError(f"The JSON schema cannot be followed any further ({reason}).")


def _one_line(text: str) -> str:
    short = " ".join(text.split()).rstrip(".")
    return short if len(short) <= 200 else f"{short[:197]}..."
