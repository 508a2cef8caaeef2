"""Cuts layers, MLP neurons and GQA groups out of a Llama model and makes the smaller, ordinary model of what is left.

`masked` weights (removed groups zero) and cut weights compute the same function; `max_difference` checks that. The kept
indices are always given, never inferred from zeros. Knows nothing of why a layer or a group was chosen.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Config fields that hold one entry per layer; by name, because a list of that length may be something else.
PER_LAYER = ("layer_types", "mlp_layer_types")


@dataclass(frozen=True)
class Shape:
    """Sizes that every layer shares: MLP neurons, KV heads, query heads per KV head, and a head's width."""

    neurons: int
    kv_heads: int
    queries_per_kv: int
    head_dim: int

    @property
    def group_width(self) -> int:
        """Columns of o_proj that belong to one KV head."""
        return self.queries_per_kv * self.head_dim


@dataclass(frozen=True)
class Kept:
    """The KV heads and the neurons of one layer that stay, in rising order."""

    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]


def shape_of(config: Any) -> Shape:
    """The shape that a Llama config describes."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        neurons=config.intermediate_size,
        kv_heads=config.num_key_value_heads,
        queries_per_kv=config.num_attention_heads // config.num_key_value_heads,
        head_dim=head_dim,
    )


def shorten(model: Any, kept: list[int]) -> Any:
    """A new model with only the layers ``kept``, in rising order and counted anew from 0; ``model`` is left as it is.

    The layers that go may have been replaced by something else in ``model`` already.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER:
        if (entries := getattr(config, name, None)) is not None:
            setattr(config, name, [entries[index] for index in kept])
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.")}
    for place, index in enumerate(kept):
        layer = model.model.layers[index].state_dict()
        state.update({f"model.layers.{place}.{name}": tensor for name, tensor in layer.items()})
    return _made(model, config, state)


def cut(model: Any, kept: list[Kept]) -> Any:
    """A new model with only the kept groups of every layer; ``model`` is left as it is.

    Every layer must keep the same numbers of groups, because a Llama config has one number for all.
    """
    shape = shape_of(model.config)
    config = copy.deepcopy(model.config)
    config.intermediate_size = len(kept[0].neurons)
    config.num_key_value_heads = len(kept[0].kv_heads)
    config.num_attention_heads = len(kept[0].kv_heads) * shape.queries_per_kv
    config.head_dim = shape.head_dim  # otherwise derived from the head count, and wrong
    state = dict(model.state_dict())
    for index, layer in enumerate(kept):
        state.update(_cut_layer(state, f"model.layers.{index}.", layer, shape))
    return _made(model, config, state)


def _made(model: Any, config: Any, state: dict[str, Tensor]) -> Any:
    """A model of the class, dtype and generation settings of ``model`` with another config and other tensors."""
    smaller = type(model)(config)
    smaller.load_state_dict(state)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(next(model.parameters()).dtype).eval()


def _cut_layer(state: dict[str, Tensor], prefix: str, kept: Kept, shape: Shape) -> dict[str, Tensor]:
    """The tensors of one layer that change: rows of what feeds a group, columns of what reads it."""
    queries = _span(kept.kv_heads, shape.group_width)
    keys = _span(kept.kv_heads, shape.head_dim)
    neurons = torch.tensor(kept.neurons)
    row_cuts = {
        "self_attn.q_proj": queries,
        "self_attn.k_proj": keys,
        "self_attn.v_proj": keys,
        "mlp.gate_proj": neurons,
        "mlp.up_proj": neurons,
    }
    column_cuts = {"self_attn.o_proj": queries, "mlp.down_proj": neurons}
    changed = {f"{prefix}{name}.weight": state[f"{prefix}{name}.weight"][:, at] for name, at in column_cuts.items()}
    for name, at in row_cuts.items():
        for part in ("weight", "bias"):
            if f"{prefix}{name}.{part}" in state:
                changed[f"{prefix}{name}.{part}"] = state[f"{prefix}{name}.{part}"][at]
    return changed


def _span(groups: tuple[int, ...], width: int) -> Tensor:
    return torch.tensor([group * width + offset for group in groups for offset in range(width)])


def group_norms(layer: nn.Module, shape: Shape) -> tuple[Tensor, Tensor]:
    """Norm of all the weights that would go with each KV head [kv_heads] and each neuron [neurons], float64."""
    weights = {name: weight.detach().double() for name, weight in layer.named_parameters() if weight.ndim == 2}

    def rows(name: str, width: int) -> Tensor:
        return weights[name].square().sum(1).reshape(-1, width).sum(1)

    def columns(name: str, width: int) -> Tensor:
        return weights[name].square().sum(0).reshape(-1, width).sum(1)

    heads = rows("self_attn.q_proj.weight", shape.group_width) + columns("self_attn.o_proj.weight", shape.group_width)
    heads += rows("self_attn.k_proj.weight", shape.head_dim) + rows("self_attn.v_proj.weight", shape.head_dim)
    neurons = rows("mlp.gate_proj.weight", 1) + rows("mlp.up_proj.weight", 1) + columns("mlp.down_proj.weight", 1)
    return heads.sqrt(), neurons.sqrt()


@torch.no_grad()
def max_difference(first: Any, second: Any, input_ids: Tensor) -> float:
    """Largest absolute difference of two models' logits in float32 on ``input_ids`` [rows, length]."""
    logits = [copy.deepcopy(model).float()(input_ids=input_ids, use_cache=False).logits for model in (first, second)]
    return float((logits[0] - logits[1]).abs().max())
