"""Shapes by measured latency against shapes by parameters: `PYTHONPATH=. python benchmarks/latency_shapes.py`.

For limits that are shares of the shipped teacher's own latency, both choices lose least by the same estimate: one among
all shapes within the limit, one among the shapes that lose least for their number of parameters, of which the best
within the limit is taken. Both are then pruned, and their latency, parameters and perplexity before any training are
measured. Run it on a machine that does nothing else. Writes benchmarks/results/latency_shapes.json.
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.pruning_methods import TEACHER, perplexity
from slmdeploy import corpus
from slmdeploy.artifacts import machine
from slmdeploy.checkpoint import LABELS
from slmdeploy.compress import loading, shape_losses, shaping
from slmdeploy.compress.journal import Journal
from slmdeploy.compress.prune import cuts_of, prune
from slmdeploy.compress.pruning import calibration_rows
from slmdeploy.compress.shapes import Choices, Floats, Form, Losses, Times, choose, times_of, to_measure
from slmdeploy.compress.widths import Widths
from slmdeploy.latency import BuildClock
from slmdeploy.progress import SILENT
from slmdeploy.specs import load_profile, parse_latency

RESULTS = Path(__file__).parent / "results" / "latency_shapes.json"


def tables(options: argparse.Namespace, clock: BuildClock, data: Path) -> tuple[Choices, Times, Losses]:
    """The measured times and the estimated losses of every shape of the teacher."""
    cuts = cuts_of(TEACHER)
    choices = shaping.choices_of(cuts)
    config = loading.load_config(TEACHER)
    with loading.quiet():
        model: Any = loading.load_model(TEACHER, torch.float32).eval()
        rows = calibration_rows(TEACHER, config, data, options.tokens, 0, LABELS)
        forms = to_measure(choices, cuts.tile)
        times = [
            clock.milliseconds(shaping.key_of(config, form), partial(shaping.write_slice, TEACHER, model, form))
            for form in forms
        ]
        entries = options.work / "losses"
        entries.mkdir(parents=True, exist_ok=True)
        widths = Widths(model, rows, "osscar", 0, torch.float32, cuts.tile, Journal(entries))
        losses = shape_losses.estimate(model, rows, widths, choices, SILENT)
    return choices, times_of(forms, times), losses


def parameters(choices: Choices) -> Floats:
    """Parameters in the linear layers of every shape, [layers, heads, neurons]."""
    dense = cuts_of(TEACHER).dense
    per_head = dense.hidden * dense.head_dim * 2 * (dense.queries_per_kv + 1)
    heads, neurons = np.array(choices.kv_heads), np.array(choices.neurons)
    return np.array(choices.layers)[:, None, None] * (per_head * heads[:, None] + 3 * dense.hidden * neurons)


def by_parameters(choices: Choices, times: Times, losses: Losses, limit_ms: float) -> Form:
    """Of the shapes that lose least for their parameters, the one that loses least within the limit."""
    size, lost, taken = (grid.ravel() for grid in (parameters(choices), losses.grid(choices), times.grid(choices)))
    order = np.lexsort((lost, size))
    ahead = np.concatenate(([np.inf], np.minimum.accumulate(lost[order])[:-1]))
    front = order[(lost[order] < ahead) & (taken[order] <= limit_ms)]
    shape = (len(choices.layers), len(choices.kv_heads), len(choices.neurons))
    layers, heads, neurons = np.unravel_index(front[lost[front].argmin()], shape)
    return Form(choices.layers[layers], choices.kv_heads[heads], choices.neurons[neurons])


def measure(form: Form, clock: BuildClock, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The teacher pruned to this shape: what it really takes and what it keeps."""
    dense = shaping.choices_of(cuts_of(TEACHER)).dense
    layers, heads, neurons = (1 - kept / whole for kept, whole in zip(form, dense, strict=True))
    out = options.work / "-".join(map(str, form))
    shares = {"ratio": neurons, "attention_ratio": heads, "layer_ratio": layers}
    made = prune(TEACHER, out=out, data=data, calibration_tokens=options.tokens, force=True, **shares)
    copy = partial(shutil.copytree, made.path, dirs_exist_ok=True)
    took = clock.milliseconds({"pruned": made.content_key}, copy)
    found = {"ms": took, "parameters": made.result["parameters"]["after"]}
    return {**form._asdict(), **found, "perplexity": perplexity(made.path, data, options.rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("work/latency_shapes"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--metric", default="ttft_448_ms")
    parser.add_argument("--profile", default="cpu-int8-split")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.35], help="of the dense latency")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--rows", type=int, default=24, help="validation rows of 512 tokens")
    options = parser.parse_args()
    data = options.work / "data"
    if not data.exists():
        corpus.prepare(data)
    clock = BuildClock(
        load_profile(options.profile), parse_latency(f"{options.metric}<=1"), options.work / "times.json"
    )
    clock.check(TEACHER)
    choices, times, losses = tables(options, clock, data)
    dense = float(times.grid(choices)[-1, -1, -1])
    settings = {name: getattr(options, name) for name in ("metric", "profile", "tokens", "rows")}
    found: dict[str, Any] = {"settings": settings, "machine": machine(), "dense_ms": dense, "limits": []}
    for share in options.shares:
        chosen = choose(choices, losses, times, share * dense).best
        other = by_parameters(choices, times, losses, share * dense)
        row = {
            "limit_ms": share * dense,
            "by_latency": {"predicted_ms": chosen.milliseconds, **measure(chosen.form, clock, data, options)},
            "by_parameters": measure(other, clock, data, options),
        }
        found["limits"].append(row)
        print(json.dumps(row), flush=True)
        options.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
