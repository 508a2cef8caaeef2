"""POST /score, /rerank and /classify: how well texts go with a query, and what they are.

Scores come from a decoder's engine or from a cross-encoder; both give a logit or a difference of two. /rerank sorts
them and turns them into probabilities.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from slmdeploy.runtime.encoder_model import label_of
from slmdeploy.serving.answers import Json, new_id
from slmdeploy.serving.encoders import EncoderService
from slmdeploy.serving.failures import refuse
from slmdeploy.serving.generator import Generator
from slmdeploy.serving.judging_schemas import ClassifyBody, RerankBody, ScoreBody
from slmdeploy.serving.models_api import Identity
from slmdeploy.serving.responses import ERRORS, LabelList, RerankList, ScoreList


class Scores(Protocol):
    """Scores of items against a query, and the tokens that were read."""

    async def __call__(
        self, http: Request, query: str, items: Sequence[str], *, truncate: bool, param: str
    ) -> tuple[list[float], int]: ...


def decoder_scores(generator: Generator) -> Scores:
    """Scores by a decoder's label words behind prefix and item; nothing is ever cut."""

    async def scores(
        http: Request, query: str, items: Sequence[str], *, truncate: bool, param: str
    ) -> tuple[list[float], int]:
        if truncate:
            raise refuse("truncate", "A decoder's prefix and items are not cut: shorten them.")
        if len(items) > generator.settings.max_items:
            most = generator.settings.max_items
            raise refuse(param, f"There are {len(items)} items, but this server takes at most {most} in one request.")
        found, usage = await generator.score(http, query, items)
        return found, usage["prompt_tokens"]

    return scores


def scoring_routes(scores: Scores, identity: Identity) -> APIRouter:
    """/score and /rerank."""
    router = APIRouter(tags=["scoring"])

    @router.post("/score", response_model=ScoreList, responses=ERRORS)
    async def score(body: ScoreBody, http: Request) -> JSONResponse:
        """How well each item goes behind the prefix: the logit of label 1 less that of label 0, or the only logit."""
        identity.check(body.model)
        found, count = await scores(http, body.prefix, body.items, truncate=body.truncate, param="items")
        around = {"id": new_id("score"), "object": "score", "model": identity.name, "scores": found}
        return JSONResponse(around | _usage(count))

    async def rerank(body: RerankBody, http: Request) -> JSONResponse:
        """The documents that go best with the query, best first; of equals the first."""
        identity.check(body.model)
        found, count = await scores(http, body.query, body.texts, truncate=body.truncate, param="documents")
        order = sorted(range(len(found)), key=lambda i: -found[i])[: body.top_n]
        results = [_result(i, found[i], body.texts[i] if body.return_documents else None) for i in order]
        return JSONResponse({"id": new_id("rerank"), "model": identity.name, "results": results} | _usage(count))

    for path in ("/rerank", "/v1/rerank"):
        router.post(path, response_model=RerankList, responses=ERRORS)(rerank)
    return router


def classifying_routes(service: EncoderService, identity: Identity) -> APIRouter:
    """/classify."""
    router = APIRouter(tags=["classification"])

    @router.post("/classify", response_model=LabelList, responses=ERRORS)
    async def classify(body: ClassifyBody, http: Request) -> JSONResponse:
        """The label of each text or pair, or of each token of a text where the model labels tokens."""
        identity.check(body.model)
        found, encodings, count = await service.run(http, body.texts, truncate=body.truncate, param="input")
        labels = service.model.runtime.labels
        assert labels is not None, "only classifiers have this endpoint"
        if labels.per_token:
            data = [
                {"index": i, "tokens": _tokens(service, encoding, rows)}
                for i, (encoding, rows) in enumerate(zip(encodings, found, strict=True))
            ]
        else:
            data = [{"index": i, **_label(service, logits)} for i, logits in enumerate(found)]
        service.encoded(http)
        around = {"id": new_id("classify"), "object": "list", "model": identity.name, "data": data}
        return JSONResponse(around | _usage(count))

    return router


def _usage(count: int) -> Json:
    return {"usage": {"prompt_tokens": count, "total_tokens": count}}


def _result(index: int, score: float, text: str | None) -> Json:
    return {"index": index, "relevance_score": sigmoid(score)} | ({} if text is None else {"document": {"text": text}})


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)) without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _label(service: EncoderService, logits: Any) -> Json:
    labels = service.model.runtime.labels
    assert labels is not None
    best = label_of(labels, logits)
    return {"label": best.label, "score": best.score, "scores": dict(zip(labels.names, best.scores, strict=True))}


def _tokens(service: EncoderService, encoding: Any, rows: Any) -> list[Json]:
    labels = service.model.runtime.labels
    assert labels is not None
    found = []
    for i, logits in enumerate(rows):
        if not encoding.special_tokens_mask[i]:
            best = label_of(labels, logits)
            start, end = encoding.offsets[i]
            found.append({"label": best.label, "score": best.score, "start": start, "end": end})
    return found
