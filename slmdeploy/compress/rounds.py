"""Pruning in rounds: which share goes in each, so that the last one ends at the shape that one round would have made.

Every round takes the same share of what is left, since a cut hurts by how much of a layer goes at once. Sizes after a
round are those that one pruning to the same share would keep, tiles included; the shares are worked back from them.
Training between the rounds is the pipeline's. Knows config.json and nothing of torch, methods or weights.
"""

from pathlib import Path

from slmdeploy.compress.prune import Cuts, KeptCounts, cuts_of
from slmdeploy.errors import InputError
from slmdeploy.specs import PrunePlan


def rounds(checkpoint: Path, plan: PrunePlan) -> list[PrunePlan]:
    """The plan of each round of ``plan`` for the dense ``checkpoint``, in order; each is for what the one before made.

    With a share r of whole, 1 - (1 - r)^(i/n) of it is gone after round i of n. Raises InputError where some round
    would remove nothing, and as `prune` does for shares that do not fit the checkpoint.
    """
    cuts = cuts_of(checkpoint)
    dense = cuts.dense
    before, made = KeptCounts(dense.layers, dense.hidden, dense.kv_heads, dense.neurons), []
    for number in range(1, plan.rounds + 1):
        after = _kept(cuts, plan, number, before)
        if after == before:
            raise InputError(
                f"{checkpoint}: rounds = {plan.rounds} are too many, since round {number} would remove nothing: "
                "lower them or raise a ratio"
            )
        made.append(_step(plan, before, after))
        before = after
    return made


def _kept(cuts: Cuts, plan: PrunePlan, number: int, before: KeptCounts) -> KeptCounts:
    """What is left of the dense model after round ``number``, ``before`` which there was so much."""

    def gone(share: float) -> float:
        left: float = (1 - share) ** (number / plan.rounds)
        return 1 - left

    hidden, ratio = cuts.hidden(gone(plan.hidden_ratio)), plan.ratio or 0.0
    share = ratio if plan.attention_ratio is None else plan.attention_ratio
    if number == plan.rounds:
        kv_heads = cuts.kv_heads(share, hidden)
    else:
        hidden, kv_heads = _fitting(cuts, hidden, cuts.dense.kv_heads * (1 - gone(share)), before)
    return KeptCounts(cuts.layers(gone(plan.layer_ratio)), hidden, kv_heads, cuts.neurons(gone(ratio)))


def _fitting(cuts: Cuts, hidden: int, heads: float, before: KeptCounts) -> tuple[int, int]:
    """On the way, what the config class refuses gives way to the next larger: the nearest width, then KV heads."""
    widths = [*range(hidden, before.hidden, cuts.tile), before.hidden]
    pairs = ((width, n) for width in widths for n in cuts.fitting_heads(width) if heads <= n <= before.kv_heads)
    return next(pairs, (before.hidden, before.kv_heads))


def _step(plan: PrunePlan, before: KeptCounts, after: KeptCounts) -> PrunePlan:
    """The shares that lead from one shape to the next: they round to it, since its sizes are whole tiles and heads."""
    shares = {
        name: 1 - getattr(after, size) / getattr(before, size)
        for name, size in (
            ("ratio", "neurons"),
            ("attention_ratio", "kv_heads"),
            ("layer_ratio", "layers"),
            ("hidden_ratio", "hidden"),
        )
    }
    return plan.model_copy(update={**shares, "rounds": 1, "between": None})
