"""Makes the student of a cell, step by step, and measures it; a step that is on disk already is not made again.

Steps are the package's own verbs, plus ``forget``: the same shape with random weights. A checkpoint lies under the key
of all steps up to it, so cells that begin alike share the beginning. Knows nothing of which cells there are.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.utils import logging

from benchmarks.comparison.cells import TEACHER, Cell, Scale, Step
from benchmarks.comparison.quality import Judge
from slmdeploy.compress.distill import distill
from slmdeploy.compress.prune import prune
from slmdeploy.specs import distill_stage


def run(cell: Cell, scale: Scale, data: Path, work: Path, judge: Judge) -> dict[str, Any]:
    """The figures of one cell: what it keeps of the teacher, its parameters, its training tokens, the seconds taken."""
    started, path = time.perf_counter(), TEACHER
    for number, step in enumerate(cell.steps, start=1):
        out = work / cell.key(scale, number)
        if not (out / "model.safetensors").exists():
            _do(step, path, out, data, scale, cell.seed)
        path = out
    stages = [step for step in cell.steps if step["verb"] == "distill"]
    tokens = sum(step["steps"] * step["batch_rows"] * step["length"] for step in stages)
    return judge.figures(path) | {"tokens": tokens, "seconds": time.perf_counter() - started}


def _do(step: Step, path: Path, out: Path, data: Path, scale: Scale, seed: int) -> None:
    settings = {name: value for name, value in step.items() if name != "verb"}
    if step["verb"] == "prune":
        prune(path, out=out, data=data, calibration_tokens=scale.calibration_tokens, seed=seed, force=True, **settings)
    elif step["verb"] == "distill":
        stage = distill_stage(**settings, seed=seed, save_steps=10**6)
        distill(TEACHER, path, out=out, data=data, stage=stage, force=True)
    else:
        _forget(path, out, seed)


def _forget(path: Path, out: Path, seed: int) -> None:
    """The checkpoint at ``path`` with the random weights that its class begins with."""
    logging.disable_progress_bar()
    set_seed(seed)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(path, out, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json", "*.jsonl"))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(out)
