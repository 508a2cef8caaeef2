"""A small scripted server with OpenAI's endpoints: what it answers is said by the test, not by a model."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors

TOKEN = {"choices": [{"index": 0, "text": "x", "finish_reason": None}]}
END = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}


def tokens(count: int) -> list[bytes]:
    """A stream of one event for each of so many tokens, then the end, the usage and [DONE]."""
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": count}}
    return [*(line(one) for one in [*[TOKEN] * count, END, usage]), b"data: [DONE]\n\n"]


def line(value: Any) -> bytes:
    """One event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@dataclass
class Script:
    """What the server says. events: the stream of a completion, None for one token each as asked; reply: what every
    other endpoint says; status: of all but /v1/models, for requests from number `status_from` on."""

    events: list[bytes] | None = None
    reply: bytes = b"{}"
    status: int = 200
    status_from: int = 0
    key: str | None = None
    hang: threading.Event | None = None
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """The address of a server that follows a script, on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            if script.key is not None and self.headers.get("Authorization") != f"Bearer {script.key}":
                return self._say(401, b'{"error": {"message": "a key is needed"}}')
            return self._say(200, b'{"data": [{"id": "tiny"}]}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.seen.append((self.path, body))
            if script.hang is not None:
                script.hang.wait(30)
            if script.status != 200 and len(script.seen) > script.status_from:
                return self._say(script.status, b'{"error": {"message": "too many\\u001b[31m requests"}}')
            if self.path != "/v1/completions":
                return self._say(200, script.reply)
            events = tokens(body["max_tokens"]) if script.events is None else script.events
            return self._say(200, b"".join(events), "text/event-stream")

        def _say(self, status: int, data: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        if script.hang is not None:
            script.hang.set()
        server.shutdown()
        thread.join()
        server.server_close()


def word_tokenizer(folder: Path) -> Path:
    """`folder`, in which a tokenizer now has a few whole words and puts one special token in front of a text."""
    words = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "Ġb", "Ġab", "Ġc"]
    merges = [("Ġ", "a"), ("Ġ", "b"), ("Ġa", "b"), ("Ġ", "c")]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
