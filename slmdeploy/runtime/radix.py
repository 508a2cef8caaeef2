"""A radix tree over token sequences: which beginning of a sequence is kept, and what is kept for it.

Each edge has some tokens and a payload for them, which the tree only splits where sequences part. Nodes that somebody
holds stay; of the others the least recently used leaves go first when the capacity, counted in tokens, is reached.
What counts as a token is up to the caller: an id, or all ids of a page. After SGLang's RadixAttention (Zheng et al.
2024). Pure: knows nothing of keys, values, bytes or threads.
"""

import heapq
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P")


class Node(Generic[P]):
    """The end of an edge with `tokens`; its way from the root is the beginning of sequences that it stands for."""

    __slots__ = ("children", "holds", "parent", "payload", "tokens", "used")

    def __init__(self, parent: "Node[P] | None", tokens: tuple[Hashable, ...], payload: P | None) -> None:
        self.parent, self.tokens, self.payload = parent, tokens, payload
        self.children: dict[Hashable, Node[P]] = {}
        self.holds = 0
        self.used = 0


@dataclass(frozen=True, slots=True)
class Found(Generic[P]):
    """What is kept of a sequence: its first `length` tokens. pieces: (payload, tokens of it that count), in order.

    Only the last piece may count for fewer tokens than its payload has.
    """

    length: int
    pieces: tuple[tuple[P, int], ...]
    node: Node[P]


class RadixTree(Generic[P]):
    """Payloads of up to `capacity` tokens.

    split(payload, at): those of its first `at` tokens and of the others; forget(payload) is called for one given up.
    """

    def __init__(
        self,
        capacity: int,
        split: Callable[[P, int], tuple[P, P]],
        forget: Callable[[P], None] = lambda payload: None,
    ) -> None:
        self.capacity = capacity
        self.size = 0
        """Tokens that are kept."""
        self._split, self._forget = split, forget
        self._root: Node[P] = Node(None, (), None)
        self._clock = 0

    def find(self, tokens: Sequence[Hashable]) -> Found[P]:
        """The longest beginning of `tokens` that is kept, which counts as a use of it."""
        wanted = tuple(tokens)
        self._clock += 1
        pieces: list[tuple[P, int]] = []
        node, length = self._root, 0
        for child, count in self._walk(wanted):
            assert child.payload is not None, "only the root has no payload"
            child.used = self._clock
            pieces.append((child.payload, count))
            node, length = child, length + count
        return Found(length, tuple(pieces), node)

    def _walk(self, wanted: tuple[Hashable, ...]) -> Iterator[tuple[Node[P], int]]:
        """The nodes along a sequence, with the tokens that each has in common with it."""
        node, at = self._root, 0
        while at < len(wanted) and (child := node.children.get(wanted[at])) is not None:
            count = common(child.tokens, wanted[at : at + len(child.tokens)])
            yield child, count
            if count < len(child.tokens):
                return
            node, at = child, at + count

    def insert(self, tokens: Sequence[Hashable], read: Callable[[int, int], P]) -> Node[P]:
        """Keep `tokens`, or as long a beginning as has room; the node at the end of what is kept of them, for `hold`.

        read(start, stop) makes the payload of these tokens and is called only for what is not kept yet.
        """
        wanted = tuple(tokens)
        found = self.find(wanted)
        node, new = found.node, len(wanted) - found.length
        if new == 0:
            return node
        if found.pieces and found.pieces[-1][1] < len(node.tokens):
            node = self._cut(node, found.pieces[-1][1])
        self.hold(node)
        self._evict(self.size + new - self.capacity)
        self.drop(node)
        stop = found.length + min(new, self.capacity - self.size)
        if stop == found.length:
            return node
        leaf = Node(node, wanted[found.length : stop], read(found.length, stop))
        leaf.used = self._clock
        node.children[leaf.tokens[0]] = leaf
        self.size += len(leaf.tokens)
        return leaf

    def _cut(self, node: Node[P], at: int) -> Node[P]:
        """Cut the edge of a node behind its first `at` tokens; the new node there, held by all who hold the old one."""
        assert node.parent is not None, "the root has no edge"
        assert node.payload is not None, "only the root has no payload"
        first, rest = self._split(node.payload, at)
        upper = Node(node.parent, node.tokens[:at], first)
        upper.holds, upper.used = node.holds, node.used
        node.parent.children[upper.tokens[0]] = upper
        node.parent, node.tokens, node.payload = upper, node.tokens[at:], rest
        upper.children[node.tokens[0]] = node
        return upper

    def hold(self, node: Node[P]) -> None:
        """Keep a node, and with it its way from the root, until it is dropped as often as it was held."""
        self._count(node, 1)

    def drop(self, node: Node[P]) -> None:
        """Undo one `hold`."""
        assert node.holds > 0, "only what is held can be dropped"
        self._count(node, -1)

    def _count(self, node: Node[P], by: int) -> None:
        one: Node[P] | None = node
        while one is not None:
            one.holds += by
            one = one.parent

    def _evict(self, tokens: int) -> None:
        """Give up the least recently used leaves that nobody holds until so many tokens are free, or none is left."""
        if tokens <= 0:
            return
        heap = [(node.used, id(node), node) for node in self.nodes() if not node.children and not node.holds]
        heapq.heapify(heap)
        goal = self.size - tokens
        while heap and self.size > goal:
            _, _, node = heapq.heappop(heap)
            parent = node.parent
            assert parent is not None, "the root is no leaf to evict"
            assert node.payload is not None, "only the root has no payload"
            del parent.children[node.tokens[0]]
            self.size -= len(node.tokens)
            self._forget(node.payload)
            if parent.parent is not None and not parent.children and not parent.holds:
                heapq.heappush(heap, (parent.used, id(parent), parent))

    def nodes(self) -> Iterator[Node[P]]:
        """All nodes but the root."""
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


def common(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    if first == second:
        return len(first)
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))
