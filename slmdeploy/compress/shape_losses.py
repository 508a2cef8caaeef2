"""What cuts of heads, neurons and layers take of a decoder's residual stream, estimated on the dense model.

All in one unit, so that depth and width can be weighed against each other: the squared norm of what is lost, as a share
of the squared norm of the residual stream behind the layer, over calibration tokens. A layer that goes loses its whole
update ‖out - in‖²; a narrower one the relative error of its attention or MLP (OSSCAR's, or that of the method's scores)
times what that part adds to the stream. Losses of several cuts are added, as if they neither met nor cancelled, and
nothing says that equal shares cost equal quality: an estimate to choose by, not a figure to report.
"""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slmdeploy.compress.families import Family
from slmdeploy.compress.frame import Frame, Rows, stream_of
from slmdeploy.compress.shapes import Choices, Losses
from slmdeploy.compress.widths import Widths
from slmdeploy.progress import Progress


def estimate(model: Any, rows: Rows, widths: Widths, choices: Choices, progress: Progress) -> Losses:
    """The losses of every size in ``choices``; ``widths``, of the same dense ``model``, says what removals cost."""
    meters = measure(model, rows)
    counts = {"attention": choices.kv_heads, "mlp": choices.neurons}
    costs = widths.costs(progress)
    shares = {
        name: tuple(
            tuple(_lost(costs[name][layer], kept) * meter.share(name) for kept in counts[name])
            for layer, meter in enumerate(meters)
        )
        for name in counts
    }
    dropped = sorted(range(len(meters)), key=lambda layer: meters[layer].share("layer"))
    layers = [0.0]
    for layer in dropped:
        layers.append(layers[-1] + meters[layer].share("layer"))
    return Losses(tuple(layers), tuple(dropped), shares["attention"], shares["mlp"])


def _lost(costs: list[float], kept: int) -> float:
    """The relative error of a part of which ``kept`` groups are left; ``costs`` of each removal in order."""
    return sum(costs[: len(costs) - kept])


@torch.no_grad()
def measure(model: Any, rows: Rows) -> list["Meter"]:
    """Squared norms in every layer, from one pass over the calibration rows."""
    frame = Frame(model)
    meters = [Meter(getattr(model.config, "residual_multiplier", 1.0)) for _ in frame.layers]
    now: list[Tensor] = []
    with ExitStack() as hooks:
        for index, layer in enumerate(frame.layers):
            hooks.callback(layer.register_forward_hook(partial(meters[index].layer, now)).remove)
            for name, module in _last_of(frame.family).items():
                hook = partial(meters[index].part, now, name)
                hooks.callback(layer.get_submodule(module).register_forward_hook(hook).remove)
        for row in range(len(rows.input_ids)):
            now[:] = [rows.valid[row]]
            frame.run(rows, row)
    return meters


def _last_of(family: Family) -> dict[str, str]:
    """The module whose output a part adds to the stream: its last linear layer, or the norm behind that."""
    if "post_feedforward_layernorm" in family.norms:
        return {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    return {"attention": family.attention_out, "mlp": family.mlp_out}


class Meter:
    """Sums of squares of one layer: of its output, of its update, and of what attention and MLP put out."""

    def __init__(self, multiplier: float = 1.0) -> None:
        self.stream, self.multiplier = 0.0, multiplier
        self.sums = {"layer": 0.0, "attention": 0.0, "mlp": 0.0}

    def share(self, name: str) -> float:
        """A part's squared norm over that of the stream behind the layer; 0 where the stream is nothing at all."""
        return self.sums[name] / self.stream if self.stream > 0 else 0.0

    def layer(self, now: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        """A forward hook of the layer."""
        after, before = stream_of(output)[0][now[0]].double(), inputs[0][0][now[0]].double()
        self.stream += after.square().sum().item()
        self.sums["layer"] += (after - before).square().sum().item()

    def part(self, now: list[Tensor], name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook of the last module of a part, whose output the family may multiply before it is added."""
        self.sums[name] += (output[0][now[0]].double() * self.multiplier).square().sum().item()
