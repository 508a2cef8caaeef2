"""One stage of distillation as a recipe or a command line says it, with what cannot go together refused.

Imports nothing of torch, because recipes are read where no torch is. What the keys do is in docs/distillation.md.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from slmdeploy.errors import SpecError
from slmdeploy.specs.base import AboveZero, Positive, Share, Spec

NotNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0.0)]
SKEWED = ("skew_kl", "reverse_skew_kl")


class DistillStage(Spec):
    """One stage of distillation: supervised when ``on_policy`` is 0, otherwise partly on what the student writes.

    The loss of a counted token is ``ce_share``·CE + (1 - ``ce_share``)·KD, where KD is ``loss`` at ``temperature``,
    multiplied by its square. ``beta`` is generalised JSD's weight of the teacher (GKD, Agarwal et al. 2024): 0 is the
    forward KL, 1 the reverse; ``skew`` is DistiLLM's alpha, 0.1 when left out.

    ``score_share`` is the share of rows that hold scoring records, ``score_items`` the items that a record shows per
    visit; ``score_loss`` = margin or listwise takes the place of the tokens' loss at their label words (scores.py).
    ``hidden_weight`` and ``attention_weight`` add losses of layer outputs and attention outputs (layers.py);
    ``layer_map`` names for each layer of the student one of the teacher's, from 0.

    ``on_policy`` is the probability that a batch's responses are sampled from the student. ``seq_kd_texts`` is the
    number of prompts that the teacher answers beforehand; its texts then stand for the data's completions.
    ``cached_rows`` is the number of rows that the stage goes over again and again, the teacher's ``cached_top``
    likeliest tokens computed once for each.

    Lengths are in tokens, ``batch_rows`` is rows of ``length`` tokens per forward pass of all processes together, and
    one optimiser step sees ``batch_rows · gradient_accumulation`` of them. ``optimizer`` = "muon" orthogonalises the
    updates of the blocks' matrices and leaves the rest to AdamW at a fixed share of ``learning_rate`` (training.py).
    """

    steps: Positive
    batch_rows: Positive = 8
    length: Annotated[int, Field(ge=16)] = 512
    gradient_accumulation: Positive = 1
    learning_rate: AboveZero = 1e-3
    warmup_share: Share = 0.05
    optimizer: Literal["adamw", "muon"] = "adamw"
    loss: Literal["forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "reverse_skew_kl"] = "forward_kl"
    beta: Share | None = None
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    temperature: AboveZero = 1.0
    ce_share: Share = 0.0
    score_share: Share = 0.0
    score_loss: Literal["tokens", "margin", "listwise"] = "tokens"
    score_items: Annotated[int, Field(ge=2)] = 3
    hidden_weight: Weight = 0.0
    attention_weight: Weight = 0.0
    layer_map: Annotated[tuple[NotNegative, ...], Field(min_length=1, strict=False)] | None = None
    on_policy: Share = 0.0
    seq_kd_texts: NotNegative = 0
    response_tokens: Positive = 64
    sample_temperature: AboveZero = 0.9
    cached_rows: NotNegative = 0
    cached_top: Positive = 64
    dtype: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    save_steps: Positive = 100
    eval_rows: NotNegative = 16
    seed: int = 0

    @model_validator(mode="after")
    def _losses_agree(self) -> Self:
        if (self.beta is None) == (self.loss == "jsd"):
            raise ValueError(f"beta goes with loss = 'jsd' and with no other, and loss = {self.loss!r}")
        if self.skew is not None and self.loss not in SKEWED:
            raise ValueError(f"skew goes with loss = {' or '.join(map(repr, SKEWED))}, and loss = {self.loss!r}")
        if self.score_loss != "tokens" and self.score_share == 0:
            raise ValueError(f"score_loss = {self.score_loss!r} needs rows of scoring records: raise score_share")
        if self.layer_map is not None and not self.compares_layers:
            raise ValueError("layer_map goes with hidden_weight or attention_weight above 0: raise either")
        return self

    @model_validator(mode="after")
    def _texts_agree(self) -> Self:
        writes = [name for name in ("on_policy", "seq_kd_texts") if getattr(self, name) > 0]
        if writes and self.score_share == 1:
            raise ValueError(f"{writes[0]} needs rows of text to sample: lower score_share below 1")
        if writes and self.response_tokens > self.length // 2:
            raise ValueError(f"response_tokens = {self.response_tokens} leaves too little of length = {self.length}")
        if self.cached_rows and self.on_policy > 0:
            raise ValueError(
                "cached_rows needs rows that are known beforehand, which on_policy has not: set either to 0"
            )
        if self.cached_rows and self.compares_layers:
            raise ValueError("cached_rows keeps no layers of the teacher: set hidden_weight and attention_weight to 0")
        if 0 < self.cached_rows < self.batch_rows:
            raise ValueError(f"cached_rows = {self.cached_rows} do not fill batch_rows = {self.batch_rows}: raise them")
        return self

    @property
    def compares_layers(self) -> bool:
        """Whether layers of teacher and student are compared too."""
        return self.hidden_weight > 0 or self.attention_weight > 0

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
