"""The first half of the parity ladder: torch against the float32 graph that was built from the same checkpoint.

The comparisons themselves are build/ladder.py's, which need no torch and serve the second half too (graph against
build). Here are the limit, the two sides and the verdict. Runs the graph through runtime/, as a device will, not
through a session of its own: a fault in the runtime must fail parity too.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from slmdeploy.building.ladder import Floats, Rung, checks
from slmdeploy.errors import GateError
from slmdeploy.exporting.eager import EagerModel, TorchDecoder
from slmdeploy.progress import Progress
from slmdeploy.runtime.bundle import RuntimeConfig, read_runtime
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.text import load_tokenizer


class TorchSide(Protocol):
    """Opens a checkpoint for torch: EagerModel, or CausalModel where the fast path does not read the checkpoint."""

    def __call__(self, checkpoint: Path, *, max_length: int | None) -> TorchDecoder: ...


LIMIT = 1e-4
"""Largest difference of logits; `Rung.difference` says relative to what."""


def measure(checkpoint: Path, graph: Path, progress: Progress, torch_side: TorchSide = EagerModel) -> list[Rung]:
    """Every rung between a checkpoint in torch and a graph folder, which needs no manifest yet."""
    config = read_runtime(graph)
    labels = config.score.label_ids if config.score else None
    batches = config.interface == "shared"
    asked = list(checks(vocab_size=config.vocab_size, max_length=config.max_length, label_ids=labels, batches=batches))
    progress.start("run torch", len(asked), "checks")
    expected = []
    reference = torch_side(checkpoint, max_length=config.max_length)
    for check in asked:
        expected.append(check.reference(reference))
        progress.advance(note=check.name)
    del reference
    progress.finish()
    progress.start("compare with torch", sum(len(check.parts) for check in asked), "checks")
    candidate, rungs = _Graphs(graph, config), []
    for check, answer in zip(asked, expected, strict=True):
        rungs += check.rungs(answer, check.candidate(candidate), LIMIT)
        progress.advance(len(check.parts), note=check.name)
    progress.finish()
    return rungs


class _Graphs:
    """The runtime's model of a folder with one task at a time: ONNX Runtime keeps its own copy of a graph's weights."""

    def __init__(self, folder: Path, config: RuntimeConfig) -> None:
        self._folder, self._config = folder, config
        self._model: Model | None = None

    def logits(self, input_ids: Sequence[int]) -> Floats:
        return self._open("generate").logits(input_ids)

    def prefill(self, input_ids: Sequence[int]) -> Floats:
        return self._open("generate").prefill(input_ids)

    def decode(self, token: int) -> Floats:
        return self._open("generate").decode(token)

    def batch_logits(self, rows: Sequence[Sequence[int]]) -> Sequence[Floats]:
        return self._open("generate").batch_logits(rows)

    def batch_decode(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> Sequence[Floats]:
        return self._open("generate").batch_decode(prompts, continuations)

    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> Floats:
        return self._open("score").score_ids(prefix_ids, item_ids)

    def _open(self, task: str) -> Model:
        if self._model is None or self._model.tasks != (task,):
            self._model = None  # closed before the next is opened
            config = replace(self._config, tasks=(task,))
            self._model = Model(self._folder, config, load_tokenizer(self._folder), config.threads)
        return self._model


def require_passed(rungs: Sequence[Rung], checkpoint: Path) -> None:
    """Raise GateError naming the worst rung when one is outside its limit."""
    worst = max(rungs, key=lambda rung: rung.difference)
    if not all(rung.passed for rung in rungs):
        raise GateError(
            f"the graph of {checkpoint} differs from torch by {worst.difference:.2g} in {worst.name!r}, more than "
            f"{worst.limit:g}; nothing was written, please report this model"
        )
