"""The application: which endpoints a model has, what stands before them, and how its engine begins and ends.

`create_app` is the one thing that others need: `slmdeploy serve` runs it under uvicorn, Ray Serve mounts it, tests call
it. Opening the model's sessions takes seconds, so that happens beside the event loop after the start, and /ready says
503 until then. Knows no HTTP server.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from slmdeploy.runtime.encoder_model import EncoderModel
from slmdeploy.runtime.engine import Engine
from slmdeploy.runtime.model import Model
from slmdeploy.serving import completions, embeddings, failures, judging, models_api, page
from slmdeploy.serving.auth import KeyGuard
from slmdeploy.serving.bridge import EngineLike
from slmdeploy.serving.encoders import EncoderService
from slmdeploy.serving.failures import ApiError
from slmdeploy.serving.generator import Generator
from slmdeploy.serving.lifecycle import Gate, Lifecycle
from slmdeploy.serving.limits import BodyLimits
from slmdeploy.serving.metrics import OF_DECODER, OF_ENCODER, Figures
from slmdeploy.serving.models_api import Identity
from slmdeploy.serving.observing import Observed
from slmdeploy.serving.responses import HealthBody
from slmdeploy.serving.settings import ServerSettings
from slmdeploy.serving.tokens import TextThreads
from slmdeploy.version import __version__

ENDPOINTS = {
    "/v1/completions": "generate",
    "/v1/chat/completions": "generate",
    "/v1/embeddings": "embed",
    "/score": "score",
    "/rerank": "score",
    "/v1/rerank": "score",
    "/classify": "classify",
}
"""Every endpoint that a model may have, by the task that it takes."""
_log = logging.getLogger("slmdeploy.serving")


def create_app(
    model: Model | EncoderModel, settings: ServerSettings | None = None, *, engine: EngineLike | None = None
) -> FastAPI:
    """The server of a loaded model. `engine` takes the place of the model's own, for tests.

    `app.state.lifecycle` says where it stands and drains it; a model that cannot be opened leaves it broken and logs
    why.
    """
    settings = settings or ServerSettings()
    encodes = isinstance(model, EncoderModel)
    lifecycle, threads = Lifecycle(), TextThreads()
    figures = Figures(OF_ENCODER if encodes else OF_DECODER)
    identity = Identity(settings.model_name or model.path.resolve().name, model.tasks, model.runtime.max_length)
    backend: _Decoding | _Encoding
    if isinstance(model, EncoderModel):
        backend = _Encoding(EncoderService(model, settings, figures, threads), figures)
    else:
        backend = _Decoding(
            Generator(model, engine or Engine(model, settings.engine), settings, figures, threads), figures
        )
    app = FastAPI(
        title=f"slmdeploy: {identity.name}",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # the usual pages of FastAPI load scripts from elsewhere; page.py has one of its own
        redoc_url=None,
        lifespan=_lifespan(backend, lifecycle, threads),
        # Telemetry would take validation errors along, and in them what users wrote.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    failures.install(app)
    app.state.lifecycle = lifecycle
    figures.watch_ready(lambda: lifecycle.state == "ready")
    for router in (*backend.routers(identity), models_api.routes(identity), _probes(lifecycle, figures)):
        app.include_router(router)
    app.include_router(page.routes(app, identity, page.facts(identity, model, settings)))
    app.include_router(_absent(identity))
    # The last one added is the outermost.
    app.add_middleware(BodyLimits, most=settings.max_body_bytes, seconds=settings.body_s)
    app.add_middleware(Gate, lifecycle=lifecycle, most=settings.max_in_flight)
    if settings.api_keys:
        app.add_middleware(KeyGuard, keys=settings.api_keys)
    app.add_middleware(Observed, figures=figures, in_flight=lifecycle.count)
    return app


_DESCRIPTION = (
    "OpenAI's endpoints over one build: its Python client works unchanged. A field that would change an answer and is "
    "not supported is refused by name. Errors have OpenAI's form. 429 and 503 say when to try again."
)


class _Decoding:
    """What a decoder has: an engine, and the endpoints of its tasks."""

    def __init__(self, generator: Generator, figures: Figures) -> None:
        self._generator, self._figures = generator, figures

    def start(self) -> Callable[[], bool]:
        """Open it; what says whether it still computes."""
        engine = self._generator.engine
        engine.start()
        self._figures.watch_engine(engine.stats)
        return lambda: engine.stats().healthy

    def close(self) -> None:
        """End it."""
        self._generator.engine.close()

    def routers(self, identity: Identity) -> list[APIRouter]:
        """The endpoints of its tasks."""
        found = []
        if "generate" in identity.tasks:
            found.append(completions.routes(self._generator, identity))
        if "score" in identity.tasks:
            found.append(judging.scoring_routes(judging.decoder_scores(self._generator), identity))
        return found


class _Encoding:
    """What an encoder has: a thread that batches, and the endpoints of its tasks."""

    def __init__(self, service: EncoderService, figures: Figures) -> None:
        self._service, self._figures = service, figures

    def start(self) -> Callable[[], bool]:
        """Open it; what says whether it still computes."""
        batcher = self._service.batcher
        batcher.start()
        self._figures.watch_queue(lambda: batcher.queued, lambda: batcher.running)
        return lambda: batcher.healthy

    def close(self) -> None:
        """End it."""
        self._service.batcher.close()

    def routers(self, identity: Identity) -> list[APIRouter]:
        """The endpoints of its tasks."""
        found = []
        if "embed" in identity.tasks:
            found.append(embeddings.routes(self._service, identity))
        if "score" in identity.tasks:
            found.append(judging.scoring_routes(self._service.score, identity))
        if "classify" in identity.tasks:
            found.append(judging.classifying_routes(self._service, identity))
        return found


def _lifespan(
    backend: _Decoding | _Encoding, lifecycle: Lifecycle, threads: TextThreads
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    async def open_model() -> None:
        try:
            lifecycle.loaded(await asyncio.to_thread(backend.start))
        except Exception:
            _log.exception("the model cannot be opened")
            lifecycle.failed()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.create_task(open_model())
        try:
            yield
        finally:
            await opening  # a session that is being opened cannot be interrupted
            await asyncio.to_thread(backend.close)
            threads.close()

    return lifespan


def _probes(lifecycle: Lifecycle, figures: Figures) -> APIRouter:
    """Whether it lives, whether it takes requests, and its figures."""
    router = APIRouter(tags=["operation"])
    wrong: dict[int | str, dict[str, Any]] = {503: {"model": HealthBody, "description": "Not so."}}

    def told(well: bool) -> JSONResponse:
        return JSONResponse({"state": lifecycle.state}, 200 if well else 503)

    @router.get("/health", response_model=HealthBody, responses=wrong)
    async def health() -> JSONResponse:
        """200 while the process is of use: loading, ready or draining. 503 says to start it anew."""
        return told(lifecycle.state != "broken")

    @router.get("/ready", response_model=HealthBody, responses=wrong)
    async def ready() -> JSONResponse:
        """200 while new requests are taken."""
        return told(lifecycle.state == "ready")

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Figures in Prometheus's text form."""
        return PlainTextResponse(generate_latest(figures.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _absent(identity: Identity) -> APIRouter:
    """The endpoints that other models have: 404 with the reason rather than without."""
    router = APIRouter(include_in_schema=False)

    def refusal(path: str, task: str) -> Callable[[Request], Any]:
        async def absent(_: Request) -> JSONResponse:
            has = " and ".join(identity.tasks)
            raise ApiError(404, f"{path} needs a model made for {task}; {identity.name} was made for {has}.")

        return absent

    for path, task in ENDPOINTS.items():
        if task not in identity.tasks:
            router.add_api_route(path, refusal(path, task), methods=["POST"], response_model=None)
    return router
