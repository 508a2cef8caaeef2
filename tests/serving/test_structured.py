"""A constraint leaves open exactly what the schema leaves open, and a schema that cannot be followed is a sentence."""

import json
from typing import Any

import numpy as np
import pytest

from slmdeploy.serving.structured import ANY_OBJECT, SchemaError, Schemas
from tests.graphs import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = 1
VOCAB = 272
SCHEMAS = Schemas(TOKENIZER, VOCAB, (END,))
FLAG = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


def test_only_the_schemas_texts_can_be_written() -> None:
    make = SCHEMAS.compile(FLAG)
    constraint = make()
    for letter in '{"a":true}':
        token = TOKENIZER.token_to_id(letter)
        allowed = constraint.allowed()
        assert (allowed.dtype, allowed.shape) == (np.bool_, (VOCAB,))
        assert allowed[token]
        assert not allowed[END]
        constraint.accept(token)
    assert constraint.finished or constraint.allowed()[END]
    assert not make().finished, "each choice has a state of its own"
    assert [TOKENIZER.id_to_token(i) for i in np.flatnonzero(make().allowed())] == ["{"]


def test_random_choices_within_a_constraint_make_json() -> None:
    rng = np.random.default_rng(0)
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}, "s": {"enum": ["x", "yy"]}},
        "required": ["n", "s"],
    }
    for _ in range(5):
        constraint, text = SCHEMAS.compile(schema | {"additionalProperties": False})(), ""
        while not constraint.finished:
            token = int(rng.choice(np.flatnonzero(constraint.allowed())))
            if token == END:
                break
            constraint.accept(token)
            text += TOKENIZER.decode([token])
        assert set(json.loads(text)) == {"n", "s"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nope"},
        {"$ref": "http://example.com/x"},
        {"type": "string", "pattern": "("},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"unevaluatedProperties": False},
        {"enum": ["x" * 70_000]},
    ],
)
def test_a_schema_that_cannot_be_followed_is_one_sentence(schema: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match=r"^The JSON schema .*\.$"):
        SCHEMAS.compile(schema)


def test_a_model_without_an_end_has_no_schemas() -> None:
    with pytest.raises(SchemaError, match="no end token"):
        Schemas(TOKENIZER, VOCAB, ()).compile(ANY_OBJECT)


def test_a_token_outside_the_schema_fails_its_own_constraint() -> None:
    make = SCHEMAS.compile(FLAG)
    with pytest.raises(SchemaError, match="any further"):
        make().accept(TOKENIZER.token_to_id("x"))
    assert make().allowed().any()
