"""Training of encoders on tables of texts: finetune, and what `distill --text` comes to."""

from pathlib import Path
from typing import Annotated, Any

import typer

from slmdeploy.commands.options import Force, Json, Out, done, progress

Text = Annotated[str, typer.Option("--text", help="Column of the text.")]
Pair = Annotated[str | None, typer.Option("--pair", help="Column of what the text is paired with.")]
Table = Annotated[Path, typer.Option("--data", help="A .csv, .tsv, .jsonl or .parquet file, or a folder of train.*.")]
_COLUMNS = {"text", "pair", "label"}
_APART = {"teacher", "student", "output", "data", "force", "as_json"}


def finetune(
    checkpoint: Annotated[str, typer.Argument(help="Encoder checkpoint: folder or Hugging Face id.")],
    output: Out,
    data: Table,
    text: Text,
    label: Annotated[str, typer.Option(help="Column of the label: a class, or a score between 0 and 1.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")],
    pair: Pair = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Texts per forward pass of all processes.")] = 32,
    length: Annotated[int, typer.Option(min=4, help="Tokens that a text is cut to.")] = 128,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Forward passes per step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-5,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in mixed precision.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Trade time for memory.")] = False,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints to resume from.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of order.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train an encoder on labels: a classifier or cross-encoder, to be used or to be a teacher."""
    from slmdeploy.compress.encoder_verbs import finetune as verb
    from slmdeploy.specs import TextColumns, encoder_stage

    stage = encoder_stage(
        steps=steps,
        batch_rows=batch_rows,
        length=length,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        dtype="bf16" if bf16 else "fp32",
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
        seed=seed,
    )
    columns = TextColumns(text=text, pair=pair, label=label)
    artifact = verb(
        checkpoint, out=output, data=data, columns=columns, stage=stage, force=force, progress=progress(as_json)
    )
    done(artifact, as_json)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, in whatever place its default comes from."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def distill_texts(context: typer.Context) -> Any:
    """`distill` of encoders, from what was given on its command line; all else keeps an encoder's defaults."""
    from slmdeploy.compress.encoder_verbs import distill_encoder
    from slmdeploy.specs import TextColumns, encoder_stage

    given = {name: value for name, value in context.params.items() if _is_given(context, name)}
    columns = TextColumns(**{name: value for name, value in given.items() if name in _COLUMNS})
    stage = encoder_stage(**{name: value for name, value in given.items() if name not in _COLUMNS | _APART})
    return distill_encoder(
        given["teacher"],
        given["student"],
        out=Path(given["output"]),
        data=Path(given["data"]),
        columns=columns,
        stage=stage,
        force=given.get("force", False),
        progress=progress(given.get("as_json", False)),
    )
