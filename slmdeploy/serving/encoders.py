"""The encoder behind the endpoints that give vectors, labels and scores: texts of several requests run together.

A thread of its own takes whatever waits, up to a batch's texts, and runs it at once: alone a request waits for nobody,
under load texts of like length share batches (encoding.py sorts them). Tokens are counted and lengths checked before a
request may wait. Knows no route.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fastapi import Request as HttpRequest
from tokenizers import Encoding

from slmdeploy.errors import InputError, SlmdeployError
from slmdeploy.runtime.encoder_model import EncoderModel
from slmdeploy.runtime.encoding import Floats, Row, RowCodec, Text, row_of
from slmdeploy.runtime.errors import DeadlineError, EngineStoppedError, QueueFullError
from slmdeploy.serving.bridge import unless_gone
from slmdeploy.serving.failures import ApiError, refuse
from slmdeploy.serving.metrics import Figures
from slmdeploy.serving.observing import note
from slmdeploy.serving.settings import ServerSettings
from slmdeploy.serving.tokens import TextThreads

BATCH_TEXTS = 64
"""Texts taken at once: the encoder cuts them into batches itself, and a request that comes meanwhile waits for them."""


@dataclass
class _Job:
    """The rows of one request, and who waits for them."""

    rows: list[Row]
    deadline: float
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[list[Floats]]"
    arrived: float = field(default_factory=time.monotonic)

    def finish(self, found: list[Floats] | SlmdeployError) -> None:
        """Hand the result to the event loop, if that still runs and anybody waits."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._set, found)

    def _set(self, found: list[Floats] | SlmdeployError) -> None:
        if self.done.done():
            return
        if isinstance(found, SlmdeployError):
            self.done.set_exception(found)
        else:
            self.done.set_result(found)


class MicroBatcher:
    """One thread that runs what waits together. `output` names what the graph gives for each row."""

    def __init__(self, model: EncoderModel, output: str, max_waiting: int, figures: Figures) -> None:
        self._model, self._output, self._max_waiting, self._figures = model, output, max_waiting, figures
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._running = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="slmdeploy-encoder", daemon=True)

    def start(self) -> None:
        """Open the graph, which may raise CorruptArtifactError, and begin."""
        assert self._model.encoder is not None
        self._thread.start()

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests in the batch that runs."""
        return self._running

    @property
    def healthy(self) -> bool:
        """Whether its thread lives."""
        return self._thread.is_alive()

    async def run(self, rows: list[Row], deadline: float) -> list[Floats]:
        """The output of each row until ``deadline`` (time.monotonic).

        Raises QueueFullError, DeadlineError, or what the encoder raised.
        """
        loop = asyncio.get_running_loop()
        job = _Job(rows, deadline, loop, loop.create_future())
        with self._changed:
            if self._stopping:
                raise EngineStoppedError("The server is stopping and takes no new requests.")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests are waiting, as many as may: try again later.")
            self._waiting.append(job)
            self._changed.notify()
        return await job.done

    def close(self) -> None:
        """Finish what waits and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            self._running = len(batch)
            self._answer(batch)
            self._running = 0

    def _next(self) -> list[_Job]:
        """The jobs to run together, at least one; none at the end."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            batch: list[_Job] = []
            texts = 0
            while self._waiting and (not batch or texts + len(self._waiting[0].rows) <= BATCH_TEXTS):
                batch.append(self._waiting.popleft())
                texts += len(batch[-1].rows)
        return batch

    def _answer(self, batch: list[_Job]) -> None:
        now = time.monotonic()
        alive = [job for job in batch if not job.done.cancelled() and job.deadline > now]
        for job in batch:
            self._figures.latency("queue_ms", 1e3 * (now - job.arrived))
            if job.deadline <= now:
                job.finish(DeadlineError("The request waited longer than this server works on one."))
        if alive:
            self._compute(alive)

    def _compute(self, jobs: list[_Job]) -> None:
        try:
            found = self._model.encoder.rows([row for job in jobs for row in job.rows], self._output)
        except SlmdeployError as error:
            self._apart(jobs, error)
            return
        except Exception as error:  # a native failure: these requests fail, the thread goes on
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._apart(jobs, EngineStoppedError(f"The encoder failed ({reason})."))
            return
        for job in jobs:
            job.finish(found[: len(job.rows)])
            found = found[len(job.rows) :]

    def _apart(self, jobs: list[_Job], error: SlmdeployError) -> None:
        """One request's rows must not fail another's: of several, each gets a run of its own."""
        if len(jobs) == 1:
            jobs[0].finish(error)
            return
        for job in jobs:
            self._compute([job])


class EncoderService:
    """One encoder and what stands between it and HTTP."""

    def __init__(self, model: EncoderModel, settings: ServerSettings, figures: Figures, threads: TextThreads) -> None:
        self.model, self.settings, self._figures, self._threads = model, settings, figures, threads
        self._codec = RowCodec(model.tokenizer, model.runtime)
        output = "sentence_embedding" if model.runtime.embedding else "logits"
        self.batcher = MicroBatcher(model, output, settings.engine.max_waiting, figures)

    async def run(
        self, http: HttpRequest, texts: Sequence[Text], *, truncate: bool, param: str
    ) -> tuple[list[Floats], list[Encoding], int]:
        """What the graph gives for each text, the texts' tokens, and how many those are.

        Raises ApiError for more texts than the server takes, and for one that is too long unless it may be cut.
        """
        if len(texts) > self.settings.max_items:
            most = self.settings.max_items
            raise refuse(param, f"There are {len(texts)} texts, but this server takes at most {most} in one request.")
        encodings = await self._threads.run(self._codec.encodings, texts)
        if not truncate:
            self._check_lengths(encodings, param)
        rows = [row_of(encoding) for encoding in encodings]
        count = sum(len(row.ids) for row in rows)
        note(http, {"prompt_tokens": count, "texts": len(texts)})
        found = await unless_gone(http, self.batcher.run(rows, http.state.arrived + self.settings.deadline_s))
        return found, encodings, count

    def _check_lengths(self, encodings: Sequence[Encoding], param: str) -> None:
        for index, encoding in enumerate(encodings):
            if encoding.overflowing:
                raise ApiError(
                    400,
                    f"Text {index} has more than the {self.model.runtime.max_length} tokens that this model reads: "
                    "shorten it, or send truncate: true to have it cut.",
                    param=param,
                    code="context_length_exceeded",
                )

    async def score(
        self, http: HttpRequest, query: str, items: Sequence[str], *, truncate: bool, param: str
    ) -> tuple[list[float], int]:
        """How well each item goes with the query, and the tokens of all pairs."""
        pairs = [(query, item) for item in items]
        found, _, count = await self.run(http, pairs, truncate=truncate, param=param)
        self._figures.latency("score_ms", 1e3 * (time.monotonic() - http.state.arrived))
        return [float(row[-1] - (row[0] if row.size == 2 else 0)) for row in found], count

    def front(self, prompt: str | None) -> str:
        """The text that an embedder's prompt of this name puts in front; its default one for None."""
        embedding = self.model.runtime.embedding
        assert embedding is not None, "only embedders have this endpoint"
        name = embedding.default_prompt if prompt is None else prompt
        if name is None:
            return ""
        if name not in embedding.prompts:
            known = ", ".join(embedding.prompts) or "none"
            raise InputError(f"The model has no prompt named {name[:80]!r}; it has: {known}.")
        return embedding.prompts[name]

    def encoded(self, http: HttpRequest) -> None:
        """A request for vectors or labels is answered: its time counts."""
        self._figures.latency("encode_ms", 1e3 * (time.monotonic() - http.state.arrived))
