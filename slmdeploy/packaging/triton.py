"""Triton's model repository: an encoder's graph by the onnxruntime backend, a decoder's tasks by the python backend.

A decoder steps over a cache, which a backend for single graphs does not do, so its models are classes of
scaling/triton_python.py over the package around them, texts in. An encoder takes token ids; its graph is copied,
because an artifact has no links, and names and types are read from it by ONNX Runtime. Encoders of other engines get no
repository. Knows nothing of tokens.
"""

import shutil
from collections.abc import Mapping
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


_FIXED = "dims: [ 1 ]"
_MANY = "dims: [ -1 ]"


@dataclass(frozen=True)
class Task:
    """A decoder's task as a model: the class of scaling/triton_python.py, its ends with their types, and whether one
    request has many responses. required: inputs that may not be left out; lists: ends of any number of elements.
    """

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    required: tuple[str, ...]
    lists: tuple[str, ...]
    decoupled: bool


TASKS = {
    "generate": Task(
        "Generating",
        {
            "text_input": "TYPE_STRING",
            "max_tokens": "TYPE_INT32",
            "temperature": "TYPE_FP32",
            "top_k": "TYPE_INT32",
            "top_p": "TYPE_FP32",
            "seed": "TYPE_INT64",
            "stop": "TYPE_STRING",
            "stream": "TYPE_BOOL",
        },
        {"text_output": "TYPE_STRING", "finish_reason": "TYPE_STRING"},
        required=("text_input",),
        lists=("stop",),
        decoupled=True,
    ),
    "score": Task(
        "Scoring",
        {"prefix": "TYPE_STRING", "items": "TYPE_STRING"},
        {"scores": "TYPE_FP32"},
        required=("prefix", "items"),
        lists=("items", "scores"),
        decoupled=False,
    ),
}

_MODEL = '''"""Opened by Triton's python backend: the task {task} of the package around this folder."""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[4]
# The folder stays as the manifest lists it, and may be read-only.
sys.dont_write_bytecode = True
sys.path.insert(0, str(PACKAGE / "server"))

import triton_python_backend_utils  # noqa: E402

from slmdeploy.scaling.triton_python import {model}  # noqa: E402


class TritonPythonModel({model}):
    """What Triton looks for here."""

    package = PACKAGE
    utils = triton_python_backend_utils
'''


@dataclass(frozen=True)
class Repository:
    """What was written: the backend of Triton, its models, and the names of what each puts out."""

    backend: str
    outputs: Mapping[str, tuple[str, ...]]


def write(package: Path, repository: Path, config: RuntimeConfig | EncoderConfig) -> Repository | None:
    """Write the repository for ``package``; None for an encoder of another engine than ONNX Runtime."""
    if isinstance(config, RuntimeConfig):
        return Repository("python", {name: _write_task(repository / name, name) for name in config.tasks})
    if config.engine != "onnxruntime":
        return None
    inputs, outputs = _ends(package / GRAPH)
    version = repository / "model" / "1"
    version.mkdir(parents=True)
    for file in sorted(package.glob(f"{GRAPH}*")):
        shutil.copyfile(file, version / file.name)
    write_text(repository / "model" / "config.pbtxt", config_text(inputs, outputs, config.threads))
    return Repository("onnxruntime", {"model": tuple(one.name for one in outputs)})


def _write_task(folder: Path, name: str) -> tuple[str, ...]:
    task = TASKS[name]
    (folder / "1").mkdir(parents=True)
    write_text(folder / "1" / "model.py", _MODEL.format(task=name, model=task.model))
    write_text(folder / "config.pbtxt", task_text(name, task))
    return tuple(task.outputs)


def task_text(name: str, task: Task) -> str:
    """config.pbtxt of a decoder's task; max_batch_size 0 because the engine batches, not Triton."""
    parts = [f'name: "{name}"', 'backend: "python"', "max_batch_size: 0"]
    for side, ends in (("input", task.inputs), ("output", task.outputs)):
        for end, kind in ends.items():
            optional = " optional: true" if side == "input" and end not in task.required else ""
            dims = _MANY if end in task.lists else _FIXED
            parts.append(f'{side} [ {{ name: "{end}" data_type: {kind} {dims}{optional} }} ]')
    if task.decoupled:
        parts.append("model_transaction_policy { decoupled: true }")
    return "\n".join([*parts, "instance_group [ { count: 1 kind: KIND_CPU } ]"]) + "\n"


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
