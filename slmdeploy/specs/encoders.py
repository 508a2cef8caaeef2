"""How an encoder is trained: the columns of a table of texts, and one stage of fine-tuning or distillation.

Imports nothing of torch, because command lines are read where no torch is. What the keys do is in docs/encoders.md.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from slmdeploy.errors import SpecError
from slmdeploy.specs.base import AboveZero, Positive, Share, Spec


class TextColumns(Spec):
    """Which columns of a table hold the text, what it is paired with, and the label; the last two where there are."""

    text: str
    pair: str | None = None
    label: str | None = None


class EncoderStage(Spec):
    """One training of an encoder on texts.

    ``batch_rows`` is texts, or pairs, per forward pass of all processes together, ``length`` the tokens that a text is
    cut to. Of distillation alone: ``loss`` compares with the teacher (encoder_losses.py), kl and mse of classifiers,
    cosine, mse and relation of embedders, left out kl or cosine; ``temperature`` is that of kl, ``ce_share`` the share
    of the loss of the labels, ``relation_weight`` adds the loss of relations to an embedder's.
    """

    steps: Positive
    batch_rows: Positive = 32
    length: Annotated[int, Field(ge=4)] = 128
    gradient_accumulation: Positive = 1
    learning_rate: AboveZero = 5e-5
    warmup_share: Share = 0.05
    loss: Literal["kl", "mse", "cosine", "relation"] | None = None
    temperature: AboveZero = 1.0
    ce_share: Share = 0.0
    relation_weight: Annotated[float, Field(ge=0.0, strict=False)] = 0.0
    dtype: Literal["bf16", "fp32"] = "fp32"
    gradient_checkpointing: bool = False
    save_steps: Positive = 100
    seed: int = 0


def encoder_stage(**fields: Any) -> EncoderStage:
    """An EncoderStage from loose fields, as a command line gives them; raises SpecError with the first wrong one."""
    try:
        return EncoderStage.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise SpecError(f"training of an encoder does not take {name}: leave it out") from error
        raise SpecError(f"training of an encoder: {name}: {first['msg'].removeprefix('Value error, ')}") from error
