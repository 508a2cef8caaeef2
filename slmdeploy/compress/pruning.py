"""The torch half of `prune`: loads, calibrates, prunes every layer, cuts, checks, saves.

Between the verb (prune.py: checks and files) and the parts that each know one thing (calibration, importance, surgery).
"""

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slmdeploy.compress import importance, loading, surgery
from slmdeploy.compress.calibration import Prune, Walk
from slmdeploy.compress.data import make_texts, mixed_rows, open_sources
from slmdeploy.compress.importance import Choice, Method
from slmdeploy.compress.prune import LENGTH
from slmdeploy.errors import GateError
from slmdeploy.progress import Progress

MAX_DIFFERENCE = 1e-4


def prune_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    data: Path | str,
    kept: tuple[int, int],
    method: Method,
    tokens: int,
    seed: int,
    labels: tuple[str, str],
    progress: Progress,
) -> dict[str, Any]:
    """Prune ``checkpoint`` to ``kept`` (KV heads, neurons) per layer, save into the folder ``out``, say what was done.

    Raises GateError when the cut model and the masked one differ.
    """
    with loading.quiet():
        config = loading.load_config(checkpoint)
        ids, positions = calibration_rows(checkpoint, config, data, tokens, seed, labels)
        model: Any = loading.load_model(checkpoint, torch.float32).eval()
        pruner = _Pruner(model, kept, method, seed, loading.stored_dtype(config))
        walk = Walk(model, ids, positions)
        progress.start("prune", len(model.model.layers), "layers")
        for layer in model.model.layers:
            pruner.at(layer, walk)
            progress.advance(1, f"error {pruner.choices[-1][1].relative_error:.3f}")
        progress.finish()
        smaller = surgery.cut(model, pruner.kept())
        difference = surgery.max_difference(model, smaller, ids[:1])
        if difference > MAX_DIFFERENCE:
            raise GateError(f"cutting {checkpoint} changed its logits by {difference:.2e}, more than {MAX_DIFFERENCE}")
        before, after = model.num_parameters(), smaller.num_parameters()
        smaller.to(loading.stored_dtype(config)).save_pretrained(out)
    loading.copy_companions(checkpoint, out)
    return {
        "parameters": {"before": before, "after": after},
        "kept_per_layer": {"kv_heads": kept[0], "neurons": kept[1]},
        "cut_max_difference": difference,
        "calibration_tokens": ids.numel(),
        "layers": pruner.report(),
    }


def calibration_rows(
    checkpoint: Path, config: Any, data: Path | str, tokens: int, seed: int, labels: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """Packed input_ids and position_ids [rows, length] of the training split; of both kinds if it has both."""
    length = min(LENGTH, config.max_position_embeddings)
    sources = open_sources(data, "train")
    score_share = {(True, True): 0.5, (True, False): 0.0, (False, True): 1.0}["generate" in sources, "score" in sources]
    texts = make_texts(checkpoint, loading.end_ids(config), labels, score_share > 0)
    stream = mixed_rows(sources, texts, length=length, score_share=score_share, seed=seed)
    rows = list(islice(stream, max(1, tokens // length)))
    return torch.stack([row["input_ids"] for row in rows]), torch.stack([row["position_ids"] for row in rows])


class _Pruner:
    """Prunes one layer after another with one method and remembers the choices (attention, MLP) of each."""

    def __init__(self, model: Any, kept: tuple[int, int], method: Method, seed: int, stored: torch.dtype) -> None:
        self.shape = surgery.shape_of(model.config)
        self.heads, self.neurons = kept
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
