"""Opens checkpoints for compression: config, weights and what is copied along; quietly, never with remote code.

Knows what compression can work on and says so by the config's field; knows nothing of pruning or training.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from slmdeploy.checkpoint import TOKENIZER_FILES, Weights, read_config, weight_files
from slmdeploy.compress import surgery
from slmdeploy.compress.families import FAMILIES
from slmdeploy.errors import InputError, UnsupportedModelError

COPIED = (*TOKENIZER_FILES, "tokenizer.model", "generation_config.json")
# What a config may say that makes logits differ from head · hidden state.
HEAD_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no notices from transformers and datasets; their settings come back afterwards."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    data_bars = not datasets.are_progress_bars_disabled()
    transformers.utils.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()


def load_config(checkpoint: Path) -> Any:
    """The config of a checkpoint folder; raises InputError when it is missing or broken."""
    read_config(checkpoint)  # a missing or damaged file is told of in our words
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{checkpoint / 'config.json'} cannot be used: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{checkpoint}: config field quantization_config is set; compress the unquantised checkpoint"
        )
    return config


def load_model(checkpoint: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model with its weights in ``dtype``; safetensors only."""
    Weights(checkpoint)  # missing, pickled or truncated weights are told of in our words
    config = read_config(checkpoint)
    # torch's fused attention knows no soft cap, and transformers would leave it out without a word
    how = {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") is not None else {}
    try:
        if config.get("layer_shapes") is not None:
            return _load_uneven(checkpoint, dtype, config["layer_shapes"], how)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True, **how
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{checkpoint} cannot be loaded as a causal language model: {error}") from error
    return model


def _load_uneven(checkpoint: Path, dtype: torch.dtype, shapes: Any, how: dict[str, str]) -> PreTrainedModel:
    """The model of a checkpoint whose layers have sizes of their own, which transformers has no config for."""
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    family = FAMILIES.get(config.model_type)
    if family is None or family.fused or not surgery.are_layer_shapes(shapes, config.num_hidden_layers):
        raise InputError(
            f"{checkpoint / 'config.json'}: layer_shapes is not what prune writes for model_type = "
            f"{config.model_type!r}: prune again"
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **how)
    surgery.resize(model, shapes)
    weights = {name: tensor for file in weight_files(checkpoint) for name, tensor in load_file(file).items()}
    missing, unknown = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tied = {f"{family.head}.weight"} if config.tie_word_embeddings else set()
    if unknown or set(missing) - tied:
        raise InputError(f"{checkpoint} does not hold the tensors that its layer_shapes ask for: prune it again")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def require_finite(model: PreTrainedModel, checkpoint: Path) -> None:
    """Raise InputError for weights that are no numbers, which no training would make good."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{checkpoint}: {name} is not finite: fetch it again, or train it with a lower rate")


def head_weight(model: PreTrainedModel, checkpoint: Path) -> torch.Tensor:
    """The head [vocabulary, hidden]; raises UnsupportedModelError when logits are more than a product with it."""
    for name in HEAD_FIELDS:
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise UnsupportedModelError(f"{checkpoint}: config field {name} changes the logits and is not implemented")
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UnsupportedModelError(f"{checkpoint}: the head has a bias, which is not implemented for distillation")
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype that a checkpoint's weights are stored in, as its config says; float32 when it does not."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def end_ids(config: Any) -> tuple[int, ...]:
    """The token that ends a text, as a tuple of one, or of none when the config has no eos_token_id."""
    end = config.eos_token_id
    if isinstance(end, list):
        end = end[0] if end else None
    return () if end is None else (int(end),)


def copy_companions(checkpoint: Path, out: Path) -> None:
    """Copy the tokenizer and generation settings of ``checkpoint`` byte for byte."""
    for name in COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
