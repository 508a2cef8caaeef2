"""`distill`: a student checkpoint learns a teacher's next-token distributions; one call is one stage.

Checks that the two fit, keeps the work folder, has the stage run (stage.py) and writes an ordinary checkpoint with its
log. A killed stage goes on from the last Trainer checkpoint, which lies beside the output in `.NAME.work` and goes when
the stage is done. Imports torch only when it runs, and knows nothing of losses or layers.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmdeploy.artifacts import Artifact, content_key, open_artifact, writing
from slmdeploy.checkpoint import LABELS, Weights, read_config, resolve_checkpoint, tokenizer_file
from slmdeploy.errors import InputError
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress
from slmdeploy.specs import DistillStage

if TYPE_CHECKING:
    from slmdeploy.compress.stage import StageRun

KEY_FILE = "content_key"


def distill(
    teacher: Path | str,
    student: Path | str,
    *,
    out: Path,
    data: Path | str,
    stage: DistillStage,
    labels: tuple[str, str] = LABELS,
    cache: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Run one stage and write the student at ``out`` as a checkpoint with ``training_log.jsonl``.

    ``teacher`` and ``student`` are folders or Hugging Face ids; ``data`` is a folder, a file or a dataset's id (see
    data.py). ``cache`` is a folder for what the teacher does only once, its texts and its distributions over fixed
    rows, which further stages with the same rows read; without it that goes with the work folder. ``result`` holds
    steps, tokens, processes, the tally of records, and for ``eval_rows`` rows of the valid split the parts of the loss
    in nats before and after. Under `accelerate launch` every process calls this, and the first one writes.

    Raises InputError for models that do not fit each other, unfit data, and a loss that is not finite; the student of
    the last checkpoint is then kept beside ``out``.
    """
    require("build", "torch", "transformers", "accelerate", "datasets")
    teacher_path, student_path = resolve_checkpoint(teacher), resolve_checkpoint(student)
    _check_fit(teacher_path, student_path)
    plan = {"verb": "distill", "stage": stage.model_dump(mode="json"), "labels": list(labels)}
    inputs = {"teacher": teacher_path, "student": student_path}
    if Path(data).exists():
        inputs["data"] = Path(data)
    else:
        plan["data"] = str(data)
    work = out.parent / f".{out.name}.work"

    def load(progress: Progress) -> "StageRun":
        from slmdeploy.compress.stage import Places, StageRun  # brings torch, which a finished stage need not wait for

        places = Places(teacher_path, student_path, inputs.get("data", str(data)), work, cache or work / "teacher")
        return StageRun(places, stage, labels, progress)

    if _follows():
        return _follow(load(SILENT), work, out)
    with writing(out, kind="checkpoint", plan=plan, inputs=inputs, force=force) as draft:
        _prepare(work, content_key("checkpoint", plan, inputs))
        resume = _last_whole(work)
        run = load(progress or SILENT)
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


def _follow(run: "StageRun", work: Path, out: Path) -> Artifact:
    """Train along; files are the first process's."""
    run.wait()
    run.train(_last_whole(work))
    run.wait()
    return open_artifact(out, "checkpoint")


def _ended(
    error: InputError, run: "StageRun", out: Path, plan: dict[str, Any], inputs: dict[str, Path], work: Path
) -> InputError:
    """The error of a stage that cannot go on, which also says where the student of the last checkpoint is kept."""
    last = _last_whole(work)
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


def _check_fit(teacher: Path, student: Path) -> None:
    """Refuse a student whose tokens are not the teacher's, or who is larger than it."""
    if token_ids(teacher) != token_ids(student):
        raise InputError(
            f"teacher {teacher} and student {student} have different tokenizers: distillation compares tokens, "
            "so use a student with the teacher's tokenizer"
        )
    sizes = [int(read_config(path).get("vocab_size", 0)) for path in (teacher, student)]
    # A teacher's further rows are padding, which is cut; for a student's nothing would be known.
    if sizes[0] < sizes[1]:
        raise InputError(
            f"teacher {teacher} has a vocabulary of {sizes[0]} and student {student} of {sizes[1]}: "
            f"resize the student's embeddings to {sizes[0]}"
        )
    counts = [_parameters(Weights(path)) for path in (teacher, student)]
    if counts[1] > counts[0]:
        raise InputError(
            f"student {student} has {counts[1]:,} parameters and teacher {teacher} only {counts[0]:,}: swap the two"
        )


def _parameters(weights: Weights) -> int:
    return sum(math.prod(weights.shape(name)) for name in weights)


def token_ids(checkpoint: Path) -> tuple[Any, ...]:
    """What decides the ids that a text becomes: vocabulary, merges and added tokens, however their file writes them."""
    content = json.loads(tokenizer_file(checkpoint).read_text(encoding="utf-8"))
    model = content["model"]
    # Newer files write a merge as two strings, older ones as one with a blank between.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    added = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    return model.get("type"), model["vocab"], merges, added, content.get("normalizer"), content.get("pre_tokenizer")


def _prepare(work: Path, key: str) -> None:
    """The folder of Trainer checkpoints beside the output; what another plan or other inputs left there is removed."""
    marker = work / KEY_FILE
    if not marker.is_file() or marker.read_text(encoding="utf-8") != key:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        marker.write_text(key, encoding="utf-8")


def _last_whole(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the Trainer writes its state last."""
    for folder in sorted(work.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder)  # killed while being written
            continue
        return folder
    return None
