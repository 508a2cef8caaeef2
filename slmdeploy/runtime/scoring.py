"""Scores many items behind one prefix with score.onnx: the prefix is computed once, items stand in blocks behind it.

A run takes the prefix, or what an earlier run has kept of it, and as many items as RUN_TOKENS allows (multi-item
scoring; results differ from one by one by rounding only). The keys and values of the last prefix are kept, and of more
where `keep_prefixes` says so, so that a request computes only what its prefix has behind their common beginning.
Small models gain little from several threads inside one operator, so a build may ask for lanes: as many runs side by
side as there are threads, each on its share of the items and on one thread (`parallel_items` of runtime.json, measured
when the build is made). Each lane computes the prefix for itself, so a long prefix has no lanes. Knows nothing of text;
label logits come out as the graph gives them.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .blocks import lay_out, pack, shares, slots_for
from .bundle import RuntimeConfig, ScoreConfig
from .decoding import token_array
from .errors import CorruptArtifactError, InputError
from .prefixes import Past, Prefixes
from .segments import Segment, SegmentTree, segment_tree
from .session import Array, Binding, as_value, check_interface, kv_names, open_session, physical_cores

GRAPH = "score.onnx"
RUN_TOKENS = 256
"""Tokens of items in a run, and of the prefix where it is long: more gain nothing and leave the cache."""
LANE_PREFIX = 64
"""The longest prefix that lanes are used for: computing 128 tokens in each of two lanes takes back what they gain, and
so do lanes behind a prefix that all threads computed, whose threads spin on (benchmarks/scoring_blocks.py)."""

_INPUTS = {
    "input_ids": "int64",
    "logits_positions": "int64",
    "position_ids": "int64",
    "query_tokens": "int64",
    "key_tokens": "int64",
    "attention_bias": "float",
    "token_blocks": "int64",
    "token_slots": "int64",
}
Ids = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


class Scorer:
    """score.onnx, in one or several lanes."""

    def __init__(self, folder: Path, config: RuntimeConfig, score: ScoreConfig, threads: int) -> None:
        self._config, self._path, self._threads = config, folder / GRAPH, threads
        self._labels = len(score.label_ids)
        self._lane_count = (threads or physical_cores()) if config.parallel_items else 1
        self._nothing = Past(0, [np.zeros((1, 0, width), np.dtype(config.cache)) for width in _widths(config)])
        self._prefixes = Prefixes(self._nothing, segment_tree(0, config))

    @cached_property
    def _wide(self) -> "Lane":
        """All threads inside each operator."""
        return self._open(self._threads, 1)[0]

    @cached_property
    def _lanes(self) -> "list[Lane]":
        return self._open(1, self._lane_count)

    @cached_property
    def _workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._lane_count - 1, thread_name_prefix="slmdeploy-lane")

    def _open(self, threads: int, count: int) -> "list[Lane]":
        session = open_session(
            self._path, threads=threads, spinning=self._config.spinning, as_written=self._config.numerics_only
        )
        check_interface(session, self._path, self._config, _INPUTS, "label_logits", kv_rows=True)
        bound = [BoundSession(session, self._path) for _ in range(count)]
        return [Lane(one, self._config, self._labels, self._nothing) for one in bound]

    def keep_prefixes(self, size_bytes: int) -> SegmentTree:
        """Keep up to so many bytes of prefixes besides the last one; the tree that holds them."""
        self._prefixes = Prefixes(self._nothing, segment_tree(size_bytes, self._config))
        return self._prefixes.tree

    def score(self, prefix: Ids, items: Sequence[Ids]) -> Scores:
        """Label logits at the last token of each item behind the prefix, float32 [items, labels]."""
        run = self.begin(prefix, items)
        while not run.done:
            run.advance()
        return run.scores

    def begin(self, prefix: Ids, items: Sequence[Ids]) -> "ScoreRun":
        """The same in pieces of about RUN_TOKENS (in lanes, of as many in each), between which others may run."""
        check_room(prefix, items, self._config.max_length)
        past = self._prefixes.find(prefix)
        in_lanes = 1 < self._lane_count <= len(items) and prefix.size <= LANE_PREFIX
        pieces = self._lane_pieces(past, prefix, items) if in_lanes else self._pieces(past, prefix, items)
        return ScoreRun(self._path, past.length, len(items), self._labels, pieces)

    def _pieces(self, past: Past, prefix: Ids, items: Sequence[Ids]) -> Iterator[Scores]:
        for scores, now in self._wide.runs(past, prefix, items):
            if now is not past and now.length == prefix.size:
                self._prefixes.keep(prefix, now)
            past = now
            yield scores

    def _lane_pieces(self, past: Past, prefix: Ids, items: Sequence[Ids]) -> Iterator[Scores]:
        sizes = [item.size for item in items]
        for one in pack(sizes, self._lane_count * RUN_TOKENS):
            scores, now = self._score_in_lanes(past, prefix, [items[i] for i in one])
            if now is not past:
                self._prefixes.keep(prefix, now)
            past = now
            yield scores

    def _score_in_lanes(self, past: Past, prefix: Ids, items: Sequence[Ids]) -> tuple[Scores, Past]:
        parts = [[items[i] for i in one] for one in shares([item.size for item in items], self._lane_count)]
        waiting = [
            self._workers.submit(lane.score, past, prefix, share)
            for lane, share in zip(self._lanes[1:], parts[1:], strict=False)
        ]
        try:
            own, now = self._lanes[0].score(past, prefix, parts[0])
        finally:
            others = [future.exception() or future.result() for future in waiting]
        failure = next((one for one in others if isinstance(one, BaseException)), None)
        if failure is not None:
            raise failure
        return np.concatenate([own, *(one[0] for one in others if not isinstance(one, BaseException))]), now


class ScoreRun:
    """A request on its way. cached_tokens: those of the prefix that need not be computed; `scores` hold when `done`."""

    def __init__(self, path: Path, cached_tokens: int, items: int, labels: int, pieces: Iterator[Scores]) -> None:
        self.cached_tokens = cached_tokens
        self.scores = np.empty((items, labels), np.float32)
        self._path, self._pieces, self._count = path, pieces, 0

    @property
    def done(self) -> bool:
        """Whether all items have their scores."""
        return self._count == len(self.scores)

    def advance(self) -> None:
        """Run the next piece."""
        piece = next(self._pieces)
        if not np.isfinite(piece).all():
            raise CorruptArtifactError(f"{self._path} computes NaN or infinity; its weights are damaged.")
        self.scores[self._count : self._count + len(piece)] = piece
        self._count += len(piece)


class Bound(Protocol):
    """A scoring graph, and memory of ours that it reads and writes: an array stays bound until another takes its place.

    Shapes of arrays that are written must be those that the graph computes.
    """

    def read(self, name: str, array: Array) -> None: ...
    def write(self, name: str, array: Array) -> None: ...
    def write_nothing(self) -> None: ...
    def run(self) -> None: ...


class BoundSession:
    """A session of ONNX Runtime as `Bound`."""

    def __init__(self, session: ort.InferenceSession, path: Path) -> None:
        self._binding = Binding(session, path)

    def read(self, name: str, array: Array) -> None:
        """Read `name` from this array in the runs to come."""
        self._binding.set_input(name, as_value(array))

    def write(self, name: str, array: Array) -> None:
        """Write `name` into this array in the runs to come."""
        self._binding.set_output(name, as_value(array))

    def write_nothing(self) -> None:
        """Compute nothing that is not asked for anew."""
        self._binding.clear_outputs()

    def run(self) -> None:
        """One run over what is bound."""
        self._binding.run()


class Lane:
    """What binds one graph for one run at a time; lanes of one session may run side by side."""

    def __init__(self, bound: Bound, config: RuntimeConfig, labels: int, nothing: Past) -> None:
        self._bound = bound
        self._limit, self._labels, self._cache = config.max_length, labels, np.dtype(config.cache)
        self._past_names, self._present_names = kv_names(config.layers)
        self._widths = _widths(config)
        self._past = self._bind(nothing)

    def score(self, past: Past, prefix: Ids, items: Sequence[Ids]) -> tuple[Scores, Past]:
        """Label logits of the items behind the prefix, of which `past` is the beginning, and the past of all of it."""
        results = []
        for scores, now in self.runs(past, prefix, items):
            results.append(scores)
            past = now
        return np.concatenate(results), past

    def runs(self, past: Past, prefix: Ids, items: Sequence[Ids]) -> Iterator[tuple[Scores, Past]]:
        """Run after run, each with the scores of the next items, none for a run of the prefix alone, and the past."""
        room = min(RUN_TOKENS, self._limit - prefix.size)
        packs = [[items[i] for i in one] for one in pack([item.size for item in items], room)]
        alone = prefix.size - past.length > RUN_TOKENS  # else it goes into the run of the first items
        while alone and past.length < prefix.size:
            piece = prefix[past.length : past.length + RUN_TOKENS]
            scores, past = self._run(past, piece, [], keep=True)
            yield scores, past
        for one in packs:
            new = prefix[past.length :]
            scores, past = self._run(past, new, one, keep=new.size > 0)
            yield scores, past

    def _run(self, past: Past, prefix: Ids, items: Sequence[Ids], *, keep: bool) -> tuple[Scores, Past]:
        """One run; with `keep` the past returned has `prefix` behind it."""
        sizes = [item.size for item in items]
        seen = past.length + prefix.size
        layout = lay_out(past.length, prefix.size, sizes, slots_for(seen, prefix.size, sizes))
        if past is not self._past:
            self._past = self._bind(past)
        result = np.empty((len(items), self._labels), np.float32)
        inputs = {
            "input_ids": np.concatenate([prefix, *items])[None],
            "logits_positions": prefix.size + np.cumsum(sizes, dtype=np.int64) - 1,
            **layout,
        }
        for name, array in inputs.items():
            self._bound.read(name, array)
        self._bound.write_nothing()
        self._bound.write("label_logits", result)
        kept = self._bind_present(seen + sum(sizes)) if keep else []
        self._bound.run()
        return result, Past(seen, [rows[:, :seen] for rows in kept]) if keep else past

    def _bind(self, past: Past) -> Past:
        for name, rows in zip(self._past_names, past.rows, strict=True):
            self._bound.read(name, rows)
        return past

    def _bind_present(self, length: int) -> Segment:
        present = [np.empty((1, length, width), self._cache) for width in self._widths]
        for name, rows in zip(self._present_names, present, strict=True):
            self._bound.write(name, rows)
        return present


def _widths(config: RuntimeConfig) -> list[int]:
    """Numbers in a row of each input of the past: key and value of layer 0, of layer 1, …"""
    return [heads * config.head_dim for heads in config.kv_heads for _ in range(2)]


def check_room(prefix: Ids, items: Sequence[Ids], limit: int) -> None:
    """Raise InputError for an item that does not fit behind the prefix in a context of `limit` tokens."""
    for i, item in enumerate(items):
        if item.size > limit - prefix.size:
            raise InputError(
                f"Item {i} has {item.size} tokens behind a prefix of {prefix.size}, but the context of this model "
                f"holds {limit}: shorten it."
            )


def token_arrays(items: Sequence[Sequence[int]], vocab_size: int) -> list[Ids]:
    """Each item's ids as an array; InputError if there is no item or an item has no token."""
    if not items:
        raise InputError("There are no items to score: give at least one.")
    return [token_array(item, vocab_size) for item in items]
