"""The page at / for trying the model, and the reference at /docs: files of this folder, nothing from elsewhere.

Both are plain HTML, CSS and JavaScript under a policy that lets nothing else run or be reached. The page asks the same
endpoints as any client and measures what it sees; the reference is drawn from the OpenAPI document. Knows no engine.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slmdeploy.metrics import LATENCIES
from slmdeploy.runtime.encoder_model import EncoderModel
from slmdeploy.runtime.model import Model
from slmdeploy.serving.models_api import Identity
from slmdeploy.serving.settings import ServerSettings
from slmdeploy.specs import parse_constraint

_HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_METHODS = ("get", "post")


def facts(identity: Identity, model: Model | EncoderModel, settings: ServerSettings) -> dict[str, Any]:
    """What the page has to know: the model, what it can do, and the limits that latencies are held against."""
    limits = [parse_constraint(text) for text in settings.budget]
    shown = [limit for limit in limits if limit.metric.rpartition("_")[0] in LATENCIES and limit.operator == "<="]
    return {
        "model": identity.name,
        "tasks": list(identity.tasks),
        "chat": isinstance(model, Model) and _has_chat(model),
        "max_tokens": min(settings.max_output_tokens, identity.context),
        "needs_key": bool(settings.api_keys),
        "budget": [{"metric": limit.metric, "limit": limit.limit} for limit in shown],
    }


def _has_chat(model: Model) -> bool:
    config = model.path / "tokenizer_config.json"
    return (model.path / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    )


def routes(app: FastAPI, identity: Identity, told: dict[str, Any]) -> APIRouter:
    """The routes of this file; `told` are the page's facts."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        """Try the model."""
        return HTMLResponse(_drawn("page.html", model=identity.name), headers=HEADERS)

    @router.get("/docs")
    async def reference() -> Response:
        """Every endpoint with an example."""
        document = app.openapi()
        return HTMLResponse(
            _drawn("reference.html", document=document, operations=_operations(document, identity.name)),
            headers=HEADERS,
        )

    @router.get("/page.json")
    async def page_facts() -> Response:
        """What the page has to know."""
        return JSONResponse(told, headers=HEADERS)

    def text_file(name: str, kind: str) -> None:
        text = (_HERE / name).read_text(encoding="utf-8")

        async def give() -> Response:
            return Response(text, media_type=kind, headers=HEADERS)

        router.add_api_route(f"/{name}", give, methods=["GET"], response_model=None)

    text_file("page.css", "text/css")
    text_file("page.js", "text/javascript")
    return router


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _drawn(template: str, **context: Any) -> str:
    return _templates().get_template(template).render(**context)


def _operations(document: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """Every operation as the reference shows it: what it does, an example to paste, its fields and its errors."""
    schemas = document.get("components", {}).get("schemas", {})
    found = []
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method in item:
                body = _body(item[method], schemas)
                example = json.dumps(body.get("examples", [None])[0], indent=2).replace('"MODEL"', json.dumps(model))
                found.append(
                    {
                        "method": method.upper(),
                        "path": path,
                        "about": item[method].get("description", ""),
                        "example": example if body.get("examples") else None,
                        "fields": _fields(body),
                        "errors": [
                            {"status": status, "about": answer["description"]}
                            for status, answer in item[method]["responses"].items()
                            if status >= "4" and status != "422"
                        ],
                    }
                )
    return found


def _body(operation: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema of an operation's body; empty for one without."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = schemas.get(name, {})
    return found


def _fields(body: dict[str, Any]) -> list[dict[str, str]]:
    required = body.get("required", [])
    return [
        {
            "name": name,
            "need": "required" if name in required else "",
            "about": schema.get("description", ""),
        }
        for name, schema in body.get("properties", {}).items()
    ]
