"""An encoder checkpoint in torch, as a module whose outputs are those of the graph: the thing that is traced.

    embedder             last_hidden_state [batch, sequence, hidden], sentence_embedding [batch, dimension]
    sequence classifier  logits [batch, labels]
    token classifier     logits [batch, sequence, labels]

Float32, and every tensor from the checkpoint: transformers would fill a missing one with random numbers. Knows nothing
of ONNX.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from slmdeploy.checkpoint import Weights, read_config
from slmdeploy.errors import InputError, UnsupportedModelError
from slmdeploy.exporting.sentence import Dense, Head
from slmdeploy.exporting.tasks import EMBEDDER, SEQUENCE_CLASSIFIER, TOKEN_CLASSIFIER
from slmdeploy.exporting.tracing import quietly
from slmdeploy.exporting.uneven import uneven_encoder

_CLASSES = {
    EMBEDDER: AutoModel,
    SEQUENCE_CLASSIFIER: AutoModelForSequenceClassification,
    TOKEN_CLASSIFIER: AutoModelForTokenClassification,
}
_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU, "SiLU": nn.SiLU}


def load_encoder(checkpoint: Path, role: str) -> PreTrainedModel:
    """The model of a checkpoint folder, float32, for inference.

    Raises UnsupportedModelError when transformers has no such class or the weights lack a tensor of it,
    InputError for a tensor that is not finite, and what reading weights raises.
    """
    Weights(checkpoint)  # missing, pickled or truncated weights are told of in our words
    try:
        with quietly():
            kind: Any = _CLASSES[role]
            if read_config(checkpoint).get("layer_shapes") is not None:
                kind = uneven_encoder(kind, checkpoint)
            model, info = kind.from_pretrained(
                checkpoint,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:240]
        raise InputError(f"{checkpoint} is no {role} that can be loaded: {reason}") from error
    _require_whole(checkpoint, model, info)
    model.config.use_cache = False  # of a decoder used as an encoder
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model


def _require_whole(checkpoint: Path, model: PreTrainedModel, info: dict[str, set[Any]]) -> None:
    wrong = sorted(entry[0] for entry in info["mismatched_keys"])
    # The pooler of a model that is saved without one feeds nothing that is exported.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    for names, what in ((missing, "has no tensor"), (wrong, "has in another shape the tensor")):
        if names:
            raise UnsupportedModelError(
                f"{checkpoint} {what} {names[0]}, which {type(model).__name__} needs by its config.json"
            )
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{checkpoint}: {name} holds NaN or infinity; download or save it again")


def input_names(model: PreTrainedModel, checkpoint: Path) -> tuple[str, ...]:
    """The inputs of the graph: token ids, mask, and token types where the model has more than one.

    Raises UnsupportedModelError for a model that takes token types and does not say how many it has.
    """
    names = ("input_ids", "attention_mask")
    types = getattr(model.config, "type_vocab_size", None)
    if types is None and model.config.model_type in ("xlnet", "funnel"):
        raise UnsupportedModelError(
            f"{checkpoint / 'config.json'}: model_type = {model.config.model_type!r} has token types of its own kind, "
            "which are not supported; use a model of another family"
        )
    return (*names, "token_type_ids") if types is not None and types > 1 else names


def longest_input(model: PreTrainedModel) -> int | None:
    """How many tokens the model has positions for; None where nothing bounds them but training.

    A table of positions that has a padding row counts from behind it, as RoBERTa's does: 514 rows are 512 positions.
    """
    limits = []
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            limits.append(table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
    declared = getattr(model.config, "max_position_embeddings", None)
    if not limits and isinstance(declared, int) and declared > 0:
        limits.append(declared)
    return min(limits, default=None)


class Embedder(nn.Module):
    """The encoder, then the head: its pooling and steps."""

    def __init__(self, model: PreTrainedModel, head: Head) -> None:
        super().__init__()
        self.model, self.pooling = model, head.pooling
        self.steps = nn.ModuleList(_dense(step) if isinstance(step, Dense) else _Normalize() for step in head.steps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Outputs by name; the mask is 1 for tokens, which stand on the left, and 0 for padding."""
        states = self.model(**_given(input_ids, attention_mask, token_type_ids)).last_hidden_state
        vector = pool(states, attention_mask, self.pooling)
        for step in self.steps:
            vector = step(vector)
        return {"last_hidden_state": states, "sentence_embedding": vector}


class Classifier(nn.Module):
    """A sequence or token classifier, with nothing but its logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The logits, by name."""
        return {"logits": self.model(**_given(input_ids, attention_mask, token_type_ids)).logits}


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector [batch, hidden] of the token vectors [batch, sequence, hidden]: "mean", "cls" or "last"."""
    if pooling == "cls":
        return states[:, 0]
    weights = mask.unsqueeze(-1).to(states.dtype)
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        weights = (places == mask.sum(1, keepdim=True) - 1).unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


class _Normalize(nn.Module):
    def forward(self, vector: Tensor) -> Tensor:
        return nn.functional.normalize(vector, p=2.0, dim=-1)


def _dense(step: Dense) -> nn.Module:
    layer, weights = nn.Linear(step.inputs, step.outputs, bias=step.bias), Weights(step.folder)
    for name, parameter in layer.named_parameters():
        if f"linear.{name}" not in weights or weights.shape(f"linear.{name}") != tuple(parameter.shape):
            raise UnsupportedModelError(f"{step.folder} has no tensor linear.{name} of shape {list(parameter.shape)}")
        parameter.data = torch.from_numpy(weights.read(f"linear.{name}"))
    return nn.Sequential(layer, _ACTIVATIONS[step.activation]())


def _given(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> dict[str, Tensor]:
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    return given if token_type_ids is None else {**given, "token_type_ids": token_type_ids}
