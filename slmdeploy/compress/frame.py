"""A loaded model by the names of its family: its layers, a layer's parts, and one calibration row through it.

What calibration.py, activations.py and depth.py share, so that none of them knows where a family keeps anything.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slmdeploy.compress.families import ROWS, Family


@dataclass(frozen=True)
class Rows:
    """Calibration rows: ids and positions, int64 [rows, length], and which tokens are real, bool [rows, length].

    ``token_types`` are those of pairs, which an encoder may have a use for.
    """

    input_ids: Tensor
    position_ids: Tensor
    valid: Tensor
    token_types: Tensor | None = None


class Bypass(nn.Module):
    """Stands where a layer was and hands the residual stream on."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """The hidden states as they came."""
        return hidden


class Frame:
    """A model whose family is in the table; of an encoder with any head, or with none."""

    def __init__(self, model: Any) -> None:
        self.model = model
        family = ROWS[model.config.model_type]
        whole = family.encoder and model.base_model is model
        self.family: Family = replace(family, base="") if whole else family
        self.base: Any = model.get_submodule(self.family.base)

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the model, in order."""
        stack = self.base.get_submodule(self.family.stack)
        assert isinstance(stack, nn.ModuleList)
        return stack

    def put(self, layers: nn.ModuleList) -> None:
        """Give the model other layers."""
        self.base.set_submodule(self.family.stack, layers)

    def part(self, layer: int, module: str) -> Any:
        """A module of a layer by its path below the layer."""
        return self.layers[layer].get_submodule(module)

    def norms(self, layer: int) -> list[str]:
        """The norms over the hidden width that a layer has: a model with parallel branches may share one."""
        present = {name for name, _ in self.layers[layer].named_modules()}
        return [name for name in self.family.norms if name in present]

    def run(self, rows: Rows, row: int) -> None:
        """Run one row through the base model, without its head; what is wanted of it is caught by hooks."""
        at = slice(row, row + 1)
        if self.family.encoder:
            self.base(**_whole_texts(rows, at))
        else:
            self.base(input_ids=rows.input_ids[at], position_ids=rows.position_ids[at], use_cache=False)

    @torch.no_grad()
    def answer(self, rows: Rows) -> Tensor:
        """What the whole model says of the first row: logits, or of an encoder without a head its states."""
        if self.family.encoder:
            said: Tensor = self.model(**_whole_texts(rows, slice(1)))[0]
        else:
            said = self.model(input_ids=rows.input_ids[:1], use_cache=False).logits
        return said

    def weight(self, layer: int, module: str) -> Tensor:
        """A linear layer's weight [d_in, d_out] in float64, however the family stores it."""
        stored: Tensor = self.part(layer, module).weight.detach()
        return (stored if self.family.transposed else stored.T).double()

    @torch.no_grad()
    def set_weight(self, layer: int, module: str, weight: Tensor) -> None:
        """Put a weight [d_in, d_out] in the place of a linear layer's."""
        self.part(layer, module).weight.copy_(weight if self.family.transposed else weight.T)


def _whole_texts(rows: Rows, at: slice) -> dict[str, Tensor]:
    found = {"input_ids": rows.input_ids[at], "attention_mask": rows.valid[at].long()}
    return found if rows.token_types is None else found | {"token_type_ids": rows.token_types[at]}


def stream_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The residual stream of what a layer returns: some families return it alone, some first of several."""
    return output if isinstance(output, Tensor) else output[0]
