"""The torch half of `prune`: loads, calibrates, removes layers, prunes every layer that is left, cuts, checks, saves.

Between the verb (prune.py: checks and files) and the parts that each know one thing: depth, calibration, importance and
surgery.
"""

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slmdeploy.compress import depth, importance, loading, surgery
from slmdeploy.compress.calibration import Prune, Walk
from slmdeploy.compress.data import make_texts, mixed_rows, open_sources
from slmdeploy.compress.importance import Choice, Method
from slmdeploy.compress.prune import LENGTH, KeptCounts
from slmdeploy.errors import GateError, InputError
from slmdeploy.progress import Progress

MAX_DIFFERENCE = 1e-4


def prune_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    data: Path | str,
    kept: KeptCounts,
    method: Method,
    tokens: int,
    seed: int,
    labels: tuple[str, str],
    progress: Progress,
) -> dict[str, Any]:
    """Prune ``checkpoint`` to ``kept``, layers before widths, save into the folder ``out``, say what was done.

    Raises GateError when a cut model and the masked one differ.
    """
    with loading.quiet():
        config = loading.load_config(checkpoint)
        rows = calibration_rows(checkpoint, config, data, tokens, seed, labels)
        model: Any = loading.load_model(checkpoint, torch.float32).eval()
        before, difference = model.num_parameters(), 0.0
        removed: list[depth.Removal] = []
        choices: list[dict[str, Any]] = []

        # 1. Whole layers, so that the widths are fitted to the model that is left.
        if kept.layers < len(model.model.layers):
            removed = _remove_layers(model, kept.layers, rows, data, method, seed, progress)
            gone = {removal.layer for removal in removed}
            shorter = surgery.shorten(model, [i for i in range(len(model.model.layers)) if i not in gone])
            difference = _checked(checkpoint, model, shorter, rows)
            model = shorter

        # 2. The groups of every layer that is left.
        shape = surgery.shape_of(model.config)
        if (kept.kv_heads, kept.neurons) != (shape.kv_heads, shape.neurons):
            pruner = _prune_widths(model, kept, rows, method, seed, loading.stored_dtype(config), progress)
            narrower = surgery.cut(model, pruner.kept())
            difference = max(difference, _checked(checkpoint, model, narrower, rows))
            model, choices = narrower, pruner.report()

        after = model.num_parameters()
        model.to(loading.stored_dtype(config)).save_pretrained(out)
    loading.copy_companions(checkpoint, out)
    return {
        "parameters": {"before": before, "after": after},
        "kept_per_layer": {"kv_heads": kept.kv_heads, "neurons": kept.neurons},
        "cut_max_difference": difference,
        "calibration_tokens": rows.input_ids.numel(),
        "removed_layers": [asdict(removal) for removal in removed],
        "layers": choices,
    }


def _remove_layers(
    model: Any, keep: int, rows: depth.Rows, data: Path | str, method: Method, seed: int, progress: Progress
) -> list[depth.Removal]:
    if not rows.valid.any():
        raise InputError(f"{data} has no token to predict, so that no layer can be measured on it: add completions")
    count = len(model.model.layers) - keep
    return depth.remove_layers(model, count, rows, method=method, seed=seed, progress=progress)


def _prune_widths(
    model: Any, kept: KeptCounts, rows: depth.Rows, method: Method, seed: int, stored: torch.dtype, progress: Progress
) -> "_Pruner":
    """Prune every layer of ``model`` in place: removed groups are zero, nothing is cut yet."""
    pruner = _Pruner(model, kept, method, seed, stored)
    walk = Walk(model, rows.input_ids, rows.position_ids)
    progress.start("prune", len(model.model.layers), "layers")
    for layer in model.model.layers:
        pruner.at(layer, walk)
        progress.advance(1, f"error {pruner.choices[-1][1].relative_error:.3f}")
    progress.finish()
    return pruner


def _checked(checkpoint: Path, masked: Any, smaller: Any, rows: depth.Rows) -> float:
    """The largest logit difference of both; GateError when the cut changed more than rounding does."""
    difference = surgery.max_difference(masked, smaller, rows.input_ids[:1])
    if difference > MAX_DIFFERENCE:
        raise GateError(f"cutting {checkpoint} changed its logits by {difference:.2e}, more than {MAX_DIFFERENCE}")
    return difference


def calibration_rows(
    checkpoint: Path, config: Any, data: Path | str, tokens: int, seed: int, labels: tuple[str, str]
) -> depth.Rows:
    """Packed rows of the training split; of both kinds of records if it has both."""
    length = min(LENGTH, config.max_position_embeddings)
    sources = open_sources(data, "train")
    score_share = {(True, True): 0.5, (True, False): 0.0, (False, True): 1.0}["generate" in sources, "score" in sources]
    texts = make_texts(checkpoint, loading.end_ids(config), labels, score_share > 0)
    stream = mixed_rows(sources, texts, length=length, score_share=score_share, seed=seed)
    rows = list(islice(stream, max(1, tokens // length)))
    return depth.Rows(
        torch.stack([row["input_ids"] for row in rows]),
        torch.stack([row["position_ids"] for row in rows]),
        # The last token of every sequence counts, so what follows the last one that does is padding.
        torch.stack([row["weights"].flip(0).cumsum(0).flip(0) > 0 for row in rows]),
    )


class _Pruner:
    """Prunes one layer after another with one method and remembers the choices (attention, MLP) of each."""

    def __init__(self, model: Any, kept: KeptCounts, method: Method, seed: int, stored: torch.dtype) -> None:
        self.shape = surgery.shape_of(model.config)
        self.heads, self.neurons = kept.kv_heads, kept.neurons
        self.method, self.stored = method, stored
        self.generator = torch.Generator().manual_seed(seed)
        self.choices: list[tuple[Choice, Choice]] = []

    def at(self, layer: nn.Module, walk: Walk) -> None:
        """Prune ``layer`` in place."""
        norms = surgery.group_norms(layer, self.shape)
        made: list[Choice] = []
        walk.step(
            layer,
            self._prune(norms[0], self.shape.group_width, self.heads, made),
            self._prune(norms[1], 1, self.neurons, made),
        )
        self.choices.append((made[0], made[1]))

    def _prune(self, norms: Tensor, size: int, keep: int, made: list[Choice]) -> Prune:
        def apply(linear: nn.Linear, gram: Tensor) -> None:
            choice = self._choose(gram, linear.weight.detach().T.double(), norms, size, keep)
            # Rounded as it will be stored, so that later layers are fitted to what really runs.
            linear.weight.copy_(choice.weight.T.to(self.stored))
            made.append(choice)

        return apply

    def _choose(self, gram: Tensor, dense: Tensor, norms: Tensor, size: int, keep: int) -> Choice:
        if self.method == "magnitude":
            return importance.by_magnitude(gram, dense, norms, size=size, keep=keep)
        if self.method == "random":
            return importance.at_random(gram, dense, self.generator, size=size, keep=keep)
        return importance.osscar(gram, dense, size=size, keep=keep)

    def kept(self) -> list[surgery.Kept]:
        """The kept groups of every layer."""
        return [surgery.Kept(attention.kept, mlp.kept) for attention, mlp in self.choices]

    def report(self) -> list[dict[str, Any]]:
        """Kept indices and errors of every layer, for the manifest."""
        return [
            {
                "kv_heads": list(attention.kept),
                "neurons": list(mlp.kept),
                "attention_error": attention.relative_error,
                "mlp_error": mlp.relative_error,
            }
            for attention, mlp in self.choices
        ]
