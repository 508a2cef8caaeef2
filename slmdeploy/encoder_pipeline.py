"""The compression of an encoder's recipe: fine-tuning, pruning and distillation in order, each an artifact of the run.

What pipeline.py does with decoders, from a table of texts. Knows the order of the verbs and nothing of how they work;
export, builds, measurement and choice are pipeline.py's, the same for all models.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from slmdeploy.artifacts import Artifact
from slmdeploy.checkpoint import resolve_checkpoint
from slmdeploy.errors import InputError
from slmdeploy.progress import Progress
from slmdeploy.specs import EncoderRecipe

Do = Callable[[str, Callable[[], Artifact]], Artifact]
"""Does one named step, unless what it would make is there."""


def table_of(spec: EncoderRecipe, recipe: Path) -> Path:
    """The recipe's table. Raises InputError where it is not beside the recipe."""
    path = recipe.parent / spec.data.source
    if not path.exists():
        raise InputError(f"{recipe}: data.source = {spec.data.source!r} is no file or folder beside it")
    return path


def compress_encoder(
    spec: EncoderRecipe, recipe: Path, teacher: Path, folder: Path, do: Do, progress: Progress
) -> tuple[Path, Path]:
    """The checkpoint to export, and the folder of held-out texts that builds are judged on."""
    from slmdeploy.compress import encoder_texts, encoder_verbs
    from slmdeploy.compress.prune import prune

    # 1. What is read, before any work.
    table, columns = table_of(spec, recipe), spec.data.columns
    named = None if spec.model.student is None else resolve_checkpoint(beside(recipe, spec.model.student))
    texts = do("texts", partial(encoder_texts.held_out_texts, table, columns, folder / "texts")).path

    # 2. The teacher learns the labels.
    if spec.finetune is not None:
        learn = partial(encoder_verbs.finetune, teacher, out=folder / "finetuned", data=table, columns=columns)
        teacher = do("finetune", partial(learn, stage=spec.finetune, progress=progress)).path

    # 3. The student: the teacher with less of it, or a checkpoint of its own.
    student = teacher if named is None else named
    if spec.prune is not None:
        cut = partial(prune, teacher, out=folder / "pruned", data=table, columns=columns, progress=progress)
        student = do("prune", partial(cut, **spec.prune.settings)).path

    # 4. It learns from the teacher, stage by stage.
    for number, stage in enumerate(spec.distill, start=1):
        verb = partial(encoder_verbs.distill_encoder, teacher, student, out=folder / f"distilled-{number}")
        taught = partial(verb, data=table, columns=columns, stage=stage, progress=progress)
        student = do(f"distill {number}", taught).path
    return student, texts


def beside(recipe: Path, name: str) -> str:
    """``name`` as a path beside the recipe where there is one, else unchanged: a Hugging Face id."""
    folder = recipe.parent / name
    return str(folder) if folder.exists() else name
