"""The shape of a decoder within a latency: has slices of it timed, its losses estimated, and the choice made.

What is timed is the model's own first layers with their first heads and neurons, since a build takes the same time
whatever its weights are. The choice is kept in the journal: times differ a little from run to run, and a pruning that
goes on must end at the shape that it began with. Between shapes.py (the choice) and a clock, of which it knows nothing.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slmdeploy.compress import loading, shape_losses, surgery
from slmdeploy.compress.frame import Rows
from slmdeploy.compress.journal import Journal
from slmdeploy.compress.prune import Cuts, KeptCounts
from slmdeploy.compress.shapes import Choices, Chosen, Form, Goal, Option, choose, times_of, to_measure
from slmdeploy.compress.widths import Widths
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress

# Of config.json, what says nothing of how long a model takes.
NOT_TIMED = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "initializer_range")


def find_shape(
    goal: Goal, cuts: Cuts, model: Any, rows: Rows, widths: Widths, journal: Journal, progress: Progress
) -> tuple[KeptCounts, dict[str, Any]]:
    """The counts that lose least within the goal, and what the manifest tells of the choice.

    Raises InfeasibleError where no shape is fast enough.
    """
    if found := journal.read("shape"):
        return KeptCounts(**found[0]["kept"]), found[0]["told"]
    choices = choices_of(cuts)
    forms = to_measure(choices, cuts.tile)
    times = _measured(goal, cuts.checkpoint, model, forms, progress)
    losses = shape_losses.estimate(model, rows, widths, choices, progress)
    chosen = choose(choices, losses, times_of(forms, times), goal.limit.limit_ms)
    layers, kv_heads, neurons = chosen.best.form
    kept = KeptCounts(layers, cuts.dense.hidden, kv_heads, neurons)
    if kept == KeptCounts(*(getattr(cuts.dense, size) for size in KeptCounts._fields)):
        raise InputError(
            f"{cuts.checkpoint} takes {chosen.dense_milliseconds:.3g} ms as it is, which {goal.limit} allows: nothing "
            "needs to go"
        )
    told = _told(goal, dict(zip(forms, times, strict=True)), chosen)
    journal.write("shape", {"kept": kept._asdict(), "told": told})
    return kept, told


def choices_of(cuts: Cuts) -> Choices:
    """The sizes that the checkpoint's family can say: whole tiles of neurons, and heads as its config takes them."""
    dense, tile = cuts.dense, cuts.tile
    heads = (dense.kv_heads,) if "kv_heads" in cuts.family.bound else tuple(cuts.fitting_heads(dense.hidden))
    neurons = sorted({*range(tile, dense.neurons, tile), dense.neurons})
    return Choices(tuple(range(1, dense.layers + 1)), heads, tuple(neurons))


def _measured(goal: Goal, checkpoint: Path, model: Any, forms: list[Form], progress: Progress) -> list[float]:
    """Milliseconds of slices of the model in these shapes, through the goal's clock."""
    progress.start("time shapes", len(forms), "shapes")
    found = []
    for form in forms:
        took = goal.clock.milliseconds(key_of(model.config, form), partial(write_slice, checkpoint, model, form))
        found.append(took)
        progress.advance(1, f"{form.layers} x {form.kv_heads} heads, {form.neurons} neurons: {took:.3g} ms")
    progress.finish()
    return found


def key_of(config: Any, form: Form) -> dict[str, Any]:
    """What decides how long a slice takes: the shape, and all that the dense model's config says besides."""
    told = {name: value for name, value in config.to_dict().items() if name not in NOT_TIMED}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
    return {"model_type": config.model_type, "config": digest, **form._asdict()}


def write_slice(checkpoint: Path, model: Any, form: Form, folder: Path) -> None:
    """Write the first layers of the model with their first heads and neurons as a checkpoint."""
    with loading.quiet():
        shorter = surgery.shorten(model, range(form.layers))
        kept = surgery.Kept(tuple(range(form.kv_heads)), tuple(range(form.neurons)))
        surgery.cut(shorter, [kept] * form.layers).to(torch.float32).save_pretrained(folder)
    loading.copy_companions(checkpoint, folder)


def _told(goal: Goal, times: Mapping[Form, float], chosen: Chosen) -> dict[str, Any]:
    return {
        "limit": str(goal.limit),
        **goal.clock.identity(),
        "chosen": _option(chosen.best),
        "dense_ms": chosen.dense_milliseconds,
        "best_of_each_depth": [_option(option) for option in chosen.depths],
        "measured": [{**form._asdict(), "ms": took} for form, took in times.items()],
    }


def _option(option: Option) -> dict[str, Any]:
    return {**option.form._asdict(), "ms": option.milliseconds, "estimated_loss": option.loss}
