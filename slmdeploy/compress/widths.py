"""Prunes the heads and neurons of every layer in place, layer after layer, with one method; goes on where it stopped.

Removed groups are zero afterwards and nothing is cut yet. Where layers may differ, a first walk over the dense model
finds what each removal would cost in each layer, and allocation.py distributes. Knows methods and layers, nothing of
checkpoints.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from slmdeploy.compress import activations, importance, osscar, surgery
from slmdeploy.compress.allocation import REASON, allocate
from slmdeploy.compress.calibration import Walk
from slmdeploy.compress.frame import Frame, Rows
from slmdeploy.compress.importance import Choice, Method
from slmdeploy.compress.journal import Journal
from slmdeploy.compress.prune import KeptCounts
from slmdeploy.progress import Progress


@dataclass(frozen=True)
class Side:
    """One of the two sets of groups that a layer has: where they are read, how wide one is, how many there are."""

    name: str
    module: str
    size: int
    count: int


class Widths:
    """One pruning of heads and neurons of ``model``, to ``kept`` groups per layer or as many over all layers."""

    def __init__(
        self, model: Any, rows: Rows, method: Method, seed: int, stored: torch.dtype, tile: int, journal: Journal
    ) -> None:
        self.model, self.rows, self.method, self.seed, self.tile = model, rows, method, seed, tile
        self.frame, self.stored, self.journal = Frame(model), stored, journal
        shape = surgery.config_shape(model.config)
        family = self.frame.family
        self.sides = (
            Side("attention", family.attention_out, shape.group_width, shape.kv_heads),
            Side("mlp", family.mlp_out, 1, shape.neurons),
        )
        self.scores = self._scores(shape.group_width)
        self.choices: list[dict[str, Choice]] = []
        self.explained: dict[str, Any] = {"kind": "uniform"}

    def prune(self, kept: KeptCounts, allocation: str, progress: Progress) -> None:
        """Prune every layer."""
        layers = len(self.frame.layers)
        counts = {"attention": [kept.kv_heads] * layers, "mlp": [kept.neurons] * layers}
        if allocation == "global":
            counts = self._allocated(counts, progress)
        walk = Walk(self.frame, self.rows)
        progress.start("prune", layers, "layers")
        for index in range(layers):
            made = self._layer(walk, index, {name: numbers[index] for name, numbers in counts.items()})
            self.choices.append(made)
            walk.advance()
            progress.advance(1, _note(made))
        progress.finish()

    def kept(self) -> list[surgery.Kept]:
        """The kept groups of every layer."""
        return [surgery.Kept(made["attention"].kept, made["mlp"].kept) for made in self.choices]

    def report(self) -> list[dict[str, Any]]:
        """What was chosen in every layer, for the manifest."""
        return [
            {
                "kv_heads": list(made["attention"].kept),
                "neurons": list(made["mlp"].kept),
                **{f"{name}_error": choice.relative_error for name, choice in made.items()},
                **{f"{name}_swapped": choice.swapped for name, choice in made.items()},
            }
            for made in self.choices
        ]

    def singular(self) -> list[str]:
        """The places whose second moments could be inverted only because they are damped."""
        named = [(f"layer {i} {name}", one) for i, made in enumerate(self.choices) for name, one in made.items()]
        return [place for place, choice in named if choice.singular]

    def _layer(self, walk: Walk, index: int, counts: dict[str, int]) -> dict[str, Choice]:
        """Prune one layer, or put in what an earlier run found for it."""
        entry = f"layer-{index}"
        if found := self.journal.read(entry):
            value, weights = found
            for side in self.sides:
                if side.name in weights:
                    self.frame.set_weight(index, side.module, weights[side.name])
            return {name: Choice(**one | {"kept": tuple(one["kept"])}) for name, one in value.items()}
        weights = {}
        made = {}
        for side in self.sides:
            made[side.name] = self._side(walk, index, side, counts[side.name], weights)
        self.journal.write(entry, {name: choice.to_dict() for name, choice in made.items()}, weights)
        return made

    def _side(self, walk: Walk, index: int, side: Side, keep: int, weights: dict[str, Tensor]) -> Choice:
        if keep == side.count:
            return Choice(tuple(range(keep)), 0.0)
        gram, dense = walk.moments(side.module), self.frame.weight(index, side.module)
        if self.method == "osscar":
            choice, weight = importance.by_fit(gram, dense, size=side.size, keep=keep)
        else:
            choice, weight = importance.by_score(gram, dense, self.scores[side.name][index], size=side.size, keep=keep)
        # Rounded as it will be stored, so that later layers are fitted to what really runs.
        weights[side.name] = weight.to(self.stored).float()
        self.frame.set_weight(index, side.module, weights[side.name])
        return choice

    def _scores(self, group_width: int) -> dict[str, list[Tensor]]:
        """What the groups of every layer are ranked by, of the dense model; none for OSSCAR, which needs no score."""
        layers = range(len(self.frame.layers))
        if self.method == "minitron":
            found = activations.measure(self.frame, self.rows, group_width)
            return {"attention": found.kv_heads, "mlp": found.neurons}
        if self.method == "magnitude":
            norms = [surgery.group_norms(self.model, index) for index in layers]
            return {"attention": [one[0] for one in norms], "mlp": [one[1] for one in norms]}
        if self.method == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return {side.name: [torch.rand(side.count, generator=generator) for _ in layers] for side in self.sides}
        return {}

    def _allocated(self, counts: dict[str, list[int]], progress: Progress) -> dict[str, list[int]]:
        """How many groups each layer keeps where together they keep as many as ``counts``."""
        # the sides from which anything goes
        costs = self._costs([side for side in self.sides if counts[side.name][0] != side.count], progress)
        self.explained = {"kind": "global", "reason": REASON}
        for side in self.sides:
            if side.name not in costs:
                continue
            step = self.tile if side.name == "mlp" else 1
            shares = allocate(costs[side.name], sum(counts[side.name]), step)
            counts = counts | {side.name: [share.kept for share in shares]}
            self.explained[side.name] = [asdict(share) for share in shares]
        return counts

    def costs(self, progress: Progress) -> dict[str, list[list[float]]]:
        """What each removal costs by side and layer of the dense model, in the order of removal, relative."""
        return self._costs(self.sides, progress)

    def _costs(self, sides: Sequence[Side], progress: Progress) -> dict[str, list[list[float]]]:
        if self.method != "osscar":
            return {side.name: [importance.score_costs(one) for one in self.scores[side.name]] for side in sides}
        costs: dict[str, list[list[float]]] = {side.name: [] for side in sides}
        walk = Walk(self.frame, self.rows)
        progress.start("weigh", len(self.frame.layers), "layers")
        for index in range(len(self.frame.layers)):
            for side in sides:
                costs[side.name].append(self._layer_costs(walk, index, side))
            walk.advance()
            progress.advance()
        progress.finish()
        return costs

    def _layer_costs(self, walk: Walk, index: int, side: Side) -> list[float]:
        entry = f"costs-{index}-{side.name}"
        if found := self.journal.read(entry):
            stored: list[float] = found[0]
            return stored
        dense = self.frame.weight(index, side.module)
        made = osscar.removal_costs(walk.moments(side.module), dense, size=side.size)
        self.journal.write(entry, made)
        return made


def _note(made: dict[str, Choice]) -> str:
    damped = " (singular, damped)" if any(choice.singular for choice in made.values()) else ""
    return f"error {made['mlp'].relative_error:.3f}{damped}"
