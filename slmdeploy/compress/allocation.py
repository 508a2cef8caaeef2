"""How many groups each layer keeps where layers need not be alike: those go whose removal costs least over all layers.

A layer's costs are what each further removal adds to its relative output error, in the order in which it would remove
its groups. The cheapest next removal of any layer goes first, until the whole model is as small as asked. Errors of
different layers are compared as if they mattered alike, which is a heuristic. Knows nothing of models and of torch.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

REASON = (
    "groups went in the order of the relative error that their removal adds to their layer, over all layers; "
    "next_cost is what one more removal per group would have added"
)
"""What the numbers of an `Allocation` mean, for the manifest."""


@dataclass(frozen=True)
class Allocation:
    """Groups that a layer keeps, the relative error that its removals add, and per group that of the next removal.

    `next_cost` is None for a layer at its smallest.
    """

    kept: int
    removed_cost: float
    next_cost: float | None


def allocate(costs: Sequence[Sequence[float]], keep: int, step: int = 1) -> list[Allocation]:
    """Distribute ``keep`` groups over the layers; ``costs`` [layers][groups] in removal order, one per group.

    A layer keeps a multiple of ``step``, at least one, or all; so up to ``step`` - 1 groups more may go than asked.
    """
    kept = [len(one) for one in costs]
    spent = [0.0] * len(costs)
    queue = [(cost, layer) for layer, one in enumerate(costs) if (cost := _next(one, kept[layer], step)) is not None]
    heapq.heapify(queue)
    excess = sum(kept) - keep
    while excess > 0 and queue:
        cost, layer = heapq.heappop(queue)
        gone = _unit(kept[layer], step)
        kept[layer] -= gone
        spent[layer] += cost * gone
        excess -= gone
        if (following := _next(costs[layer], kept[layer], step)) is not None:
            heapq.heappush(queue, (following, layer))
    return [Allocation(kept[layer], spent[layer], _next(one, kept[layer], step)) for layer, one in enumerate(costs)]


def _unit(kept: int, step: int) -> int:
    """How many groups go at a time: down to the next multiple of ``step``."""
    return kept % step or step


def _next(costs: Sequence[float], kept: int, step: int) -> float | None:
    """The mean cost per group of a layer's next removal; None where it would leave no group."""
    unit, gone = _unit(kept, step), len(costs) - kept
    return sum(costs[gone : gone + unit]) / unit if unit < kept else None
