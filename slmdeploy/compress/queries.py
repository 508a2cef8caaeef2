"""Prunes single query heads: of every KV head's as many stay, chosen layer after layer in place.

For models with several query heads to a KV head; where each has its own, widths.py removes both at once. Removed heads
are zero in the attention's output projection afterwards, and nothing is cut yet (surgery.py). Knows methods and layers,
nothing of checkpoints.
"""

from typing import Any

import torch
from torch import Tensor

from slmdeploy.compress import activations, importance, surgery
from slmdeploy.compress.calibration import Walk
from slmdeploy.compress.frame import Frame, Rows
from slmdeploy.compress.importance import Choice, Method
from slmdeploy.compress.journal import Journal
from slmdeploy.progress import Progress


class Queries:
    """One pruning of ``model`` to ``keep`` query heads of each KV head; goes on after the last layer of ``journal``."""

    def __init__(
        self, model: Any, rows: Rows, keep: int, method: Method, seed: int, stored: torch.dtype, journal: Journal
    ) -> None:
        self.model, self.rows, self.keep, self.method, self.seed = model, rows, keep, method, seed
        self.stored, self.journal = stored, journal
        self.frame, self.shape = Frame(model), surgery.config_shape(model.config)
        self.scores = self._scores()

    def prune(self, progress: Progress) -> list[Choice]:
        """Prune every layer; returns the choice in each, its ``kept`` the indices of query heads."""
        walk, layers = Walk(self.frame, self.rows), len(self.frame.layers)
        made = []
        progress.start("prune query heads", layers, "layers")
        for index in range(layers):
            made.append(self._layer(walk, index))
            walk.advance()
            progress.advance(1, f"error {made[-1].relative_error:.3f}")
        progress.finish()
        return made

    def _layer(self, walk: Walk, index: int) -> Choice:
        module, entry = self.frame.family.attention_out, f"queries-{index}"
        if found := self.journal.read(entry):
            value, weights = found
            self.frame.set_weight(index, module, weights["attention"])
            return Choice(**value | {"kept": tuple(value["kept"])})
        gram, dense = walk.moments(module), self.frame.weight(index, module)
        sizes = {"size": self.shape.head_dim, "keep": self.keep, "among": self.shape.queries_per_kv}
        if self.method == "osscar":
            choice, weight = importance.by_fit(gram, dense, **sizes)
        else:
            choice, weight = importance.by_score(gram, dense, self.scores[index], **sizes)
        # Rounded as it will be stored, so that later layers are fitted to what really runs.
        weight = weight.to(self.stored).float()
        self.frame.set_weight(index, module, weight)
        self.journal.write(entry, choice.to_dict(), {"attention": weight})
        return choice

    def _scores(self) -> list[Tensor]:
        """What the query heads of every layer are ranked by; none for OSSCAR, which needs no score."""
        layers, heads = range(len(self.frame.layers)), self.shape.kv_heads * self.shape.queries_per_kv
        if self.method == "minitron":
            return activations.measure(self.frame, self.rows, self.shape.head_dim).kv_heads
        if self.method == "magnitude":
            return [surgery.query_norms(self.model, index) for index in layers]
        if self.method == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return [torch.rand(heads, generator=generator) for _ in layers]
        return []
