"""Workloads as concrete requests: seeded, of exact lengths, each with its own random token ids.

Random ids make every prompt and prefix distinct, so that nothing is cacheable by accident, and need no data; the time
of a dense decoder does not depend on which ids they are. Knows no model and sends nothing: a request is the message
that worker.py takes.
"""

import zlib
from typing import Any

import numpy as np

from slmdeploy.errors import InputError
from slmdeploy.specs import Workload

Request = dict[str, Any]
ENCODED = ("embed", "classify")
"""The tasks whose requests are texts that an encoder runs."""

_RESERVED_IDS = 16
"""Lowest ids left out where the vocabulary allows: by convention beginning, end, padding and the like."""


def requests(workload: Workload, n: int, *, vocab_size: int, seed: int) -> list[Request]:
    """``n`` requests of ``workload``; the same arguments give the same requests."""
    # The name takes part, so that two workloads of one run never share a prompt.
    generator = np.random.default_rng([seed, zlib.crc32(workload.name.encode())])
    low = min(_RESERVED_IDS, vocab_size // 2)

    def ids(length: int) -> list[int]:
        return [int(token) for token in generator.integers(low, vocab_size, length)]

    if workload.task == "generate":
        prompt, new = workload.prompt_tokens or 0, workload.new_tokens or 0
        return [{"op": "generate", "prompt_ids": ids(prompt), "new_tokens": new} for _ in range(n)]
    if workload.task in ENCODED:
        texts, length = workload.texts or 0, workload.text_tokens or 0
        return [{"op": "encode", "rows": [ids(length) for _ in range(texts)]} for _ in range(n)]
    prefix, items, length = workload.prefix_tokens or 0, workload.items or 0, workload.item_tokens or 0
    return [
        {"op": "score", "prefix_ids": ids(prefix), "item_ids": [ids(length) for _ in range(items)]} for _ in range(n)
    ]


def context_tokens(workload: Workload) -> int:
    """The context that one request needs: prompt and new tokens, prefix and the longest item, or the longest text."""
    if workload.task == "generate":
        return (workload.prompt_tokens or 0) + (workload.new_tokens or 0)
    if workload.task in ENCODED:
        return workload.text_tokens or 0
    return (workload.prefix_tokens or 0) + (workload.item_tokens or 0)


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
