"""Runs a training as a verb: its output, the folder where a killed one goes on, and several processes.

A killed training goes on from the last Trainer checkpoint, which lies beside the output in `.NAME.work` and goes when
the training is done; what another plan or other inputs left there is removed. One that diverges leaves the model of its
last checkpoint beside the output. Knows nothing of models and losses.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from slmdeploy.artifacts import Artifact, content_key, open_artifact, writing
from slmdeploy.errors import InputError
from slmdeploy.progress import SILENT, Progress

KEY_FILE = "content_key"


class Training(Protocol):
    """A training with everything loaded."""

    def train(self, resume: Path | None) -> dict[str, Any]:
        """Train from a Trainer checkpoint or the start; returns what the manifest tells of it."""

    def save(self, folder: Path) -> None:
        """Write the trained checkpoint."""

    def go_back(self, checkpoint: Path) -> None:
        """Give the model the weights of a Trainer checkpoint again."""

    def wait(self) -> None:
        """Until all processes that train together are here."""


def train_into(
    out: Path,
    load: Callable[[Progress], Training],
    *,
    plan: dict[str, Any],
    inputs: dict[str, Path],
    force: bool,
    progress: Progress,
) -> Artifact:
    """Write at ``out`` the checkpoint that a training makes, or go on with one that was killed.

    Under `accelerate launch` every process calls this, and the first one writes. ``load`` is not called where a resumed
    run finds the output up to date. Raises InputError when the training cannot go on.
    """
    work = work_folder(out)
    if _follows():
        return _follow(load(SILENT), work, out)
    with writing(out, kind="checkpoint", plan=plan, inputs=inputs, force=force) as draft:
        begun = work.exists()
        prepare(work, content_key("checkpoint", plan, inputs))
        resume = last_whole(work)
        try:
            run = load(progress)
        except InputError:
            if not begun:
                shutil.rmtree(work, ignore_errors=True)  # which holds nothing yet
            raise
        run.wait()
        try:
            draft.result.update(run.train(resume))
        except InputError as error:
            raise _ended(error, run, out, plan, inputs, work) from error
        run.save(draft.path)
    run.wait()
    shutil.rmtree(work, ignore_errors=True)
    return open_artifact(out, "checkpoint")


def _follows() -> bool:
    """Whether this is not the first of several processes; torchrun and `accelerate launch` number them."""
    return int(os.environ.get("RANK", "0")) > 0


def _follow(run: Training, work: Path, out: Path) -> Artifact:
    """Train along; files are the first process's."""
    run.wait()
    run.train(last_whole(work))
    run.wait()
    return open_artifact(out, "checkpoint")


def _ended(
    error: InputError, run: Training, out: Path, plan: dict[str, Any], inputs: dict[str, Path], work: Path
) -> InputError:
    """The error of a stage that cannot go on, which also says where the model of the last checkpoint is kept."""
    last = last_whole(work)
    if last is None:
        shutil.rmtree(work, ignore_errors=True)
        return error
    step = int(last.name.split("-")[1])
    key = content_key("checkpoint", plan, inputs)[:8]
    kept = out.parent / f"{out.name}.{key}-step-{step}"
    if not kept.exists():
        with writing(kept, kind="checkpoint", plan={**plan, "stopped_at": step}, inputs=inputs) as draft:
            run.go_back(last)
            run.save(draft.path)
    shutil.rmtree(work, ignore_errors=True)
    return InputError(f"{error}; the student as of step {step} is kept in {kept}")


def work_folder(out: Path) -> Path:
    """Where the checkpoints of the training that writes ``out`` lie."""
    return out.parent / f".{out.name}.work"


def prepare(work: Path, key: str) -> None:
    """Make the folder for the training with this content key; what another plan or other inputs left is removed."""
    marker = work / KEY_FILE
    if not marker.is_file() or marker.read_text(encoding="utf-8") != key:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        marker.write_text(key, encoding="utf-8")


def last_whole(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the Trainer writes its state last."""
    for folder in sorted(work.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder)  # killed while being written
            continue
        return folder
    return None
