"""`distill`: a student checkpoint learns a teacher's next-token distributions; one call is one stage.

Checks that the two fit and has the stage run (stage.py), which writes an ordinary checkpoint with its log and goes on
after a kill (resuming.py). Imports torch only when it runs, and knows nothing of losses or layers.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmdeploy.artifacts import Artifact
from slmdeploy.checkpoint import LABELS, Weights, read_config, resolve_checkpoint, tokenizer_file
from slmdeploy.compress import sharded
from slmdeploy.compress.families import ENCODERS
from slmdeploy.compress.resuming import train_into, work_folder
from slmdeploy.errors import InputError
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress
from slmdeploy.specs import DistillStage, data_inputs, is_mixture

if TYPE_CHECKING:
    from slmdeploy.compress.stage import StageRun


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
    data.py), or a mixture of these (a .toml file, mixtures.py). ``cache`` is a folder for what the teacher does only
    once, its texts and its distributions over fixed rows, which further stages with the same rows read; without it that
    goes with the work folder. ``result`` holds
    steps, tokens, processes, the tally of records, and for ``eval_rows`` rows of the valid split the parts of the loss
    in nats before and after. Under `accelerate launch` every process calls this, and the first one writes.

    Raises InputError for models that do not fit each other, unfit data, and a loss that is not finite; the student of
    the last checkpoint is then kept beside ``out``.
    """
    require("build", "torch", "transformers", "accelerate", "datasets")
    sharded.check_stage(stage)
    teacher_path, student_path = resolve_checkpoint(teacher), resolve_checkpoint(student)
    _check_fit(teacher_path, student_path)
    plan = {"verb": "distill", "stage": stage.model_dump(mode="json"), "labels": list(labels)}
    inputs, named = data_inputs(data)
    plan |= named
    inputs |= {"teacher": teacher_path, "student": student_path}
    source = Path(data) if inputs.keys() & {"data"} or is_mixture(data) else str(data)
    work = work_folder(out)

    def load(progress: Progress) -> "StageRun":
        from slmdeploy.compress.stage import Places, StageRun  # brings torch, which a finished stage need not wait for

        places = Places(teacher_path, student_path, source, work, cache or work / "teacher")
        return StageRun(places, stage, labels, progress)

    return train_into(out, load, plan=plan, inputs=inputs, force=force, progress=progress or SILENT)


def _check_fit(teacher: Path, student: Path) -> None:
    """Refuse encoders, a student whose tokens are not the teacher's, and one that is larger than it."""
    for path in (teacher, student):
        if read_config(path).get("model_type") in ENCODERS:
            raise InputError(f"{path} is an encoder: name the column of the texts in a table (--text)")
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
    counts = [parameters(Weights(path)) for path in (teacher, student)]
    if counts[1] > counts[0]:
        raise InputError(
            f"student {student} has {counts[1]:,} parameters and teacher {teacher} only {counts[0]:,}: swap the two"
        )


def parameters(weights: Weights) -> int:
    """How many numbers a checkpoint holds."""
    return sum(math.prod(weights.shape(name)) for name in weights)


def token_ids(checkpoint: Path) -> tuple[Any, ...]:
    """What decides the ids that a text becomes: vocabulary, merges and added tokens, however their file writes them."""
    content = json.loads(tokenizer_file(checkpoint).read_text(encoding="utf-8"))
    model = content["model"]
    # Newer files write a merge as two strings, older ones as one with a blank between.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    added = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
    return model.get("type"), model["vocab"], merges, added, content.get("normalizer"), content.get("pre_tokenizer")
