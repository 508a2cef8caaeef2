"""Chooses which whole layers go: those of least block influence, measured anew after each removal, or random ones.

Block influence is how much a layer turns the residual stream: 1 - mean cos(h_in, h_out) of its input and its output
over the calibration tokens, padding left out. A chosen layer is bypassed in place, so that the next measurement sees
the model without it; surgery.py then makes the shorter model. Nothing is re-fitted. Knows nothing of widths, data and
files. Source: Men et al., ShortGPT, arXiv 2403.03853, which measures once; measuring again is its iterative form.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slmdeploy.compress.importance import Method
from slmdeploy.progress import SILENT, Progress


@dataclass(frozen=True)
class Removal:
    """A removed layer by its index in the dense model, and the influence that it had just before it went."""

    layer: int
    influence: float


@dataclass(frozen=True)
class Rows:
    """Calibration rows: ids and positions, int64 [rows, length], and which tokens are real, bool [rows, length]."""

    input_ids: Tensor
    position_ids: Tensor
    valid: Tensor


class Bypass(nn.Module):
    """Stands where a removed layer was and hands the residual stream on."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """The hidden states as they came."""
        return hidden


def remove_layers(
    model: Any, count: int, rows: Rows, *, method: Method, seed: int = 0, progress: Progress = SILENT
) -> list[Removal]:
    """Bypass ``count`` layers of ``model`` in place and return them in the order in which they went.

    The iterative form of ShortGPT: one layer at a time, and the influence of those that are left is measured again on
    the already shortened model, at the price of one pass over ``rows`` per removed layer. "random" takes the layers
    that ``seed`` draws, whatever their influence; every other method takes the one of least influence, the first of
    equal ones.
    """
    layers = model.model.layers
    drawn = torch.randperm(len(layers), generator=torch.Generator().manual_seed(seed)).tolist()
    removed: list[Removal] = []
    progress.start("shorten", count, "layers")
    for turn in range(count):
        influence = block_influence(model, rows)
        index = drawn[turn] if method == "random" else min(influence, key=influence.__getitem__)
        layers[index] = Bypass()
        removed.append(Removal(index, influence[index]))
        progress.advance(1, f"layer {index} influence {influence[index]:.3f}")
    progress.finish()
    return removed


@torch.no_grad()
def block_influence(model: Any, rows: Rows) -> dict[int, float]:
    """BI_l = 1 - mean cos(h_in, h_out) over the real tokens of ``rows``, of each layer that is not bypassed.

    The model runs in its own dtype, one row at a time; cosines and their sum are float64. 0 is a layer that turns
    nothing, 2 one that reverses everything.
    """
    meter = _Meter()
    with ExitStack() as hooks:
        for index, layer in enumerate(model.model.layers):
            if not isinstance(layer, Bypass):
                hooks.callback(layer.register_forward_hook(partial(meter.add, index)).remove)
        for ids, positions, valid in zip(
            rows.input_ids.split(1), rows.position_ids.split(1), rows.valid.split(1), strict=True
        ):
            meter.valid = valid
            model.model(input_ids=ids, position_ids=positions, use_cache=False)
    tokens = int(rows.valid.sum())
    return {index: 1 - total / tokens for index, total in meter.totals.items()}


class _Meter:
    """Sums of cosines by layer, over the ``valid`` tokens of the row that is running."""

    def __init__(self) -> None:
        self.totals: dict[int, float] = {}
        self.valid: Tensor | None = None

    def add(self, index: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook of layer ``index``."""
        cosines = nn.functional.cosine_similarity(inputs[0].double(), output.double(), dim=-1)
        self.totals[index] = self.totals.get(index, 0.0) + cosines[self.valid].sum().item()
