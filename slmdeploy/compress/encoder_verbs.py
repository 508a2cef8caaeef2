"""`finetune` and the encoder's form of `distill`: an encoder learns from a table of texts with labels, or a teacher.

`finetune` makes a classifier of an encoder where only labels are given: the teacher, or a baseline. `distill_encoder`
has a student say what a teacher says of the same texts. Tokenizers may differ, since whole texts are compared and not
tokens. Imports torch only when it runs; knows nothing of losses and the Trainer.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmdeploy.artifacts import Artifact
from slmdeploy.checkpoint import Weights, resolve_checkpoint
from slmdeploy.compress.distill import parameters
from slmdeploy.compress.resuming import train_into, work_folder
from slmdeploy.compress.sharded import refuse_for_encoders
from slmdeploy.errors import InputError
from slmdeploy.extras import require
from slmdeploy.progress import SILENT, Progress
from slmdeploy.specs import EncoderStage, TextColumns

if TYPE_CHECKING:
    from slmdeploy.compress.encoder_training import EncoderRun
    from slmdeploy.compress.encoders import Encoder
    from slmdeploy.compress.labelled import Labels, Table

OF_DISTILLATION = ("loss", "temperature", "ce_share", "relation_weight")


def finetune(
    checkpoint: Path | str,
    *,
    out: Path,
    data: Path,
    columns: TextColumns,
    stage: EncoderStage,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Train an encoder on the labels of a table and write a classifier, or cross-encoder, at ``out``.

    Labels are classes; where some label is no whole number they are scores between 0 and 1, and the model gets one
    output. A checkpoint with a head for these classes keeps it, any other gets a new one. ``result`` has the accuracy
    before and after on what was held out. Raises InputError for unfit data, and as `distill` where training diverges.
    """
    require("build", "torch", "transformers", "accelerate", "datasets")
    refuse_for_encoders()
    path = resolve_checkpoint(checkpoint)
    if columns.label is None:
        raise InputError("finetune learns from labels: name their column")
    for name in OF_DISTILLATION:
        if name in stage.model_fields_set:
            raise InputError(f"{name} belongs to distillation, and finetune has no teacher: leave it out")

    def load(progress: Progress) -> "EncoderRun":
        from slmdeploy.compress.encoder_training import EncoderRun, Lesson
        from slmdeploy.compress.encoders import open_encoder
        from slmdeploy.compress.labelled import labels_of, read_table

        table = read_table(data, columns)
        labels = labels_of(table)
        encoder = open_encoder(path, "classifier", stage.length, _wanted(path, labels), stage.seed)
        # what an earlier head was for, which decides how logits become scores, is not what this one learns
        encoder.model.config.problem_type = "single_label_classification" if labels.names else None
        return EncoderRun(encoder, Lesson(*_examples(table, labels), True, None), stage, work_folder(out), progress)

    plan = {"verb": "finetune", "stage": stage.model_dump(mode="json"), "columns": columns.model_dump()}
    inputs = {"checkpoint": path, "data": data}
    return train_into(out, load, plan=plan, inputs=inputs, force=force, progress=progress or SILENT)


def distill_encoder(
    teacher: Path | str,
    student: Path | str,
    *,
    out: Path,
    data: Path,
    columns: TextColumns,
    stage: EncoderStage,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Train a student encoder on what a teacher says of the texts of a table and write it at ``out``.

    A classifier teaches its logits: a student without a head for its classes gets one. An embedder teaches its vectors;
    of other widths than the student's, their relations alone. A label column is needed for ``ce_share`` above 0, and
    otherwise for figures only. ``result`` has agreement and accuracy, or relations, before and after on what was held
    out. Raises InputError for models, losses and data that do not fit, and as `distill` where training diverges.
    """
    require("build", "torch", "transformers", "accelerate", "datasets")
    refuse_for_encoders()
    paths = resolve_checkpoint(teacher), resolve_checkpoint(student)
    counts = [parameters(Weights(path)) for path in paths]
    if counts[1] > counts[0]:
        raise InputError(
            f"student {paths[1]} has {counts[1]:,} parameters and teacher {paths[0]} only {counts[0]:,}: swap the two"
        )
    if stage.ce_share > 0 and columns.label is None:
        raise InputError(f"ce_share = {stage.ce_share} needs labels: name their column, or set it to 0")

    def load(progress: Progress) -> "EncoderRun":
        from slmdeploy.compress.encoder_training import EncoderRun, Lesson
        from slmdeploy.compress.labelled import read_table

        table = read_table(data, columns)
        encoders, labels = _both(*paths, stage)
        if columns.label is not None and labels is None:
            raise InputError("an embedder learns vectors, which labels say nothing of: leave the label column out")
        known = labels if columns.label is not None else None
        lesson = Lesson(*_examples(table, known), known is not None, encoders[0])
        return EncoderRun(encoders[1], lesson, stage, work_folder(out), progress)

    plan = {"verb": "distill encoder", "stage": stage.model_dump(mode="json"), "columns": columns.model_dump()}
    inputs = {"teacher": paths[0], "student": paths[1], "data": data}
    return train_into(out, load, plan=plan, inputs=inputs, force=force, progress=progress or SILENT)


def _both(teacher: Path, student: Path, stage: EncoderStage) -> "tuple[tuple[Encoder, Encoder], Labels | None]":
    """Teacher and student opened for the teacher's role, and the classes of a classifier."""
    from slmdeploy.compress.encoder_losses import FOR_ANY_WIDTH, FOR_CLASSIFIERS, FOR_EMBEDDERS
    from slmdeploy.compress.encoders import open_encoder, role_of
    from slmdeploy.compress.labelled import Labels

    role = role_of(teacher)
    if role != role_of(student) and role == "embedder":
        raise InputError(
            f"teacher {teacher} has no classification head and student {student} has one: fine-tune the teacher on "
            "labels first (slmdeploy finetune)"
        )
    fitting = FOR_CLASSIFIERS if role == "classifier" else FOR_EMBEDDERS
    if stage.loss is not None and stage.loss not in fitting:
        raise InputError(f"loss {stage.loss} is none of a {role}: use one of {', '.join(fitting)}")
    if role == "classifier" and stage.relation_weight > 0:
        raise InputError("relation_weight belongs to embedders, and the teacher is a classifier: leave it out")
    first = open_encoder(teacher, role, stage.length)
    if role == "embedder":
        second = open_encoder(student, role, stage.length)
        widths = [encoder.model.config.hidden_size for encoder in (first, second)]
        if widths[0] != widths[1] and (stage.loss or "cosine") not in FOR_ANY_WIDTH:
            raise InputError(
                f"vectors of teacher and student are {widths[0]} and {widths[1]} wide, which only the loss relation "
                "compares: use it"
            )
        return (first, second), None
    config: Any = first.model.config
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    labels = Labels(names if len(names) > 1 else ())
    if config.problem_type == "multi_label_classification" and (stage.loss != "mse" or stage.ce_share > 0):
        raise InputError(
            f"teacher {teacher} gives a text several labels, which only the loss mse without ce_share teaches: use it"
        )
    second = open_encoder(student, role, stage.length, _wanted(student, labels), stage.seed)
    second.model.config.problem_type = config.problem_type
    return (first, second), labels


def _wanted(checkpoint: Path, labels: "Labels") -> tuple[str, ...] | None:
    """The classes for which a checkpoint needs a new head; None where its own is for them."""
    from slmdeploy.checkpoint import read_config
    from slmdeploy.compress.encoders import role_of

    if role_of(checkpoint) != "classifier":
        return labels.names
    named = read_config(checkpoint).get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(named, dict) or not all(number.isdecimal() for number in named):
        raise InputError(f"{checkpoint / 'config.json'}: id2label is no object of names by number: fetch it again")
    # by number, since as text "10" comes before "2"
    own = tuple(str(named[number]) for number in sorted(named, key=int))
    return None if own == labels.names or (labels.are_scores and len(own) == 1) else labels.names


def _examples(table: "Table", labels: "Labels | None") -> tuple[list[Any], list[Any]]:
    """The records with the numbers of their labels, to train on and to measure on."""

    def numbered(records: list[Any]) -> list[Any]:
        return [(record, 0.0 if labels is None else labels.target(record, table.name)) for record in records]

    return numbered(table.train), numbered(table.valid)
