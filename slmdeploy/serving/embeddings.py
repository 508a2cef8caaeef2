"""POST /v1/embeddings: the vector of each text, as numbers or as base64 of float32."""

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from slmdeploy.serving.encoders import EncoderService
from slmdeploy.serving.failures import refuse
from slmdeploy.serving.models_api import Identity
from slmdeploy.serving.openai_schemas import EmbeddingRequest
from slmdeploy.serving.responses import ERRORS, EmbeddingList


def routes(service: EncoderService, identity: Identity) -> APIRouter:
    """The routes of this file."""
    router = APIRouter(tags=["embeddings"])

    @router.post("/v1/embeddings", response_model=EmbeddingList, responses=ERRORS)
    async def embeddings(body: EmbeddingRequest, http: Request) -> JSONResponse:
        """The vector of each text, in the order of the texts."""
        identity.check(body.model)
        embedding = service.model.runtime.embedding
        assert embedding is not None, "only embedders have this endpoint"
        if body.dimensions not in (None, embedding.dimension):
            raise refuse("dimensions", f"The vectors of this model have {embedding.dimension} dimensions, no others.")
        front = service.front(body.prompt)
        texts = [front + text for text in body.texts]
        found, _, count = await service.run(http, texts, truncate=body.truncate, param="input")
        service.encoded(http)
        vectors = [_written(vector, body.encoding_format) for vector in found]
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": identity.name, "usage": usage})

    return router


def _written(vector: Any, form: str) -> str | list[float]:
    if form == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
