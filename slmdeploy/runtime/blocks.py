"""Where each token of a scoring run stands: the arrays that score.onnx takes beside the token ids.

The tokens of a run are pieces: the prefix, cut into parts, and whole items. Pieces stand in blocks of `slots` query
places. Every block sees the keys of the prefix, up to where the mask lets it, and its own; an item restarts its
positions at the end of the prefix, so each sees what it would see alone. Pure arithmetic: knows nothing of sessions.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Layout = dict[str, Integers | npt.NDArray[np.float32]]

_HIDDEN = np.float32(-1e9)
_FEWEST_SLOTS, _MOST_SLOTS = 24, 64


def slots_for(seen: int, prefix: int, sizes: Sequence[int]) -> int:
    """Query places of a block: the more prefix each block repeats, the fewer blocks; a whole item must fit into one.

    seen: tokens of the prefix so far, of which `prefix` are in this run. A quarter of the prefix, from 24 to 64, is
    about the best of 16 to 256 at prefixes of 20 to 448 tokens (benchmarks/scoring_blocks.py): its neighbours differ by
    up to 15 %, depending on how many items fill a block.
    """
    wanted = min(max(_FEWEST_SLOTS, seen // 4), _MOST_SLOTS)
    return max(*sizes, min(wanted, max(prefix, sum(sizes)))) if sizes else min(wanted, prefix)


def lay_out(past: int, prefix: int, sizes: Sequence[int], slots: int) -> Layout:
    """The arrays of a run of `prefix` tokens of the prefix, behind `past` earlier ones of it, and items of these sizes.

    The tokens are in that order. No item has more than `slots` tokens; past + prefix is at least 1.
    """
    parts = [min(slots, prefix - start) for start in range(0, prefix, slots)]
    pieces = np.array([*parts, *sizes], np.int64)
    blocks, starts = _places(pieces.tolist(), len(parts), slots)
    seen, tokens = past + prefix, int(pieces.sum())
    every = np.arange(tokens)
    within = every - np.repeat(np.cumsum(pieces) - pieces, pieces)
    token_blocks, token_slots = np.repeat(blocks, pieces), np.repeat(starts, pieces) + within
    at = (token_blocks, token_slots)
    positions = np.where(every < prefix, past + every, seen + within)

    query_tokens = np.zeros((blocks[-1] + 1, slots), np.int64)
    query_tokens[at] = every
    key_tokens = np.zeros((blocks[-1] + 1, seen + slots), np.int64)
    key_tokens[:, :seen] = np.arange(seen)
    key_tokens[token_blocks, seen + token_slots] = past + every
    owner = np.full(query_tokens.shape, -1)
    owner[at] = np.repeat(np.arange(pieces.size), pieces)
    reach = np.full(query_tokens.shape, seen)
    reach[at] = np.minimum(positions + 1, seen)
    # The prefix's own keys are among those that every block sees, so a part of it hides the ones in its own block.
    own = (owner[:, :, None] == owner[:, None, :]) & (owner[:, None, :] >= len(parts)) & np.tri(slots, dtype=bool)
    visible = np.concatenate([np.arange(seen) < reach[:, :, None], own], axis=2)
    return {
        "position_ids": positions[None],
        "query_tokens": query_tokens,
        "key_tokens": key_tokens,
        "attention_bias": np.where(visible, np.float32(0), _HIDDEN)[:, None],
        "token_blocks": token_blocks,
        "token_slots": token_slots,
    }


def _places(pieces: Sequence[int], parts: int, slots: int) -> tuple[Integers, Integers]:
    """Block and first slot of each piece: parts of the prefix have one each, items share one while they fit."""
    blocks, starts = [], []
    block, used = -1, slots
    for i, size in enumerate(pieces):
        if i <= parts or used + size > slots:
            block, used = block + 1, 0
        blocks.append(block)
        starts.append(used)
        used += size
    return np.array(blocks), np.array(starts)


def shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of items, in their order, in at most `count` shares of about equal size, none of them empty."""
    middles = np.cumsum(sizes) - np.array(sizes) / 2
    owners = (middles * count / sum(sizes)).astype(int).tolist()
    return [[i for i, owner in enumerate(owners) if owner == one] for one in sorted(set(owners))]


def pack(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of items, in their order, in packs of about equal size and at most `limit` tokens.

    An item longer than the limit is a pack of its own.
    """
    tokens = sum(sizes)
    share = tokens / -(-tokens // limit)
    packs: list[list[int]] = []
    total = 0
    for i, size in enumerate(sizes):
        if not packs or total + size > limit or total + size / 2 > share:
            packs.append([])
            total = 0
        packs[-1].append(i)
        total += size
    return packs
