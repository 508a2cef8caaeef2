"""Keys and values of many sequences in pages of one pool, and runs of an OpenVINO decoder over them.

Paged attention (Kwon et al., arXiv 2309.06180): a sequence has a list of pages and no rows of its own, so prompts run
in pieces, sequences of unequal lengths run together without padding, and items share the pages of a prefix. OpenVINO's
states can do none of that at speed: several tokens behind a past fall to a kernel made for one. A file holds the model
with states; OpenVINO's own transformation pages it when it is opened, as its GenAI does. Knows nothing of text,
sampling or which sequence runs when.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig
from .errors import CorruptArtifactError, ResourceError
from .kv import too_long
from .openvino_session import GRAPH, Floats, OpenVinoModel, Request, page_attention

_INPUTS = {"input_ids": "i64", "attention_mask": "i64", "logits_positions": "i64", "position_ids": "i64"}
_SMALLEST = 64
Ids = npt.NDArray[np.int64]
Buffer = npt.NDArray[np.float32] | npt.NDArray[np.uint16]


@dataclass
class PagedSequence:
    """The pages in which a sequence stands, in order, and how many tokens they hold."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PagedModel(OpenVinoModel):
    """openvino_model.xml of a decoder, checked against runtime.json, its attention paged."""

    def __init__(self, folder: Path, config: RuntimeConfig, threads: int) -> None:
        assert config.inference_precision is not None, "read_runtime lets no stateful interface through without it"
        self._config = config
        super().__init__(folder / GRAPH, threads=threads, precision=config.inference_precision)

    def prepare(self, model: Any) -> None:
        """Page the attention of a model that is what runtime.json says."""
        self.check(_INPUTS | {"beam_idx": "i32"}, ["logits"])
        config = self._config
        wanted = sorted([[heads, config.head_dim] for heads in config.kv_heads for _ in range(2)])
        found = [[shape[1], shape[3]] for shape in self.states() if len(shape) == 4]
        if sorted(found, key=str) != sorted(wanted, key=str) or self.outputs["logits"][-1] != config.vocab_size:
            raise CorruptArtifactError(
                f"{self.path} has other keys, values or logits than runtime.json calls for; build it again."
            )
        page_attention(model)


class PagePool:
    """Keys and values of all layers in pages that sequences hold, alone or together."""

    def __init__(self, request: Request, caches: dict[str, tuple[str, list[int | None]]]) -> None:
        """caches: element type and shape [pages, …] of each input that holds keys or values, by name."""
        self._request, self._caches = request, caches
        self._buffers: dict[str, Buffer] = {}
        self._free: list[int] = []
        self._holders: list[int] = []
        tokens = next(iter(caches.values()))[1][2]
        assert tokens is not None, "pages have a fixed size"
        self.page = tokens
        """Tokens in a page."""

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return len(self._holders) - len(self._free)

    def extend(self, sequence: PagedSequence, tokens: int) -> None:
        """Give a sequence the pages that it needs to hold `tokens`; ResourceError when there is no memory for them."""
        while len(sequence.pages) * self.page < tokens:
            sequence.pages.append(self._take())

    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """A sequence that goes on from another: the full pages are shared, the last one is copied if it is not full."""
        full = sequence.length // self.page
        own = []
        if sequence.length % self.page:
            own = [self._take()]  # first of all: where there is no memory nothing has changed
            for buffer in self._buffers.values():
                buffer[own[0]] = buffer[sequence.pages[full]]
        for page in sequence.pages[:full]:
            self._holders[page] += 1
        return PagedSequence([*sequence.pages[:full], *own], sequence.length)

    def release(self, sequence: PagedSequence) -> None:
        """Give a sequence's pages back; it is empty then."""
        for page in sequence.pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
        sequence.pages, sequence.length = [], 0

    def _take(self) -> int:
        if not self._free:
            self._grow()
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _grow(self) -> None:
        """Twice as many pages; the system commits their memory only as they are written."""
        old = len(self._holders)
        pages = max(_SMALLEST, 2 * old)
        try:
            buffers = {name: _buffer(element, [pages, *shape[1:]]) for name, (element, shape) in self._caches.items()}
        except MemoryError:
            raise ResourceError(
                f"There is no memory for keys and values of {pages * self.page} tokens; use less context."
            ) from None
        for name, buffer in buffers.items():
            if old:
                buffer[:old] = self._buffers[name]
            self._request.set_as(name, buffer, self._caches[name][0])
        self._buffers = buffers
        self._holders += [0] * (pages - old)
        self._free += reversed(range(old, pages))


def _buffer(element: str, shape: Sequence[int | None]) -> Buffer:
    kind = {"f32": np.float32, "bf16": np.uint16}[element]
    return np.zeros([size or 0 for size in shape], kind)


class PagedRuns:
    """Runs of a paged model: tokens of one or more sequences at once, each behind what its pages hold."""

    def __init__(self, model: PagedModel, config: RuntimeConfig) -> None:
        self.config, self.path = config, model.path
        self._request = model.request()
        self.pool = PagePool(self._request, model.caches())

    def run(self, parts: Sequence[tuple[PagedSequence, Ids]], positions: Ids) -> Floats:
        """Append ids to each sequence; logits [positions, vocab] at positions of all ids one behind the other.

        The logits are overwritten by the next run. Raises InputError when a sequence exceeds the context, before
        anything runs.
        """
        lengths = [sequence.length for sequence, _ in parts]
        totals = [length + ids.size for length, (_, ids) in zip(lengths, parts, strict=True)]
        if max(totals) > self.config.max_length:
            raise too_long(max(totals), self.config.max_length)
        for (sequence, _), total in zip(parts, totals, strict=True):
            self.pool.extend(sequence, total)
        pages = [sequence.pages for sequence, _ in parts]
        for name, array in (
            ("input_ids", np.concatenate([ids for _, ids in parts])),
            ("position_ids", np.concatenate([np.arange(*ends) for ends in zip(lengths, totals, strict=True)])),
            ("logits_positions", positions),
            ("past_lens", np.array(lengths, np.int32)),
            ("subsequence_begins", _begins([ids.size for _, ids in parts])),
            ("block_indices", np.array([page for held in pages for page in held], np.int32)),
            ("block_indices_begins", _begins([len(held) for held in pages])),
            ("max_context_len", np.array(max(totals), np.int32)),
        ):
            self._request.set(name, array)
        self._request.run()
        for (sequence, _), total in zip(parts, totals, strict=True):
            sequence.length = total
        return self._request.output("logits")

    def run_pieces(self, sequence: PagedSequence, ids: Ids, positions: Ids, piece: int) -> list[Floats]:
        """Append ids [length] in pieces of `piece`; the caller's own logits at the ascending positions."""
        found = []
        for start in range(0, ids.size, piece):
            end = min(start + piece, ids.size)
            here = positions[(positions >= start) & (positions < end)] - start
            found.append(self.run([(sequence, ids[start:end])], here).copy())
        return found


def _begins(sizes: Sequence[int]) -> npt.NDArray[np.int32]:
    """Where each of some pieces that lie one behind the other begins, and where the last ends."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
