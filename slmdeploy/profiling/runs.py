"""Which runs of which graph a workload makes of a build: the arithmetic of chunks, packs, lanes and batches.

The twin of what the runtime does (runtime/decoding.py, scoring.py, encoding.py), with its own functions where it cuts
things up, so that an estimate counts the operators that a request really runs. Knows no time (roofline.py).
"""

from dataclasses import dataclass

from slmdeploy.errors import InputError
from slmdeploy.profiling.facts import BuildFacts
from slmdeploy.runtime.blocks import lay_out, pack, shares, slots_for
from slmdeploy.runtime.encoding import BATCH_TOKENS, batches
from slmdeploy.runtime.scoring import LANE_PREFIX, RUN_TOKENS
from slmdeploy.specs import Workload

_POINTS = 5
"""Context lengths that a generation's steps are taken at: the time of a step is nearly linear in the context."""


@dataclass(frozen=True)
class Run:
    """One run of the graph called ``role``, or ``times`` such runs.

    ``tokens`` rows go in, the head sees ``kept`` of them. ``pairs`` counts query and key pairs per head that are
    computed, masked ones among them; ``keys`` the keys that are read from the cache, of all sequences.
    ``lanes`` runs of this size go on side by side on one thread each.
    """

    role: str
    tokens: int
    kept: int
    pairs: int
    keys: int
    times: float = 1.0
    lanes: int = 1


@dataclass(frozen=True)
class Request:
    """The runs of one request, or of ``requests`` taken together: until the first token, and for all later ones.

    ``counts``: new tokens, items or texts of a single one of the requests.
    """

    first: tuple[Run, ...]
    later: tuple[Run, ...]
    counts: int
    requests: int


def request_of(workload: Workload, facts: BuildFacts, threads: int) -> Request:
    """What one request of the workload runs; ``threads`` is how many the build has there.

    Raises InputError for a scenario in which requests wait for one another, and for a task that the build lacks.
    """
    if workload.queues:
        raise InputError(
            f"workload {workload.name!r} is of scenario {workload.scenario!r}: estimates are of single-stream and "
            "offline, and `slmdeploy plan` says what load does to such service times"
        )
    if workload.task == "generate":
        return _generate(workload, facts)
    if workload.task == "score" and "encode" not in facts.graphs:
        return Request(tuple(_score(workload, facts, threads)), (), workload.items or 1, 1)
    if workload.task == "score":
        return _encode(facts, workload.items or 1, (workload.prefix_tokens or 0) + (workload.item_tokens or 0))
    return _encode(facts, workload.texts or 1, workload.text_tokens or 1)


def _generate(workload: Workload, facts: BuildFacts) -> Request:
    prompt, new, rows = workload.prompt_tokens or 1, workload.new_tokens or 1, workload.batch
    role = "prompts" if 0 < facts.step_rows <= rows else "steps"
    each = (new - 1) / _POINTS
    contexts = [prompt + 1 + round(each * (point + 0.5)) for point in range(_POINTS)] if new > 1 else []
    steps = tuple(Run(role, rows, rows, rows * context, rows * context, each) for context in contexts)
    return Request(tuple(_prompt(prompt, facts.chunk)) * rows, steps, new, rows)


def _prompt(tokens: int, chunk: int) -> list[Run]:
    size = chunk or tokens
    pieces = [(start, min(size, tokens - start)) for start in range(0, tokens, size)]
    return [
        Run("prompts", count, int(start + count == tokens), count * (start + count), start + count)
        for start, count in pieces
    ]


def _score(workload: Workload, facts: BuildFacts, threads: int) -> list[Run]:
    prefix, length = workload.prefix_tokens or 1, workload.item_tokens or 1
    sizes = [length] * (workload.items or 1)
    lanes = threads if facts.parallel_items else 1
    if not 1 < lanes <= len(sizes) or prefix > LANE_PREFIX:
        return _lane(prefix, sizes, workload.hot, facts.max_length, 1)
    largest = max(shares(sizes, lanes), key=len)
    return _lane(prefix, [sizes[item] for item in largest], workload.hot, facts.max_length, lanes)


def _lane(prefix: int, sizes: list[int], hot: bool, limit: int, lanes: int) -> list[Run]:
    """A long prefix in runs of its own, then packs of items, the first of them with what is left of the prefix."""
    packs = pack(sizes, min(RUN_TOKENS, limit - prefix))
    seen = prefix if hot else 0
    runs = []
    if prefix - seen > RUN_TOKENS:
        for start in range(0, prefix, RUN_TOKENS):
            runs.append(_score_run(start, min(RUN_TOKENS, prefix - start), [], lanes))
        seen = prefix
    for one in packs:
        runs.append(_score_run(seen, prefix - seen, [sizes[item] for item in one], lanes))
        seen = prefix
    return runs


def _score_run(past: int, prefix: int, sizes: list[int], lanes: int) -> Run:
    layout = lay_out(past, prefix, sizes, slots_for(past + prefix, prefix, sizes))
    blocks, slots = layout["query_tokens"].shape
    width = layout["key_tokens"].shape[1]
    return Run("score", prefix + sum(sizes), len(sizes), blocks * slots * width, blocks * width, lanes=lanes)


def _encode(facts: BuildFacts, texts: int, length: int) -> Request:
    tokens = min(length, facts.max_length)
    counts = [len(batch) for batch in batches([tokens] * texts, BATCH_TOKENS)]
    runs = (Run("encode", rows * tokens, rows, rows * tokens * tokens, rows * tokens) for rows in counts)
    return Request(tuple(runs), (), texts, 1)
