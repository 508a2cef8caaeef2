"""`distill`: a student checkpoint learns a teacher's next-token distributions; one call is one stage.

Checks that the two fit, keeps the work folder, has the stage run (stage.py) and writes an ordinary checkpoint with its
log. A killed stage goes on from the last Trainer checkpoint, which lies beside the output in `.NAME.work` and goes when
the stage is done. Imports torch only when it runs, and knows nothing of losses or layers.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from slmdeploy.artifacts import Artifact, content_key, open_artifact, writing
from slmdeploy.checkpoint import LABELS, Weights, read_config, resolve_checkpoint, tokenizer_file
from slmdeploy.errors import InputError
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress
from slmdeploy.specs import DistillStage

KEY_FILE = "content_key"


def distill(
    teacher: Path | str,
    student: Path | str,
    *,
    out: Path,
    data: Path | str,
    stage: DistillStage,
    labels: tuple[str, str] = LABELS,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Run one stage and write the student at ``out`` as a checkpoint with ``training_log.jsonl``.

    ``teacher`` and ``student`` are folders or Hugging Face ids; ``data`` is a folder, a file or a dataset's id (see
    data.py). ``result`` holds steps, tokens, the tally of records, and for ``eval_rows`` rows of the valid split the KD
    and cross-entropy in nats per counted token before and after. Raises InputError for models that do not fit each
    other, unfit data, and a loss that is not finite.
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
    with writing(out, kind="checkpoint", plan=plan, inputs=inputs, force=force) as draft:
        from slmdeploy.compress.stage import StageRun  # brings torch, which a finished stage need not wait for

        work = _work_folder(out, content_key("checkpoint", plan, inputs))
        run = StageRun(teacher_path, student_path, data, stage, labels, work, progress or SILENT)
        draft.result.update(run.train(_last_whole(work)))
        run.save(draft.path)
    shutil.rmtree(work, ignore_errors=True)
    return open_artifact(out, "checkpoint")


def _check_fit(teacher: Path, student: Path) -> None:
    """Refuse a student whose vocabulary differs from the teacher's or who is larger than it."""
    sizes = [read_config(path).get("vocab_size") for path in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"teacher {teacher} has a vocabulary of {sizes[0]} and student {student} of {sizes[1]}: "
            "distillation compares tokens, so use a student with the teacher's tokenizer"
        )
    vocabularies = [_vocabulary(path) for path in (teacher, student)]
    if vocabularies[0] != vocabularies[1]:
        raise InputError(f"teacher {teacher} and student {student} have different tokenizers: use the teacher's")
    counts = [_parameters(Weights(path)) for path in (teacher, student)]
    if counts[1] > counts[0]:
        raise InputError(
            f"student {student} has {counts[1]:,} parameters and teacher {teacher} only {counts[0]:,}: swap the two"
        )


def _parameters(weights: Weights) -> int:
    return sum(math.prod(weights.shape(name)) for name in weights)


def _vocabulary(checkpoint: Path) -> Any:
    return json.loads(tokenizer_file(checkpoint).read_text(encoding="utf-8"))["model"]


def _work_folder(out: Path, key: str) -> Path:
    """The folder of Trainer checkpoints beside ``out``; what another plan or other inputs left there is removed."""
    work = out.parent / f".{out.name}.work"
    marker = work / KEY_FILE
    if not marker.is_file() or marker.read_text(encoding="utf-8") != key:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        marker.write_text(key, encoding="utf-8")
    return work


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
