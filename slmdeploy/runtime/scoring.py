"""Scores many items behind one prefix with score.onnx: the prefix is computed once, the items are packed behind it.

A pack is one sequence in which each item restarts its positions at the end of the prefix and an attention bias hides
the items from each other, so every item sees what it would see alone (multi-item scoring; the results differ by
rounding only). Packs are bounded by the context and by PACK_TOKENS. Prefix and pack are two runs: GroupQueryAttention
ignores position_ids while the past is empty, and one run over both was not faster. Knows nothing of text; label logits
come out as the graph gives them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .bundle import RuntimeConfig, ScoreConfig
from .decoding import token_array, width_masks
from .errors import CorruptArtifactError, InputError
from .kv import KvCache
from .session import Binding, as_value, check_interface, open_session

GRAPH = "score.onnx"
PACK_TOKENS = 128
"""Tokens in a pack: measured from 1 to 1024 at 5M and 30M parameters, 64 to 192 are within noise and fastest."""
_HIDDEN = np.float32(-1e9)

Ids = npt.NDArray[np.int64]


class Scorer:
    """score.onnx with a KV cache that holds the prefix."""

    def __init__(self, folder: Path, config: RuntimeConfig, score: ScoreConfig, threads: int) -> None:
        self._config = config
        self._labels = len(score.label_ids)
        self._path = folder / GRAPH
        self._session = open_session(self._path, threads=threads, spinning=config.spinning)
        packing = {"position_ids": "int64", "attention_bias": "float"}
        check_interface(self._session, self._path, config, packing, "label_logits")
        self._cache = KvCache(config)
        self._binding = Binding(self._session, self._path)
        self._masks = width_masks(0)

    def score(self, prefix: Ids, items: Sequence[Ids]) -> npt.NDArray[np.float32]:
        """Label logits at the last token of each item behind the prefix, float32 [items, labels]."""
        room = self._config.max_length - prefix.size
        for i, item in enumerate(items):
            if item.size > room:
                raise InputError(
                    f"Item {i} has {item.size} tokens behind a prefix of {prefix.size}, but the context of this model "
                    f"holds {self._config.max_length}: shorten it."
                )
        packs = list(pack([item.size for item in items], min(room, PACK_TOKENS)))
        self._reserve(prefix.size + max(sum(items[i].size for i in one) for one in packs))
        self._cache.truncate(0)
        self._run(prefix, np.arange(prefix.size), np.zeros((prefix.size, prefix.size), np.float32), np.arange(0))
        self._cache.advance(prefix.size)
        scores = np.concatenate([self._run_pack([items[i] for i in one]) for one in packs])
        if not np.isfinite(scores).all():
            raise CorruptArtifactError(f"{self._path} computes NaN or infinity; its weights are damaged.")
        return scores

    def _reserve(self, tokens: int) -> None:
        if self._cache.reserve(tokens):
            self._masks = width_masks(self._cache.capacity)
            self._cache.bind(self._binding)

    def _run_pack(self, items: Sequence[Ids]) -> npt.NDArray[np.float32]:
        sizes = np.array([item.size for item in items])
        prefix = self._cache.length
        positions = np.concatenate([np.arange(prefix, prefix + size) for size in sizes])
        bias = packing_bias(sizes, prefix)
        return self._run(np.concatenate(items), positions, bias, np.cumsum(sizes) - 1)

    def _run(self, ids: Ids, positions: Ids, bias: npt.NDArray[np.float32], asked: Ids) -> npt.NDArray[np.float32]:
        """One run behind what the cache holds; it is not counted in the cache, so the next run overwrites it."""
        result = np.empty((asked.size, self._labels), np.float32)
        self._binding.set_input("input_ids", as_value(ids.reshape(1, -1)))
        self._binding.set_input("position_ids", as_value(positions.reshape(1, -1)))
        self._binding.set_input("attention_mask", self._masks[self._cache.length + ids.size])
        self._binding.set_input("attention_bias", as_value(bias.reshape(1, 1, *bias.shape)))
        self._binding.set_input("logits_positions", as_value(asked))
        self._binding.set_output("label_logits", as_value(result))
        self._binding.run()
        return result


def pack(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of items, in their order, in packs of about equal size and at most `limit` tokens.

    An item longer than the limit is a pack of its own. Equal packs, because attention grows with the square of a pack.
    """
    tokens = sum(sizes)
    share = tokens / -(-tokens // limit)
    current: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if current and (total + size > limit or total + size / 2 > share):
            yield current
            current, total = [], 0
        current.append(i)
        total += size
    yield current


def packing_bias(sizes: npt.NDArray[np.int64], prefix: int) -> npt.NDArray[np.float32]:
    """Attention bias float32 [tokens, prefix + tokens]: 0 to the prefix and the own item, -1e9 to the other items."""
    owner = np.repeat(np.arange(sizes.size), sizes)
    bias = np.zeros((owner.size, prefix + owner.size), np.float32)
    bias[:, prefix:][owner[:, None] != owner] = _HIDDEN
    return bias


def token_arrays(items: Sequence[Sequence[int]], vocab_size: int) -> list[Ids]:
    """Each item's ids as an array; InputError if there is no item or an item has no token."""
    if not items:
        raise InputError("There are no items to score: give at least one.")
    return [token_array(item, vocab_size) for item in items]
