"""What a stage of distillation is told: plain settings, validated, without torch, so that recipes can hold them.

Knows nothing of how a stage runs (training.py) nor of where its models and data are (the verb in distill.py).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slmdeploy.errors import SpecError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0, strict=False)]
PositiveReal = Annotated[float, Field(gt=0.0, strict=False)]


class DistillStage(BaseModel):
    """One stage of distillation: supervised when ``on_policy`` is 0, otherwise partly on what the student writes.

    The loss of a counted token is ``ce_share``·CE + (1 - ``ce_share``)·KD, where KD is ``loss`` at ``temperature``,
    multiplied by its square. ``beta`` is generalised JSD's weight of the teacher (GKD, Agarwal et al. 2024): 0 is the
    forward KL, 1 the reverse. ``score_share`` is the share of rows that hold scoring records. ``on_policy`` is the
    probability that a batch's responses are sampled from the student. Lengths are in tokens, ``batch_rows`` is rows of
    ``length`` tokens per forward pass, and one optimiser step sees ``batch_rows · gradient_accumulation`` of them.
    ``optimizer`` = "muon" orthogonalises the updates of the blocks' matrices and leaves the rest to AdamW at a fixed
    share of ``learning_rate`` (training.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    steps: Positive
    batch_rows: Positive = 8
    length: Annotated[int, Field(ge=16)] = 512
    gradient_accumulation: Positive = 1
    learning_rate: PositiveReal = 1e-3
    warmup_share: Share = 0.05
    optimizer: Literal["adamw", "muon"] = "adamw"
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Share | None = None
    temperature: PositiveReal = 1.0
    ce_share: Share = 0.0
    score_share: Share = 0.0
    on_policy: Share = 0.0
    response_tokens: Positive = 64
    sample_temperature: PositiveReal = 0.9
    dtype: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    save_steps: Positive = 100
    eval_rows: Annotated[int, Field(ge=0)] = 16
    seed: int = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if (self.beta is None) == (self.loss == "jsd"):
            raise ValueError(f"beta goes with loss = 'jsd' and with no other, and loss = {self.loss!r}")
        if self.on_policy > 0 and self.score_share == 1:
            raise ValueError("on_policy needs rows of text to sample: lower score_share below 1")
        if self.on_policy > 0 and self.response_tokens > self.length // 2:
            raise ValueError(f"response_tokens = {self.response_tokens} leaves too little of length = {self.length}")
        return self

    @property
    def rows(self) -> int:
        """Rows that the whole stage sees."""
        return self.steps * self.batch_rows * self.gradient_accumulation

    @property
    def tokens(self) -> int:
        """Tokens that the whole stage sees, padding included."""
        return self.rows * self.length


def distill_stage(**fields: Any) -> DistillStage:
    """A DistillStage from loose fields, as a command line gives them; raises SpecError with the first wrong one."""
    try:
        return DistillStage.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"distillation stage: {where + ': ' if where else ''}{reason}") from error
