"""Which shape of a decoder loses least within a latency: a pure choice from measured times and estimated losses.

A shape is a depth, a number of KV heads and a number of neurons, alike in all layers. Its time is that of what stands
around the layers, plus for each layer that of a dense one, changed by what its heads and its neurons were measured to
change; between measured numbers of neurons and heads times are interpolated. Its loss is the sum of what its cuts take
away (shape_losses.py). Knows nothing of torch, builds or checkpoints.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from slmdeploy.errors import InfeasibleError, InputError
from slmdeploy.specs import LatencyLimit

Floats = npt.NDArray[np.float64]

DEPTHS = (1, 4)
"""Layers of the two models whose difference is the time of a layer; a model of fewer layers is measured at those."""
NEURON_POINTS = (0.125, 0.25, 0.5, 0.75, 1.0)
HEAD_POINTS = 4


class Clock(Protocol):
    """Times models on the target, each once."""

    def identity(self) -> dict[str, Any]:
        """What is timed, as JSON: the plan of a pruning holds it."""

    def check(self, checkpoint: Path) -> None:
        """Raise InputError for a checkpoint that could not be timed."""

    def milliseconds(self, key: Mapping[str, Any], make: Callable[[Path], None]) -> float:
        """The time of the checkpoint that ``make`` writes into an empty folder and that ``key`` alone determines."""


@dataclass(frozen=True)
class Goal:
    """A limit, and the clock that times what it limits."""

    limit: LatencyLimit
    clock: Clock


class Form(NamedTuple):
    """Layers, KV heads and neurons."""

    layers: int
    kv_heads: int
    neurons: int


@dataclass(frozen=True)
class Choices:
    """The sizes that may be chosen, each rising and ending with the dense model's."""

    layers: tuple[int, ...]
    kv_heads: tuple[int, ...]
    neurons: tuple[int, ...]

    @property
    def dense(self) -> Form:
        """The model as it is."""
        return Form(self.layers[-1], self.kv_heads[-1], self.neurons[-1])


@dataclass(frozen=True)
class Losses:
    """What cuts take of the residual stream, as shares of its squared norm.

    ``layers``: of the model without n of its layers, n from 0 on. ``kv_heads`` and ``neurons`` [layers][sizes]: of a
    layer that keeps as many as `Choices` lists at that place. ``dropped`` are the layers in the order in which they go.
    """

    layers: tuple[float, ...]
    dropped: tuple[int, ...]
    kv_heads: tuple[tuple[float, ...], ...]
    neurons: tuple[tuple[float, ...], ...]

    def grid(self, choices: Choices) -> Floats:
        """The loss of every shape, [layers, heads, neurons] as ``choices`` lists them: of what goes and what stays."""
        heads, neurons = np.array(self.kv_heads), np.array(self.neurons)
        made = []
        for depth in choices.layers:
            gone = len(self.dropped) - depth
            stays = sorted(set(range(len(self.dropped))) - set(self.dropped[:gone]))
            made.append(self.layers[gone] + heads[stays].sum(0)[:, None] + neurons[stays].sum(0)[None])
        return np.array(made)


@dataclass(frozen=True)
class Times:
    """Milliseconds: around the layers, of a dense layer, and by kept heads and neurons what a layer differs by."""

    around: float
    layer: float
    kv_heads: dict[int, float]
    neurons: dict[int, float]

    def grid(self, choices: Choices) -> Floats:
        """The milliseconds of every shape, [layers, heads, neurons] as ``choices`` lists them."""
        heads, neurons = _between(self.kv_heads, choices.kv_heads), _between(self.neurons, choices.neurons)
        layer = self.layer + heads[:, None] + neurons[None]
        return np.asarray(self.around + np.array(choices.layers)[:, None, None] * layer)


def _between(points: dict[int, float], at: Sequence[int]) -> Floats:
    known = sorted(points)
    return np.interp(at, known, [points[one] for one in known])


class Option(NamedTuple):
    """A shape with its milliseconds and its loss."""

    form: Form
    milliseconds: float
    loss: float


@dataclass(frozen=True)
class Chosen:
    """The best shape, the milliseconds of the dense model, and each depth's best shape within the limit."""

    best: Option
    dense_milliseconds: float
    depths: tuple[Option, ...]


def to_measure(choices: Choices, tile: int) -> list[Form]:
    """The few shapes whose times say those of all: two depths of the dense layer, then some heads, some neurons."""
    _, heads, neurons = choices.dense
    depths = sorted({min(depth, choices.layers[-1]) for depth in DEPTHS})
    spread = np.linspace(0, len(choices.kv_heads) - 1, min(HEAD_POINTS, len(choices.kv_heads))).round().astype(int)
    some_heads = [choices.kv_heads[place] for place in spread]
    some_neurons = sorted({max(tile, round(neurons * share / tile) * tile) for share in NEURON_POINTS[:-1]} - {neurons})
    return [
        *(Form(depth, heads, neurons) for depth in depths),
        *(Form(depths[-1], one, neurons) for one in some_heads if one != heads),
        *(Form(depths[-1], heads, one) for one in some_neurons if one < neurons),
    ]


def times_of(forms: Sequence[Form], milliseconds: Sequence[float]) -> Times:
    """The table behind the measured shapes of `to_measure`, in their order.

    Raises InputError for times that no model could have, such as more layers that take no longer.
    """
    found = dict(zip(forms, milliseconds, strict=True))
    deep = max(forms)
    shallow = min(forms, key=lambda form: (form.layers, -form.kv_heads, -form.neurons))
    apart = deep.layers - shallow.layers
    layer = (found[deep] - found[shallow]) / apart if apart else found[deep] / (deep.layers + 1)
    # Around the layers may stand next to nothing, which noise makes negative; half a layer is more than noise.
    if layer <= 0 or found[deep] < (deep.layers - 0.5) * layer:
        raise InputError(
            f"the times of slices contradict each other ({shallow.layers} layers take {found[shallow]:.3g} ms and "
            f"{deep.layers} take {found[deep]:.3g} ms): the machine was busy; remove the table of latencies and run "
            "again while it does nothing else"
        )
    changes = {form: (value - found[deep]) / deep.layers for form, value in found.items() if form.layers == deep.layers}
    return Times(
        around=found[deep] - deep.layers * layer,
        layer=layer,
        kv_heads={form.kv_heads: change for form, change in changes.items() if form.neurons == deep.neurons},
        neurons={form.neurons: change for form, change in changes.items() if form.kv_heads == deep.kv_heads},
    )


def choose(choices: Choices, losses: Losses, times: Times, limit_ms: float) -> Chosen:
    """The shape of least loss within ``limit_ms``, of equal ones the faster.

    Raises InfeasibleError when the fastest shape is above the limit.
    """
    taken, lost = times.grid(choices), losses.grid(choices)
    if taken.min() > limit_ms:
        nearest = _form(choices, int(taken.argmin()))
        raise InfeasibleError(
            f"no shape meets the limit of {limit_ms:g} ms: the fastest, {nearest.layers} layers of "
            f"{nearest.kv_heads} KV heads and {nearest.neurons} neurons, takes {taken.min():.3g} ms; raise the limit "
            "or start from a smaller model"
        )
    depths = []
    for place in range(len(choices.layers)):
        inside = np.where(taken[place] <= limit_ms, lost[place], np.inf).ravel()
        if np.isfinite(inside.min()):
            at = int(np.lexsort((taken[place].ravel(), inside))[0]) + place * inside.size
            depths.append(Option(_form(choices, at), float(taken.flat[at]), float(lost.flat[at])))
    best = min(depths, key=lambda option: (option.loss, option.milliseconds))
    return Chosen(best, float(taken[-1, -1, -1]), tuple(depths))


def _form(choices: Choices, place: int) -> Form:
    layers, heads, neurons = np.unravel_index(place, (len(choices.layers), len(choices.kv_heads), len(choices.neurons)))
    return Form(choices.layers[layers], choices.kv_heads[heads], choices.neurons[neurons])
