"""Triton's model repository for graphs that need no loop: encoders, by the onnxruntime backend, token ids in.

A decoder that generates steps over a cache, which a backend for single graphs does not do, and its scoring graph shares
weights and tokens with that loop: neither gets a repository, and the server's README says so. The graph is copied,
because an artifact has no links. Names and types are read from the graph by ONNX Runtime. Knows nothing of tokens.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmdeploy.errors import InputError
from slmdeploy.packaging.edge import write_text
from slmdeploy.runtime.bundle import RuntimeConfig
from slmdeploy.runtime.encoder_config import EncoderConfig

GRAPH = "model.onnx"
MAX_BATCH = 32
_TYPES = {
    "tensor(int64)": "TYPE_INT64",
    "tensor(int32)": "TYPE_INT32",
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
}


@dataclass(frozen=True)
class Backend:
    """A backend of Triton and the names of what the graph puts out."""

    name: str
    outputs: tuple[str, ...]


def write(package: Path, repository: Path, config: RuntimeConfig | EncoderConfig) -> Backend | None:
    """Write the repository with the graph of ``package``; None where its model needs a loop or another engine."""
    if not isinstance(config, EncoderConfig) or config.engine != "onnxruntime":
        return None
    inputs, outputs = _ends(package / GRAPH)
    version = repository / "model" / "1"
    version.mkdir(parents=True)
    for file in sorted(package.glob(f"{GRAPH}*")):
        shutil.copyfile(file, version / file.name)
    write_text(repository / "model" / "config.pbtxt", config_text(inputs, outputs, config.threads))
    return Backend("onnxruntime", tuple(one.name for one in outputs))


def config_text(inputs: list[Any], outputs: list[Any], threads: int) -> str:
    """config.pbtxt for a graph with these ends, each with `name`, `type` and `shape` as ONNX Runtime tells them."""
    parts = [
        'name: "model"',
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH}",
        *(_end("input", one) for one in inputs),
        *(_end("output", one) for one in outputs),
        "dynamic_batching { max_queue_delay_microseconds: 1000 }",
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        *([f'parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{threads}" }} }}'] if threads else []),
    ]
    return "\n".join(parts) + "\n"


def _end(side: str, one: Any) -> str:
    """One input or output; Triton counts the dimension of the batch itself."""
    if one.type not in _TYPES:
        raise InputError(f"{GRAPH}: Triton's configuration has no type for {one.name}, which is {one.type}")
    sizes = ", ".join(str(size) if isinstance(size, int) else "-1" for size in one.shape[1:])
    # Without a dimension beside the batch's, one number a row is left.
    shape = f"dims: [ {sizes} ]" if sizes else "dims: [ 1 ] reshape { shape: [ ] }"
    return f'{side} [ {{ name: "{one.name}" data_type: {_TYPES[one.type]} {shape} }} ]'


def _ends(graph: Path) -> tuple[list[Any], list[Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return session.get_inputs(), session.get_outputs()
