"""How strongly heads, neurons and channels of the residual stream are active: Minitron's importance, forward only.

Per token the size of a neuron's activation |act(gate)·up|, the L2 norm of what a KV head's query heads hand on, and the
size of a norm's output per channel; the mean over a row's real tokens, then the L2 norm over rows. One pass over the
model as it is, O(width) memory. Knows nothing of what is done with it. Source: Muralidharan et al., Compact Language
Models via Pruning and Knowledge Distillation, arXiv 2407.14679.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slmdeploy.compress.frame import Frame, Rows


@dataclass(frozen=True)
class Activations:
    """Scores by layer, of KV heads [kv_heads] and of neurons [neurons], and of the hidden channels [hidden]; float64.

    ``hidden`` sums over every norm of every layer.
    """

    kv_heads: list[Tensor]
    neurons: list[Tensor]
    hidden: Tensor


@torch.no_grad()
def measure(frame: Frame, rows: Rows, group_width: int) -> Activations:
    """The activations of a dense model over ``rows``; ``group_width`` is how many attention outputs a KV head has."""
    meters: dict[tuple[int, str], _Meter] = {}
    now: list[Tensor] = []
    family = frame.family
    with ExitStack() as hooks:
        for index, layer in enumerate(frame.layers):
            watched = {family.attention_out: _norms_of(group_width), family.mlp_out: torch.abs}
            for module, size in watched.items():
                meter = meters[index, module] = _Meter(size, now)
                hooks.callback(layer.get_submodule(module).register_forward_pre_hook(meter.read).remove)
            for module in frame.norms(index):
                meter = meters[index, module] = _Meter(torch.abs, now)
                hooks.callback(layer.get_submodule(module).register_forward_hook(meter.written).remove)
        for row in range(len(rows.input_ids)):
            now[:] = [rows.valid[row]]
            frame.run(rows, row)
    layers = range(len(frame.layers))
    channels = [meters[index, norm].score() for index in layers for norm in frame.norms(index)]
    return Activations(
        kv_heads=[meters[index, family.attention_out].score() for index in layers],
        neurons=[meters[index, family.mlp_out].score() for index in layers],
        hidden=torch.stack(channels).sum(0),
    )


def _norms_of(width: int) -> Callable[[Tensor], Tensor]:
    return lambda tokens: tokens.reshape(len(tokens), -1, width).norm(dim=-1)


class _Meter:
    """Sums of squared row means of what goes by; ``now`` holds which tokens of the running row are real."""

    def __init__(self, size: Callable[[Tensor], Tensor], now: list[Tensor]) -> None:
        self.size, self.now = size, now
        self.total: Tensor | None = None

    def read(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A forward pre-hook."""
        self._add(inputs[0])

    def written(self, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook."""
        self._add(output)

    def _add(self, values: Tensor) -> None:
        real = values[0][self.now[0]].double()
        if len(real) == 0:
            return
        square = self.size(real).mean(0).square()
        self.total = square if self.total is None else self.total + square

    def score(self) -> Tensor:
        """The L2 norm over the rows."""
        assert self.total is not None
        return self.total.sqrt()
