"""The servers of the comparison as a table: which model folder each serves, from which environment, by which command.

Folders and environments are those of benchmarks/peers, so a model is converted once for both comparisons. A new server
is a row here. Knows nothing of load.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.catalogue import PEERS, Peer, our_peers

Command = Callable[[Path, Path, int, int], list[str]]
"""Interpreter, model folder, port and threads → the command."""
_SLOTS = "8"


@dataclass(frozen=True)
class ServerRow:
    """One row. prompts: whether it takes ids of tokens, or text, of which a letter is a token. more: what a
    generation's body needs besides (live_http.py), so that exactly the tokens that were asked for come. scoring: how
    items behind a prefix are asked for, by /score or as one completion each. threads: of the engine, None for all.
    takes_paths: its models are named by their folders, which /v1/models does not tell. distributions: whose versions
    stand beside its figures.
    """

    name: str
    peer: str
    command: Command
    note: str
    distributions: tuple[str, ...]
    prompts: str = "ids"
    more: Mapping[str, Any] = field(default_factory=dict)
    scoring: str = "completions"
    threads: int | None = None
    installs: tuple[str, ...] = ()
    takes_paths: bool = False
    is_ours: bool = False


def checkpoint_beside(folder: Path) -> Path:
    """The checkpoint that an engine's folder was made of."""
    return folder.parent / "checkpoint"


def _ours(python: Path, folder: Path, port: int, threads: int) -> list[str]:
    limits = ["--slots", _SLOTS, "--max-queued", "1024", "--threads", str(threads)]
    return [str(python), "-m", "slmdeploy", "serve", str(folder), "--port", str(port), *limits]


def _llamacpp(python: Path, folder: Path, port: int, threads: int) -> list[str]:
    # A new request would otherwise break off the one that is under way.
    options = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": 4096, "interrupt_requests": "false"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    model = str(folder / "model.gguf")
    return [
        str(python),
        "-m",
        "llama_cpp.server",
        "--model",
        model,
        "--port",
        str(port),
        "--flash_attn",
        "true",
        *words,
    ]


def _transformers(python: Path, folder: Path, port: int, threads: int) -> list[str]:
    start = "from transformers.cli.transformers import main; main()"
    options = ["--port", str(port), "--device", "cpu", "--dtype", "bfloat16"]
    return [str(python), "-c", start, "serve", str(checkpoint_beside(folder)), *options]


def _transformers_batching(python: Path, folder: Path, port: int, threads: int) -> list[str]:
    # Its default is to take nine tenths of the machine's memory for keys and values.
    limits = ["--cb-num-blocks", "512", "--cb-max-batch-tokens", "512"]
    return [*_transformers(python, folder, port, threads), "--continuous-batching", *limits]


def _openvino(python: Path, folder: Path, port: int, threads: int) -> list[str]:
    module = "benchmarks.servers.openvino_server"
    return [str(python), "-m", module, str(folder), "--port", str(port), "--threads", str(threads)]


_ORT, _LLAMA, _TORCH = ("onnxruntime",), ("llama-cpp-python",), ("transformers", "torch")
_OURS = {"ignore_eos": True, "stream_options": {"include_usage": True}}
_NO_END = {"logit_bias": {"1": -100.0}, "logit_bias_type": "input_ids"}
"""llama-cpp-python has no ignore_eos: the end token, of id 1, is made impossible."""

SERVERS = (
    ServerRow("slmdeploy cpu-int4-split", "slmdeploy cpu-int4-split", _ours, "continuous batching, 8 slots", _ORT,
              more=_OURS, scoring="score", is_ours=True),
    ServerRow("slmdeploy cpu-int8", "slmdeploy cpu-int8", _ours, "continuous batching, 8 slots", _ORT,
              more=_OURS, scoring="score", is_ours=True),
    ServerRow("slmdeploy cpu-int8, 1 thread", "slmdeploy cpu-int8", _ours,
              "the engine leaves a core to HTTP and the client", _ORT, more=_OURS, scoring="score", threads=1,
              is_ours=True),
    ServerRow("slmdeploy openvino-int8", "slmdeploy openvino-int8", _ours, "continuous batching over pages, 8 slots",
              ("openvino",), more=_OURS, scoring="score", is_ours=True),
    ServerRow("llama-cpp-python q4_0", "llamacpp-q4_0", _llamacpp, "one request at a time, prefix of the last one kept",
              _LLAMA, "text", _NO_END, installs=("uvicorn", "fastapi", "pydantic-settings", "sse-starlette",
                                         "starlette-context<0.4")),
    ServerRow("llama-cpp-python q8_0", "llamacpp-q8_0", _llamacpp, "one request at a time, prefix of the last one kept",
              _LLAMA, "text", _NO_END, installs=("uvicorn", "fastapi", "pydantic-settings", "sse-starlette",
                                         "starlette-context<0.4")),
    ServerRow("transformers serve", "torch-bf16", _transformers, "bfloat16, one request at a time", _TORCH, "text",
              takes_paths=True),
    ServerRow("transformers serve, batching", "torch-bf16", _transformers_batching,
              "bfloat16, paged continuous batching", _TORCH, "text", takes_paths=True),
    ServerRow("openvino-genai int8", "openvino-genai-int8", _openvino,
              "its continuous-batching pipeline behind a small HTTP face of ours", ("openvino-genai",)),
    ServerRow("openvino-genai int4", "openvino-genai-int4", _openvino,
              "its continuous-batching pipeline behind a small HTTP face of ours", ("openvino-genai",)),
)  # fmt: skip


BEST = ("slmdeploy cpu-int4-split", "llama-cpp-python q4_0", "transformers serve", "openvino-genai int4")
"""One row of each product, the fastest in docs/performance.md: what is compared unless told otherwise."""


def peer_of(row: ServerRow) -> Peer:
    """The engine whose folder and environment a server has."""
    return next(peer for peer in (*our_peers(), *PEERS) if peer.name == row.peer)
