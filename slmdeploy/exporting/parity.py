"""The first half of the parity ladder: torch against the float32 graph that was built from the same checkpoint.

The comparisons themselves are build/ladder.py's, which need no torch and serve the second half too (graph against
build). Here are the limit, the two sides and the verdict. Runs the graph through runtime/, as a device will, not
through a session of its own: a fault in the runtime must fail parity too.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slmdeploy.building.ladder import Rung, climb
from slmdeploy.errors import GateError
from slmdeploy.exporting.eager import EagerModel
from slmdeploy.progress import Progress
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.text import load_tokenizer

LIMIT = 1e-4
"""Largest difference of logits; `Rung.difference` says relative to what."""


def measure(checkpoint: Path, graph: Path, progress: Progress) -> list[Rung]:
    """Every rung between a checkpoint in torch and a graph folder, which needs no manifest yet."""
    config = read_runtime(graph)
    scores = config.score
    both_ways = replace(config, tasks=("generate", "score") if scores else ("generate",))
    candidate = Model(graph, both_ways, load_tokenizer(graph), config.threads)
    rungs = climb(
        EagerModel(checkpoint),
        candidate,
        vocab_size=config.vocab_size,
        max_length=config.max_length,
        label_ids=scores.label_ids if scores else None,
        limit=LIMIT,
    )
    progress.start("compare with torch", None, "checks")
    measured = []
    for rung in rungs:
        measured.append(rung)
        progress.advance(note=rung.name)
    progress.finish()
    return measured


def require_passed(rungs: Sequence[Rung], checkpoint: Path) -> None:
    """Raise GateError naming the worst rung when one is outside its limit."""
    worst = max(rungs, key=lambda rung: rung.difference)
    if not all(rung.passed for rung in rungs):
        raise GateError(
            f"the graph of {checkpoint} differs from torch by {worst.difference:.2g} in {worst.name!r}, more than "
            f"{worst.limit:g}; nothing was written, please report this model"
        )
