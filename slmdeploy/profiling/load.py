"""Workloads as concrete requests: seeded, of exact lengths, each with its own random token ids.

Random ids make every prompt and prefix distinct, so that nothing is cacheable by accident (of a hot workload the prefix
is the same on purpose), and need no data; the time
of a dense decoder does not depend on which ids they are. Knows no model and sends nothing: a request is the message
that worker.py takes, and when it is sent is the business of arrivals.py.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from slmdeploy.errors import InputError
from slmdeploy.profiling.trace import Entry, read_trace
from slmdeploy.specs import ENCODER_TASKS, Workload

Request = dict[str, Any]

_RESERVED_IDS = 16
"""Lowest ids left out where the vocabulary allows: by convention beginning, end, padding and the like."""


def requests(
    workload: Workload, n: int, *, vocab_size: int, seed: int | Sequence[int], text: Sequence[int] = ()
) -> list[Request]:
    """``n`` requests of ``workload``; the same arguments give the same requests, a larger ``n`` only adds to them.

    Those of a trace have the lengths of its first ``n`` lines. Those of a hot workload share their prefix whatever the
    seed, so that the first one, which does not count, makes it resident. With ``text``, ids of tokens, prompts to
    continue are cut from it at random places instead.
    """
    # The name takes part, so that two workloads of one run never share a prompt.
    seeds = [seed] if isinstance(seed, int) else list(seed)
    generator = np.random.default_rng([*seeds, zlib.crc32(workload.name.encode())])
    low = min(_RESERVED_IDS, vocab_size // 2)

    def ids(length: int) -> list[int]:
        if text and workload.task == "generate":
            start = int(generator.integers(len(text)))
            return [int(text[(start + place) % len(text)]) for place in range(length)]
        return [int(token) for token in generator.integers(low, vocab_size, length)]

    made = [_request(workload, entry, ids) for entry in _lengths(workload, n)]
    if workload.hot:
        resident = np.random.default_rng(zlib.crc32(workload.name.encode())).integers(low, vocab_size, (1 << 17,))
        for request in made:
            request["prefix_ids"] = [int(token) for token in resident[: len(request["prefix_ids"])]]
    return made


def _lengths(workload: Workload, n: int) -> list[Entry]:
    if workload.trace is not None:
        return read_trace(workload.trace, workload.task)[:n]
    lengths = workload.model_dump(include=set(Entry.model_fields) - {"arrival_s"}, exclude_none=True)
    return [Entry(arrival_s=0.0, **lengths)] * n


def _request(workload: Workload, size: Entry, ids: Callable[[int], list[int]]) -> Request:
    if workload.task == "generate":
        return {"op": "generate", "prompt_ids": ids(size.prompt_tokens), "new_tokens": size.new_tokens}
    if workload.task in ENCODER_TASKS:
        return {"op": "encode", "rows": [ids(size.text_tokens) for _ in range(size.texts)]}
    prefix, items = ids(size.prefix_tokens), [ids(size.item_tokens) for _ in range(size.items)]
    return {"op": "score", "prefix_ids": prefix, "item_ids": items}


def context_tokens(workload: Workload) -> int:
    """The context that the longest request needs: prompt and new tokens, prefix and longest item, or longest text."""
    return max(_context(workload, entry) for entry in _lengths(workload, workload.requests))


def _context(workload: Workload, entry: Entry) -> int:
    match workload.task:
        case "generate":
            return entry.prompt_tokens + entry.new_tokens
        case "score":
            return entry.prefix_tokens + entry.item_tokens
    return entry.text_tokens


def check_fits(workload: Workload, name: str, *, max_length: int, tasks: tuple[str, ...]) -> None:
    """InputError unless a build called ``name`` can run ``workload``."""
    if workload.task not in tasks:
        raise InputError(
            f"workload {workload.name!r} is of task {workload.task!r}, but {name} was exported for {', '.join(tasks)}: "
            f"export it with --task {workload.task}"
        )
    needed = context_tokens(workload)
    if needed > max_length:
        raise InputError(
            f"workload {workload.name!r} needs a context of {needed} tokens, but {name} has {max_length}: shorten it"
        )
