"""The shapes that a plan is compiled for: one optimisation profile for each phase of a workload.

A compiler chooses its kernels for the most likely shape of a phase and takes all from the least to the largest. Prompts
begin with an empty past; steps are one token behind a past of any length, zero among them. A static cache has one
length, which the compiler wants as a number, so the plan fixes it. Knows nothing of TensorRT.
"""

from collections.abc import Mapping

import onnx_ir as ir

from slmdeploy.errors import InputError
from slmdeploy.runtime.bundle import RuntimeConfig
from slmdeploy.runtime.session import kv_names
from slmdeploy.runtime.tensorrt_plan import Phase
from slmdeploy.specs import Workload

CAPACITY = "capacity"
"""The name of the dimension of a static cache that a plan makes a number."""
_PROMPT, _NEW = 128, 64
"""Tokens that a request is taken to have where no workload says otherwise."""
Shape = tuple[int, ...]


def phases_of(config: RuntimeConfig, workload: Workload | None) -> tuple[Phase, ...]:
    """The phases of a decoder under a workload, or under a usual one where it is None.

    Raises InputError for a workload of another task than the model's, or one that does not fit its context.
    """
    if workload is not None and workload.task not in config.tasks:
        raise InputError(f"workload {workload.name!r} is of the task {workload.task}, and the graph has none such")
    prompt, new = _lengths(workload)
    if workload is not None and prompt + new > config.max_length:
        raise InputError(f"workload {workload.name!r} takes {prompt + new} tokens of {config.max_length} in context")
    prompt = min(prompt, config.max_length)
    if config.interface == "static":
        return _static(config, prompt)
    middle = min(prompt + new // 2, config.max_length - 1)
    return (
        Phase("prefill", _decoder(config, [(1, 0), (prompt, 0), (config.max_length, 0)])),
        Phase("decode", _decoder(config, [(1, 0), (1, middle), (1, config.max_length - 1)])),
    )


def _lengths(workload: Workload | None) -> tuple[int, int]:
    """Prompt and new tokens; a workload of recorded requests has none of its own."""
    if workload is None:
        return _PROMPT, _NEW
    return workload.prompt_tokens or _PROMPT, workload.new_tokens or _NEW


def _decoder(config: RuntimeConfig, points: list[tuple[int, int]]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Shapes of the standard interface at three points of (new tokens, tokens in the past), one sequence at a time."""
    found: dict[str, list[Shape]] = {
        "input_ids": [(1, new) for new, _ in points],
        "attention_mask": [(1, new + past) for new, past in points],
        "position_ids": [(1, new) for new, _ in points],
    }
    for name, heads in _caches(config):
        found[name] = [(1, heads, past, config.head_dim) for _, past in points]
    return _triples(found)


def _static(config: RuntimeConfig, prompt: int) -> tuple[Phase, ...]:
    """Phases over a cache whose length is the whole context."""

    def shapes(lengths: list[int]) -> dict[str, tuple[Shape, Shape, Shape]]:
        tokens: list[Shape] = [(1, length) for length in lengths]
        found: dict[str, list[Shape]] = {"input_ids": tokens, "cache_lengths": [(1,)] * 3, "position_ids": tokens}
        for name, heads in _caches(config):
            found[name] = [(1, heads, config.max_length, config.head_dim)] * 3
        return _triples(found)

    return Phase("prefill", shapes([1, prompt, config.max_length])), Phase("decode", shapes([1, 1, 1]))


def _caches(config: RuntimeConfig) -> list[tuple[str, int]]:
    heads = [heads for heads in config.kv_heads for _ in range(2)]
    return list(zip(kv_names(config.layers)[0], heads, strict=True))


def _triples(found: Mapping[str, list[Shape]]) -> dict[str, tuple[Shape, Shape, Shape]]:
    return {name: (least, likely, most) for name, (least, likely, most) in found.items()}


def taken_by(phase: Phase, model: ir.Model) -> Phase:
    """The phase with the shapes of the inputs that the graph has; a graph without positions has none for them."""
    names = {value.name for value in model.graph.inputs}
    return Phase(phase.name, {name: shapes for name, shapes in phase.shapes.items() if name in names})


def fix_capacity(model: ir.Model, capacity: int) -> None:
    """Make a static cache's length a number throughout the graph, in place."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([capacity if str(size) == CAPACITY else size for size in value.shape])
