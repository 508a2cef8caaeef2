"""The shapes that a plan is compiled for: one optimisation profile for each phase of a workload.

A compiler chooses its kernels for the most likely shape of a phase and takes all from the least to the largest. Prompts
begin with an empty past; steps are one token behind a past of any length, zero among them. A static cache has one
length, which the compiler wants as a number, so the plan fixes it. A scorer runs a
prefix and then items behind it; an encoder has one phase, of batches of texts.
Knows nothing of TensorRT.
"""

from collections.abc import Mapping

import onnx_ir as ir

from slmdeploy.errors import InputError
from slmdeploy.runtime.blocks import lay_out, slots_for
from slmdeploy.runtime.bundle import RuntimeConfig
from slmdeploy.runtime.encoder_config import EncoderConfig
from slmdeploy.runtime.scoring import RUN_TOKENS
from slmdeploy.runtime.session import kv_names
from slmdeploy.runtime.tensorrt_plan import Phase
from slmdeploy.specs import Workload

CAPACITY = "capacity"
"""The name of the dimension of a static cache that a plan makes a number."""
_PROMPT, _NEW = 128, 64
"""Tokens that a request is taken to have where no workload says otherwise."""
_SCORED = (512, 32, 16)
"""The same of a scorer: tokens of the prefix, items, and tokens of each."""
_MOST_BLOCKS = 64
"""Blocks of the largest scoring run: more than runtime/blocks.py makes of 512 tokens in blocks of 24 places."""
_TEXTS, _TEXT_TOKENS = 8, 128
"""The same of an encoder's requests."""
MOST_ROWS = 32
"""Texts in the largest batch of an encoder's plan, unless its workload has more: memory is planned for that many of the
longest."""
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


def score_phases(config: RuntimeConfig, workload: Workload | None) -> tuple[Phase, ...]:
    """The phases of a scoring graph: runs of the prefix, and of items behind it with what is new of the prefix.

    Runs have the sizes that runtime/scoring.py gives them; an item longer than RUN_TOKENS has no place in a plan.
    Raises InputError for a workload of another task, or one that does not fit the context.
    """
    if workload is not None and workload.task != "score":
        raise InputError(f"workload {workload.name!r} is of the task {workload.task}, and the graph has none such")
    prefix, count, item = _request(workload)
    if workload is not None and prefix + item > config.max_length:
        raise InputError(f"workload {workload.name!r} takes {prefix + item} tokens of {config.max_length} in context")
    prefix = min(prefix, config.max_length - 1)
    item = min(item, config.max_length - prefix, RUN_TOKENS)
    together = max(1, min(count, RUN_TOKENS // item))
    return (
        Phase("prefix", _scoring(config, 0, min(prefix, RUN_TOKENS), 0, [])),
        Phase("items", _scoring(config, prefix, 0, together, [item] * together)),
    )


def _request(workload: Workload | None) -> tuple[int, int, int]:
    """Tokens of the prefix, items, and tokens of each."""
    if workload is None:
        return _SCORED
    prefix, count, item = _SCORED
    return workload.prefix_tokens or prefix, workload.items or count, workload.item_tokens or item


def _scoring(
    config: RuntimeConfig, past: int, prefix: int, rows: int, sizes: list[int]
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The least run, this likely one, and the largest: a run of the rest of the prefix and of items."""
    layout = lay_out(past, prefix, sizes, slots_for(past + prefix, prefix, sizes))
    tokens, most = prefix + sum(sizes), min(2 * RUN_TOKENS, 2 * config.max_length)
    slots = min(RUN_TOKENS, config.max_length)
    (blocks, places), width = layout["query_tokens"].shape, layout["key_tokens"].shape[1]
    widest = config.max_length + slots
    line: list[Shape] = [(1,), (tokens,), (most,)]
    found: dict[str, list[Shape]] = {
        "input_ids": [(1, 1), (1, tokens), (1, most)],
        "position_ids": [(1, 1), (1, tokens), (1, most)],
        "logits_positions": [(0,), (rows,), (RUN_TOKENS,)],
        "query_tokens": [(1, 1), (blocks, places), (_MOST_BLOCKS, slots)],
        "key_tokens": [(1, 1), (blocks, width), (_MOST_BLOCKS, widest)],
        "attention_bias": [(1, 1, 1, 1), (blocks, 1, places, width), (_MOST_BLOCKS, 1, slots, widest)],
        "token_blocks": line,
        "token_slots": line,
    }
    for name, heads in _caches(config):
        found[name] = [(1, length, heads * config.head_dim) for length in (0, past, config.max_length)]
    return _triples(found)


def encoder_phases(config: EncoderConfig, workload: Workload | None) -> tuple[Phase, ...]:
    """The phase of an encoder: batches from one token to MOST_ROWS of the longest texts, likely those of a workload.

    Raises InputError for a workload of another task than the model's, or one whose texts are longer than it takes.
    """
    rows, length = _texts(config, workload)
    points = [(1, 1), (rows, length), (max(rows, MOST_ROWS), config.max_length)]
    return (Phase("encode", _triples({name: list(points) for name in config.inputs})),)


def _texts(config: EncoderConfig, workload: Workload | None) -> tuple[int, int]:
    """Texts and tokens in a likely batch; of a scorer each item is a text behind the prefix."""
    if workload is None:
        return _TEXTS, min(_TEXT_TOKENS, config.max_length)
    if workload.task not in config.tasks:
        raise InputError(f"workload {workload.name!r} is of the task {workload.task}, and the graph has none such")
    rows, length = workload.texts, workload.text_tokens
    if workload.task == "score" and workload.prefix_tokens and workload.item_tokens:
        rows, length = workload.items, workload.prefix_tokens + workload.item_tokens
    if length is not None and length > config.max_length:
        raise InputError(
            f"workload {workload.name!r} has texts of {length} tokens, and the model takes {config.max_length}"
        )
    return rows or _TEXTS, min(length or _TEXT_TOKENS, config.max_length)


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
