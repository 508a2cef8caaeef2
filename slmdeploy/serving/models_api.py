"""GET /v1/models, and the check that a request means the model that is here."""

import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter

from slmdeploy.serving.failures import ApiError
from slmdeploy.serving.responses import ERRORS, ModelList, ModelObject


@dataclass(frozen=True)
class Identity:
    """What the served model is called and can do; `context` is in tokens."""

    name: str
    tasks: tuple[str, ...]
    context: int
    created: int = field(default_factory=lambda: int(time.time()))

    def check(self, asked: str | None) -> None:
        """ApiError for another name; None is this model."""
        if asked not in (None, self.name):
            raise ApiError(
                404,
                f"The model {(asked or '')[:80]!r} is not here: this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI lists it, and what else a client may want to know."""
        base = {"id": self.name, "object": "model", "created": self.created, "owned_by": "slmdeploy"}
        return base | {"tasks": list(self.tasks), "max_model_len": self.context}


def routes(identity: Identity) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", response_model=ModelList, responses=ERRORS)
    async def models() -> dict[str, Any]:
        """The one model of this server."""
        return {"object": "list", "data": [identity.to_dict()]}

    @router.get("/v1/models/{name:path}", response_model=ModelObject, responses=ERRORS)
    async def model(name: str) -> dict[str, Any]:
        """The model of this name."""
        identity.check(name)
        return identity.to_dict()

    return router
