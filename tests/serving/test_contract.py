"""The OpenAPI document against the real server: schemathesis asks what the document allows and what it does not.

No answer may be a server error or have a form that the document does not say. A few examples by default; the slow run
asks for many.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from slmdeploy.runtime.model import load
from slmdeploy.serving.app import create_app
from slmdeploy.serving.settings import ServerSettings
from tests.serving.live import client, running

POSTS = ("/v1/completions", "/v1/chat/completions", "/score", "/rerank")


@pytest.fixture(scope="module")
def hasty(decoder: Path) -> Iterator[str]:
    """A server whose answers are short, whatever is asked for."""
    with running(create_app(load(decoder), ServerSettings(max_output_tokens=8))) as url:
        yield url


def ask(url: str, path: str, examples: int) -> None:
    """So many generated requests to one endpoint, each answer checked against the document."""
    schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = schema[path]["POST"]

    @given(case=operation.as_strategy())
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    def each(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body["model"] = "tiny"  # another one is a 404 that says nothing about the rest
        with client(url) as asking:
            answer = asking.post(path, content=json.dumps(case.body), headers={"Content-Type": "application/json"})
        check(schema, path, answer)

    each()


def check(schema: Any, path: str, answer: Any) -> None:
    """A status that the document has, never a server's fault, and for JSON the form that it says."""
    responses = schema.raw_schema["paths"][path]["post"]["responses"]
    assert answer.status_code < 500, answer.text
    assert str(answer.status_code) in responses
    if answer.headers["content-type"].startswith("application/json"):
        form = responses[str(answer.status_code)]["content"]["application/json"]["schema"]
        validator(schema.raw_schema, form).validate(answer.json())


def validator(document: dict[str, Any], form: dict[str, Any]) -> Any:
    """Of one schema of the document, with the others to refer to."""
    import jsonschema_rs

    return jsonschema_rs.validator_for({**form, "components": document["components"]})


@pytest.mark.parametrize("path", POSTS)
def test_generated_requests_get_what_the_document_says(hasty: str, path: str) -> None:
    ask(hasty, path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("path", POSTS)
def test_many_generated_requests_get_what_the_document_says(hasty: str, path: str) -> None:
    ask(hasty, path, 300)


@pytest.mark.parametrize(
    ("role", "path", "body"),
    [
        ("embed", "/v1/embeddings", {"model": "embed", "input": ["a"]}),
        ("classify", "/classify", {"input": ["a"]}),
        ("tokens", "/classify", {"input": ["a"]}),
        ("score", "/score", {"prefix": "a", "items": ["b"]}),
        ("score", "/rerank", {"query": "a", "documents": ["b"], "return_documents": True}),
    ],
)
def test_an_encoders_answers_have_the_documents_form(
    encoder_urls: dict[str, str], role: str, path: str, body: dict[str, Any]
) -> None:
    with client(encoder_urls[role]) as asking:
        document = asking.get("/openapi.json").json()
        answer = asking.post(path, json=body)
    form = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer.status_code == 200
    validator(document, form).validate(answer.json())
    assert validator(document, form).is_valid({"object": "nonsense"}) is False


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/score", "/rerank"])
def test_every_body_has_an_example_that_works(url: str, path: str) -> None:
    with client(url) as asking:
        document = asking.get("/openapi.json").json()
        name = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        (example,) = document["components"]["schemas"][name.rpartition("/")[2]]["examples"]
        answer = asking.post(path, json=example | ({"model": "tiny"} if "model" in example else {}))
    assert answer.status_code == 200, answer.text
