"""OpenVINO GenAI's continuous-batching pipeline behind the least HTTP that the comparison needs.

    ENV/bin/python -m benchmarks.servers.openvino_server FOLDER --port 8000 --threads 2

No server of OpenVINO installs from a package index, so its own scheduler gets this face: POST /v1/completions with ids
of tokens, streamed, and GET /v1/models. One thread steps the pipeline, one a request waits for tokens. Text is never
made: an event says "x". Imports the standard library, numpy and openvino alone.
"""

import argparse
import json
import queue
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

_CACHE_GB = 2


class Engine:
    """The pipeline and the requests under way; tokens go into a queue of each, None at the end."""

    def __init__(self, folder: Path, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = _CACHE_GB, True
        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", settings)
        self._waiting: queue.SimpleQueue[tuple[list[int], int, queue.SimpleQueue[int | None]]] = queue.SimpleQueue()
        self._under_way: dict[int, tuple[Any, queue.SimpleQueue[int | None]]] = {}
        self._number = 0
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, ids: list[int], count: int) -> "queue.SimpleQueue[int | None]":
        """Ask for so many tokens behind a prompt."""
        tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._waiting.put((ids, count, tokens))
        return tokens

    def _run(self) -> None:
        while True:
            if not self._under_way:
                self._add(*self._waiting.get())
            while not self._waiting.empty():
                self._add(*self._waiting.get())
            self._pipeline.step()
            for number, (handle, tokens) in list(self._under_way.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            tokens.put(token)
                if handle.get_status() != openvino_genai.GenerationStatus.RUNNING and not handle.can_read():
                    tokens.put(None)
                    del self._under_way[number]

    def _add(self, ids: list[int], count: int, tokens: "queue.SimpleQueue[int | None]") -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample = True, False
        self._number += 1
        tensor = openvino.Tensor(np.array([ids], np.int64))
        self._under_way[self._number] = self._pipeline.add_request(self._number, tensor, config), tokens


class Handler(BaseHTTPRequestHandler):
    """The two endpoints."""

    engine: Engine

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """The model's name."""
        self._begin("application/json")
        self.wfile.write(b'{"data": [{"id": "openvino"}]}')

    def do_POST(self) -> None:
        """A completion, an event a token."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = self.engine.submit(body["prompt"], body["max_tokens"])
        self._begin("text/event-stream")
        while tokens.get() is not None:
            self._event({"choices": [{"index": 0, "text": "x", "finish_reason": None}]})
        self._event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")


def main() -> None:
    """Serve a folder until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    Handler.engine = Engine(options.folder, options.threads)
    ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
