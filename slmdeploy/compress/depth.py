"""Chooses which whole layers go: those of least block influence, measured anew after each removal, or random ones.

Block influence is how much a layer turns the residual stream: 1 - mean cos(h_in, h_out) of its input and its output
over the calibration tokens, padding left out. A chosen layer is bypassed in place, so that the next measurement sees
the model without it; surgery.py then makes the shorter model. Nothing is re-fitted. Knows nothing of widths, data and
files. Source: Men et al., ShortGPT, arXiv 2403.03853, which measures once; measuring again is its iterative form.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slmdeploy.compress.frame import Bypass, Frame, Rows, stream_of
from slmdeploy.compress.importance import Method
from slmdeploy.progress import SILENT, Progress


@dataclass(frozen=True)
class Removal:
    """A removed layer by its index in the dense model, and the influence that it had just before it went."""

    layer: int
    influence: float


def remove_layers(
    model: Any,
    count: int,
    rows: Rows,
    *,
    method: Method,
    seed: int = 0,
    done: Sequence[Removal] = (),
    note: Callable[[list[Removal]], None] = lambda _: None,
    progress: Progress = SILENT,
) -> list[Removal]:
    """Bypass ``count`` layers of ``model`` in place and return them in the order in which they went.

    The iterative form of ShortGPT: one layer at a time, and the influence of those that are left is measured again on
    the already shortened model, at the price of one pass over ``rows`` per removed layer. "random" takes the layers
    that ``seed`` draws, whatever their influence; every other method takes the one of least influence, the first of
    equal ones. ``done`` are removals of an earlier call that was stopped; ``note`` is given all after each.
    """
    layers = Frame(model).layers
    drawn = torch.randperm(len(layers), generator=torch.Generator().manual_seed(seed)).tolist()
    removed = list(done)
    for removal in done:
        layers[removal.layer] = Bypass()
    progress.start("shorten", count, "layers")
    progress.advance(len(removed))
    for turn in range(len(removed), count):
        influence = block_influence(model, rows)
        index = drawn[turn] if method == "random" else min(influence, key=influence.__getitem__)
        layers[index] = Bypass()
        removed.append(Removal(index, influence[index]))
        note(removed)
        progress.advance(1, f"layer {index} influence {influence[index]:.3f}")
    progress.finish()
    return removed


@torch.no_grad()
def block_influence(model: Any, rows: Rows) -> dict[int, float]:
    """BI_l = 1 - mean cos(h_in, h_out) over the real tokens of ``rows``, of each layer that is not bypassed.

    The model runs in its own dtype, one row at a time; cosines and their sum are float64. 0 is a layer that turns
    nothing, 2 one that reverses everything.
    """
    meter, frame = _Meter(), Frame(model)
    with ExitStack() as hooks:
        for index, layer in enumerate(frame.layers):
            if not isinstance(layer, Bypass):
                hooks.callback(layer.register_forward_hook(partial(meter.add, index)).remove)
        for row in range(len(rows.input_ids)):
            meter.valid = rows.valid[row : row + 1]
            frame.run(rows, row)
    tokens = int(rows.valid.sum())
    return {index: 1 - total / tokens for index, total in meter.totals.items()}


class _Meter:
    """Sums of cosines by layer, over the ``valid`` tokens of the row that is running."""

    def __init__(self) -> None:
        self.totals: dict[int, float] = {}
        self.valid: Tensor | None = None

    def add(self, index: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        """A forward hook of layer ``index``."""
        cosines = nn.functional.cosine_similarity(inputs[0].double(), stream_of(output).double(), dim=-1)
        self.totals[index] = self.totals.get(index, 0.0) + cosines[self.valid].sum().item()
