"""Walks a model over calibration rows, each layer seeing what the already pruned layers before it make.

For a layer it gives the second moments XᵀX of what one of its linear layers reads, streamed row by row in float64, so
that a layer costs O(d²) memory beside the residual stream of the rows. The model itself computes masks and rotary
embeddings of the layer, with every other layer stood in for. Knows nothing of how groups are chosen, nor of families.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slmdeploy.compress.frame import Bypass, Frame, Rows, stream_of


class Walk:
    """The residual stream of calibration rows, moved through the model one layer at a time, from layer 0 on.

    Padding takes part in the forward passes, which it does not change, and in no statistic.
    """

    def __init__(self, frame: Frame, rows: Rows) -> None:
        self.frame, self.rows, self.at = frame, rows, 0
        self.hidden: list[Tensor | None] = [None] * len(rows.input_ids)

    @torch.no_grad()
    def moments(self, module: str) -> Tensor:
        """XᵀX [d_in, d_in], float64, of what the linear layer ``module`` of the current layer reads."""
        linear = self.frame.part(self.at, module)
        total: list[Tensor] = []

        def add(row: int, inputs: Tensor) -> None:
            flat = inputs[0][self.rows.valid[row]].double()
            if not total:
                total.append(torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64))
            total[0].addmm_(flat.T, flat)

        with self._alone():
            for row in range(len(self.hidden)):
                hook = linear.register_forward_pre_hook(lambda _, inputs, row=row: add(row, inputs[0]))
                try:
                    self._run(row)
                finally:
                    hook.remove()
        return total[0]

    @torch.no_grad()
    def advance(self) -> None:
        """Move the rows through the current layer as it is now, and on to the next."""
        with self._alone():
            self.hidden = [self._run(row) for row in range(len(self.hidden))]
        self.at += 1

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only the current layer is in the model: the rest of a forward pass costs next to nothing."""
        layers = self.frame.layers
        stand_ins: list[nn.Module] = [layer if i == self.at else Bypass() for i, layer in enumerate(layers)]
        self.frame.put(nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            self.frame.put(layers)

    def _run(self, row: int) -> Tensor:
        """The output [1, length, hidden] of the current layer for one row."""
        before, caught = self.hidden[row], []
        layer = self.frame.layers[self.at]

        def swap(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return inputs if before is None else (before, *inputs[1:])

        hooks = (
            layer.register_forward_pre_hook(swap),
            layer.register_forward_hook(lambda _, __, output: caught.append(stream_of(output))),
        )
        try:
            self.frame.run(self.rows, row)
        finally:
            for hook in hooks:
                hook.remove()
        output: Tensor = caught[0]
        return output
