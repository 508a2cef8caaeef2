"""What goes wrong, in the form that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}.

One table says which HTTP status an error of the runtime has. Whatever is no error of ours is a bug, which observing.py
catches. Knows no endpoint.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from slmdeploy.errors import InputError, SlmdeployError
from slmdeploy.runtime.errors import DeadlineError, EngineStoppedError, QueueFullError, RequestCancelledError

RETRY_AFTER_S = 1
"""A slot frees with every answer, so a client that was turned away may soon come again."""
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "body_timeout", 413: "too_large"}
_STATUSES: tuple[tuple[type[SlmdeployError], int, str], ...] = (
    (QueueFullError, 429, "queue_full"),
    (EngineStoppedError, 503, "unavailable"),
    (DeadlineError, 504, "deadline_exceeded"),
    (RequestCancelledError, 503, "unavailable"),
    (InputError, 400, "invalid_value"),
)
_log = logging.getLogger("slmdeploy.serving")


class ApiError(Exception):
    """An answer other than the one that was asked for; `param` names the field of the request that it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status, "invalid_value")

    def body(self) -> dict[str, Any]:
        """The object that goes out."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """It as a response; one that may be repeated soon says when."""
        extra = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        extra |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse(self.body(), self.status, headers={**(headers or {}), **extra})


def refuse(param: str, message: str) -> ApiError:
    """A field of the request that cannot be used as given."""
    return ApiError(400, message, param=param)


def of_runtime(error: SlmdeployError) -> ApiError:
    """What a client is told of an error of the runtime; a damaged build or a lack of memory is no fault of its."""
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            return ApiError(status, str(error), code=code)
    _log.error("the model cannot answer: %s", error)
    return ApiError(500, "The model cannot answer; the server's log says why.", code="model_failed")


def of_validation(errors: list[Any]) -> ApiError:
    """The first thing that is wrong with a body, as one sentence; the rest would be read by nobody."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    match first["type"]:
        case "json_invalid":
            return ApiError(400, "The body is no JSON.", code="invalid_json")
        case "extra_forbidden":
            return ApiError(400, f"{where} is not supported by this server.", param=where, code="unsupported_parameter")
        case "missing":
            return ApiError(400, f"{where or 'The body'} is missing.", param=where or None, code="missing_parameter")
    reason = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{where or 'The body'}: {reason}.".replace("..", "."), param=where or None)


def install(app: FastAPI) -> None:
    """Give every kind of error its handler."""

    async def on_api(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_runtime(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, SlmdeployError)
        return of_runtime(error).response()

    async def on_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return of_validation(list(error.errors())).response()

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, f"{error.detail}.").response(error.headers)

    app.add_exception_handler(ApiError, on_api)
    app.add_exception_handler(SlmdeployError, on_runtime)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
