"""Cuts layers, hidden channels, MLP neurons and GQA groups out of a model and makes the smaller one of what is left.

Which tensors a group takes along is the family's row (families.py). The kept indices are always given, never inferred
from zeros. Where all layers keep the same numbers the result is an ordinary checkpoint; where not, its config lists
`layer_shapes`. Masked weights and cut weights compute the same function. Knows nothing of why a layer or a
group was chosen.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slmdeploy.compress.families import Axes, Family, Shape, shape_of
from slmdeploy.compress.frame import Frame

# Config fields that hold one entry per layer; by name, because a list of that length may be something else.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
LAYER_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class Kept:
    """The KV heads and the neurons of one layer that stay, in rising order."""

    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]


def config_shape(config: Any) -> Shape:
    """The shape that a loaded config describes, its defaults included."""
    return shape_of(config.to_dict())


def shorten(model: Any, kept: Sequence[int]) -> Any:
    """A new model with only the layers ``kept``, in rising order and counted anew from 0; ``model`` is left as it is.

    The layers that go may have been replaced by something else in ``model`` already.
    """
    frame, config = Frame(model), copy.deepcopy(model.config)
    _set_size(config, frame.family, "layers", len(kept))
    for name in PER_LAYER:
        if (entries := getattr(config, name, None)) is not None:
            setattr(config, name, [entries[index] for index in kept])
    stack = f"{frame.family.prefix}{frame.family.stack}."
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(stack)}
    for place, index in enumerate(kept):
        layer = frame.layers[index].state_dict()
        state.update({f"{stack}{place}.{name}": tensor for name, tensor in layer.items()})
    return _made(model, config, state)


def cut(model: Any, kept: Sequence[Kept]) -> Any:
    """A new model with only the kept groups of every layer; ``model`` is left as it is."""
    frame, shape = Frame(model), config_shape(model.config)
    config = copy.deepcopy(model.config)
    sizes = [(len(one.kv_heads) * shape.queries_per_kv, len(one.kv_heads), len(one.neurons)) for one in kept]
    alike, fewer_heads = len(set(sizes)) == 1, len(kept[0].kv_heads) != shape.kv_heads
    if alike and not (fewer_heads and frame.family.encoder):
        _set_widths(config, frame.family, shape, kept[0])
        shapes = None
    else:
        shapes = [dict(zip(LAYER_SIZES, one, strict=True)) for one in sizes]
        config.layer_shapes = shapes
        if not frame.family.encoder:  # whose config has the heads that there were, and so says it
            config.head_dim = shape.head_dim
    chosen = [_indices(one, shape) for one in kept]
    state = {
        name: _take(tensor, axes, {} if layer is None else chosen[layer], shape)
        for name, tensor, axes, layer in _tensors(model, frame.family)
    }
    return _made(model, config, state, shapes)


def cut_queries(model: Any, kept: Sequence[Sequence[int]]) -> Any:
    """A new model with only the query heads ``kept`` of every layer, rising, as many of each KV head's everywhere."""
    frame, shape = Frame(model), config_shape(model.config)
    config = copy.deepcopy(model.config)
    _set_size(config, frame.family, "heads", len(kept[0]))
    config.head_dim = shape.head_dim  # otherwise derived from the head count, and wrong
    chosen = [{"queries": _span(one, shape.head_dim)} for one in kept]
    state = {
        name: _take(tensor, axes, {} if layer is None else chosen[layer], shape)
        for name, tensor, axes, layer in _tensors(model, frame.family)
    }
    return _made(model, config, state)


def narrow(model: Any, channels: Sequence[int]) -> Any:
    """A new model whose residual stream has only ``channels``, in rising order; ``model`` is left as it is.

    Norms then take their mean over these alone, as in Minitron. Where the family multiplies embeddings by the root of
    the hidden size, the stored embedding makes up for the change, and the last norm does for a head tied to it.
    """
    frame, shape = Frame(model), config_shape(model.config)
    config = copy.deepcopy(model.config)
    _set_size(config, frame.family, "hidden", len(channels))
    config.head_dim = shape.head_dim  # otherwise derived from the hidden size, and wrong
    chosen = {"hidden": torch.tensor(channels)}
    state = {name: _take(tensor, axes, chosen, shape) for name, tensor, axes, _ in _tensors(model, frame.family)}
    if frame.family.scaled_by_width:
        _keep_scale(state, frame.family, (shape.hidden / len(channels)) ** 0.5, tied=config.tie_word_embeddings)
    return _made(model, config, state)


def _keep_scale(state: dict[str, Tensor], family: Family, factor: float, *, tied: bool) -> None:
    """Let embeddings mean what they did before the width, and with it their multiplier, changed by 1 / ``factor``."""
    embedding, norm = (f"{family.base}.{name}.weight" for name in (family.embeddings[0], family.final_norm))
    state[embedding] = state[embedding] * factor
    if tied:
        state[f"{family.head}.weight"] = state[embedding]
        state[norm] = (state[norm] + family.norm_offset) / factor - family.norm_offset


def are_layer_shapes(value: Any, layers: int) -> bool:
    """Whether ``value`` of config field ``layer_shapes`` has the sizes of every layer, which `resize` can be given."""
    return (
        isinstance(value, list)
        and len(value) == layers
        and all(isinstance(one, dict) and set(one) == set(LAYER_SIZES) for one in value)
        and all(type(size) is int and size > 0 for one in value for size in one.values())
    )


def resize(model: Any, shapes: Sequence[Mapping[str, int]]) -> None:
    """Give the linear layers of ``model`` the sizes of config field ``layer_shapes``, in place; weights are random."""
    frame, shape = Frame(model), config_shape(model.config)
    for index, one in enumerate(shapes):
        heads, kv_heads, neurons = (one[name] for name in LAYER_SIZES)
        sizes = {"hidden": shape.hidden, "queries": heads * shape.head_dim, "keys": kv_heads * shape.head_dim}
        sizes["neurons"] = neurons
        for module, (rows, columns) in frame.family.linear.items():
            old = frame.part(index, module)
            if (old.out_features, old.in_features) != (sizes[rows], sizes[columns]):
                new = nn.Linear(sizes[columns], sizes[rows], bias=old.bias is not None, dtype=old.weight.dtype)
                frame.layers[index].set_submodule(module, new)
        attention = frame.part(index, frame.family.attention_out.rpartition(".")[0])
        attention.num_key_value_groups = heads // kv_heads


def _set_widths(config: Any, family: Family, shape: Shape, kept: Kept) -> None:
    """The numbers that every layer keeps, in the config's own fields; what stays as it was is not touched."""
    if len(kept.neurons) != shape.neurons:
        _set_size(config, family, "neurons", len(kept.neurons))
    if len(kept.kv_heads) != shape.kv_heads:
        _set_size(config, family, "kv_heads", len(kept.kv_heads))
        _set_size(config, family, "heads", len(kept.kv_heads) * shape.queries_per_kv)
        config.head_dim = shape.head_dim  # otherwise derived from the head count, and wrong


def _set_size(config: Any, family: Family, what: str, value: int) -> None:
    setattr(config, family.sizes[what], value)


def _made(model: Any, config: Any, state: dict[str, Tensor], shapes: Sequence[Mapping[str, int]] | None = None) -> Any:
    """A model of the class, dtype and generation settings of ``model`` with another config and other tensors."""
    smaller = type(model)(config)
    if shapes is not None:
        resize(smaller, shapes)
    smaller.load_state_dict(state)
    if not Frame(model).family.encoder:
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(next(model.parameters()).dtype).eval()


def _tensors(model: Any, family: Family) -> Iterator[tuple[str, Tensor, Axes | None, int | None]]:
    """Every tensor of a model with the labels of its dimensions and its layer."""
    for name, tensor in model.state_dict().items():
        axes, layer = family.model_axes(name)
        yield name, tensor, axes, layer


def _indices(kept: Kept, shape: Shape) -> dict[str, Tensor]:
    """What stays of each label that the groups of a layer have."""
    return {
        "queries": _span(kept.kv_heads, shape.group_width),
        "keys": _span(kept.kv_heads, shape.head_dim),
        "neurons": torch.tensor(kept.neurons),
    }


def _span(groups: Sequence[int], width: int) -> Tensor:
    return torch.tensor([group * width + offset for group in groups for offset in range(width)])


def _take(tensor: Tensor, axes: Axes | None, kept: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """The tensor with only the ``kept`` indices of each labelled dimension; dimensions without a choice stay whole."""
    for dimension, label in enumerate(axes or ()):
        parts = label.split("+")
        if any(part in kept for part in parts):
            tensor = tensor.index_select(dimension, _joined(parts, kept, shape))
    return tensor


def _joined(parts: Sequence[str], kept: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """The kept indices of parts that lie behind one another in one dimension."""
    start, found = 0, []
    for part in parts:
        whole = _full(shape)[part]
        found.append(start + kept.get(part, torch.arange(whole)))
        start += whole
    return torch.cat(found)


def _full(shape: Shape) -> dict[str, int]:
    return {
        "hidden": shape.hidden,
        "neurons": shape.neurons,
        "queries": shape.kv_heads * shape.group_width,
        "keys": shape.kv_heads * shape.head_dim,
    }


def group_norms(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Norm of all the weights that would go with each KV head [kv_heads] and each neuron [neurons], float64."""
    frame, shape = Frame(model), config_shape(model.config)
    weights = {name: tensor for name, tensor in frame.layers[layer].state_dict().items() if tensor.ndim == 2}
    found = _label_norms({name: (tensor, frame.family.layer_axes(name)) for name, tensor in weights.items()}, shape)
    heads = torch.zeros(shape.kv_heads, dtype=torch.float64)
    for label in ("queries", "keys"):
        if label in found:
            heads = heads + found[label].reshape(shape.kv_heads, -1).sum(1)
    return heads.sqrt(), found["neurons"].sqrt()


def query_norms(model: Any, layer: int) -> Tensor:
    """Norm of all the weights that would go with each query head [heads], float64."""
    frame, shape = Frame(model), config_shape(model.config)
    weights = {name: tensor for name, tensor in frame.layers[layer].state_dict().items() if tensor.ndim == 2}
    found = _label_norms({name: (tensor, frame.family.layer_axes(name)) for name, tensor in weights.items()}, shape)
    return found["queries"].reshape(-1, shape.head_dim).sum(1).sqrt()


def channel_norms(model: Any) -> Tensor:
    """Norm of all the weights that would go with each hidden channel [hidden], float64."""
    frame, shape = Frame(model), config_shape(model.config)
    tensors = {name: (tensor, axes) for name, tensor, axes, _ in _tensors(model, frame.family) if tensor.ndim == 2}
    return _label_norms(tensors, shape)["hidden"].sqrt()


def _label_norms(tensors: Mapping[str, tuple[Tensor, Axes | None]], shape: Shape) -> dict[str, Tensor]:
    """Sums of squares by label and index, over every tensor that has the label."""
    full, sums = _full(shape), dict[str, Tensor]()
    for tensor, axes in tensors.values():
        for dimension, label in enumerate(axes or ()):
            if label == "rows":
                continue
            squares = tensor.double().square().sum(1 - dimension)
            parts = label.split("+")
            for part, share in zip(parts, squares.split([full[part] for part in parts]), strict=True):
                sums[part] = sums.get(part, torch.zeros_like(share)) + share
    return sums


class OverKept(nn.Module):
    """A norm that takes its statistics over the ``kept`` channels alone and leaves the others zero.

    Put in place of the norms of a model whose other channels are zero, it computes what `narrow` makes of that model.
    """

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        self.inner, self.kept = copy.deepcopy(norm), kept
        for name, parameter in norm.named_parameters():
            setattr(self.inner, name, nn.Parameter(parameter.detach()[kept]))
        if isinstance(norm, nn.LayerNorm):
            self.inner.normalized_shape = (len(kept),)

    def forward(self, hidden: Tensor) -> Tensor:
        """The same shape as ``hidden``, zero where a channel is not kept."""
        whole = torch.zeros_like(hidden)
        whole[..., self.kept] = self.inner(hidden[..., self.kept])
        return whole


@torch.no_grad()
def masked_channels(model: Any, channels: Sequence[int]) -> Any:
    """A copy of ``model`` in its full size in which only ``channels`` of the residual stream are alive."""
    masked = copy.deepcopy(model)
    frame, kept = Frame(masked), torch.tensor(channels)
    for index in range(len(frame.layers)):
        for norm in frame.norms(index):
            frame.layers[index].set_submodule(norm, OverKept(frame.part(index, norm), kept))
    setattr(frame.base, frame.family.final_norm, OverKept(getattr(frame.base, frame.family.final_norm), kept))
    gone = torch.ones(config_shape(model.config).hidden, dtype=torch.bool)
    gone[kept] = False
    for name, tensor, axes, _ in _tensors(masked, frame.family):
        if axes and "hidden" in axes and ".inner." not in name:
            tensor.transpose(0, axes.index("hidden"))[gone] = 0
    return masked
