"""Losses inside the blocks: a student's layer outputs and attention outputs against those of chosen teacher layers.

For deep cuts, where the last distribution alone says little to the first layers (TinyBERT, Jiao et al. 2020). Reads the
outputs by hooks, since models name their parts differently. Where widths differ, a linear map takes the student's into
the teacher's space; it is trained along as a part of the student and taken off before the student is saved. Knows
nothing of distributions, rows or files.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slmdeploy.errors import InputError, UnsupportedModelError
from slmdeploy.specs import DistillStage

ATTACHED = "distillation_maps"


class Taps:
    """What modules put out, caught during forward passes."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.caught: dict[int, Tensor] = {}
        for place, module in enumerate(modules):
            module.register_forward_hook(self._catcher(place))

    def _catcher(self, place: int) -> Any:
        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            self.caught[place] = output[0] if isinstance(output, tuple) else output

        return catch

    def take(self, place: int) -> Tensor:
        """The output [rows, length, width] of the module at ``place`` in the last forward pass."""
        return self.caught[place]


class LayerLoss:
    """Compares layers of both models after each has run over the same rows; made once, before training."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, stage: DistillStage) -> None:
        layers, frozen = decoder_layers(student), decoder_layers(teacher)
        chosen = [frozen[i] for i in paired_layers(len(layers), len(frozen), stage.layer_map)]
        self.parts: list[tuple[float, Taps, Taps]] = []
        if stage.hidden_weight > 0:
            self.parts.append((stage.hidden_weight, Taps(layers), Taps(chosen)))
        if stage.attention_weight > 0:
            pair = Taps([attention_of(x) for x in layers]), Taps([attention_of(x) for x in chosen])
            self.parts.append((stage.attention_weight, *pair))
        widths = (student.config.hidden_size, teacher.config.hidden_size)
        self.count = len(layers)
        self.maps: nn.ModuleList | None = None
        if widths[0] != widths[1]:
            self.maps = _maps(widths, len(self.parts) * self.count, stage.seed)
            student.add_module(ATTACHED, self.maps)

    def measure(self, counted: Tensor, weights: Tensor) -> Tensor:
        """Σ over parts of their weight times the mean over layers of Σ over positions of weight·‖s - t‖²/‖t‖².

        ``counted`` bool [rows, length - 1] are the positions, ``weights`` [n] their weights; ‖t‖² is the mean of the
        layer over the positions, since a single one may be near 0.
        """
        total = weights.new_zeros(())
        for number, (share, student, teacher) in enumerate(self.parts):
            for place in range(self.count):
                found = student.take(place)[:, :-1][counted]
                if self.maps is not None:
                    found = self.maps[number * self.count + place](found)
                right = teacher.take(place)[:, :-1][counted].float()
                size = right.square().sum(-1).mean()
                total = total + share / self.count * (weights * (found.float() - right).square().sum(-1)).sum() / size
        return total


def _maps(widths: tuple[int, int], count: int, seed: int) -> nn.ModuleList:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maps = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in range(count))
        for one in maps:
            nn.init.orthogonal_(one.weight)  # type: ignore[arg-type]
    return maps


def detach_maps(student: nn.Module) -> None:
    """Take the maps off a student, which is then an ordinary model again."""
    if hasattr(student, ATTACHED):
        delattr(student, ATTACHED)


def without_maps(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a student without those of its maps."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(f"{ATTACHED}.")}


def paired_layers(student: int, teacher: int, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
    """For each of ``student`` layers the teacher's layer, from 0: as ``chosen``, else evenly, last with last.

    Raises InputError for a choice that does not name one teacher layer for each of the student's, in their order.
    """
    if chosen is None:
        return tuple((i + 1) * teacher // student - 1 for i in range(student))
    if len(chosen) != student or list(chosen) != sorted(set(chosen)) or chosen[-1] >= teacher:
        raise InputError(
            f"layer_map = {list(chosen)} must name {student} layers of the teacher, rising and below {teacher}"
        )
    return chosen


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a decoder in order: its list of as many modules as the config counts layers."""
    count = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {count} layers to compare: use the logits alone"
    )


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a block, by its class: transformers ends their names alike."""
    for module in layer.children():
        if type(module).__name__.endswith("Attention"):
            return module
    raise UnsupportedModelError(f"{type(layer).__name__} has no attention to compare: set attention_weight to 0")
