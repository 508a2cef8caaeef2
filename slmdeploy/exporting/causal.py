"""Any decoder of transformers, opened for torch with checks, and its sizes as running it shows them.

    transformers has no class for it, or it needs its own code  -> UnsupportedModelError
    a tensor that the class asks for is missing                 -> UnsupportedModelError: it would be random numbers
    a tensor holds NaN or an infinity                           -> InputError
    its state is not one key and one value per layer (Mamba, …) -> UnsupportedModelError
    its config names no context                                 -> UnsupportedModelError

What it computes is for transformers to say: nothing here reads the maths out of config.json, so all of it is in the
graph that is traced. Attention is the eager one, the only that every option of every family is in (torch's fused one
drops soft caps and sinks without a word). Knows nothing of ONNX.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from slmdeploy.checkpoint import CONTEXT_FIELDS, LABELS, label_token_ids, read_config
from slmdeploy.errors import InputError, UnsupportedModelError
from slmdeploy.exporting.eager import TorchDecoder
from slmdeploy.exporting.tracing import quietly

_KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer")


class CausalModel(TorchDecoder):
    """Any decoder as a session of the profiler and as the reference of parity, with nothing said about its maths."""

    def __init__(self, checkpoint: Path, labels: tuple[str, str] = LABELS, *, max_length: int | None = None) -> None:
        self.checkpoint, self.labels = checkpoint, labels
        model = open_causal(checkpoint)
        self.spec = measure_spec(checkpoint, model, max_length)
        super().__init__(model, self.spec.max_length, self.spec.eos_token_ids)

    @torch.inference_mode()
    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Label logits [items, labels]; through the whole head, as what lies between it and the logits is not known."""
        logits = self._behind(self.model, prefix_ids, item_ids).logits
        rows = logits[torch.arange(len(item_ids)), [len(item) - 1 for item in item_ids]]
        labels: NDArray[np.float32] = rows[:, list(label_token_ids(self.checkpoint, self.labels))].numpy()
        return labels

    @torch.inference_mode()
    def _extend(self, ids: Sequence[int]) -> NDArray[np.float32]:
        # Not every family can be asked for one position's logits alone.
        output = self.model(torch.tensor([list(ids)]), past_key_values=self._cache, use_cache=True)
        row: NDArray[np.float32] = output.logits[0, -1].numpy()
        return row


@dataclass(frozen=True)
class CausalLayer:
    """What the runtime needs to know of one layer."""

    kv_heads: int


@dataclass(frozen=True)
class CausalSpec:
    """The sizes of a decoder, measured on it; the fields are named as in `DecoderSpec`."""

    layers: tuple[CausalLayer, ...]
    hidden: int
    heads: int
    head_dim: int
    vocab_size: int
    max_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def open_causal(checkpoint: Path) -> PreTrainedModel:
    """The float32 model of a checkpoint folder, as the module's table says; nothing is downloaded and no code run."""
    file = checkpoint / "config.json"
    if "auto_map" in read_config(checkpoint):
        raise UnsupportedModelError(f"{file}: auto_map names code of its own, which is never run; use a built-in model")
    with quietly(), _no_progress_bars():
        try:
            config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
            opened: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation="eager",
                output_loading_info=True,
            )
        except Exception as error:  # transformers has no kind of its own for a model that it does not know
            raise UnsupportedModelError(f"{file}: transformers cannot open it ({_first_line(error)})") from error
    model, loading = opened
    if loading["missing_keys"]:
        raise UnsupportedModelError(
            f"{checkpoint} has no tensor {min(loading['missing_keys'])}, which its config.json asks for"
        )
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{checkpoint}: {name} has values that are NaN or infinite, so every answer would be")
    decoder: PreTrainedModel = model.eval()
    return decoder


def measure_spec(checkpoint: Path, model: PreTrainedModel, max_length: int | None = None) -> CausalSpec:
    """The sizes of a model, from one run over two tokens; `max_length` instead of the context that its config names."""
    file = checkpoint / "config.json"
    try:
        with quietly(), torch.inference_mode():
            output = model(torch.zeros((1, 2), dtype=torch.int64), use_cache=True)
    except Exception as error:  # whatever a model raises here, it is the same to whoever wants to deploy it
        raise UnsupportedModelError(
            f"{file}: transformers cannot run it with a cache ({_first_line(error)})"
        ) from error
    shapes = _key_value_shapes(file, output)
    config = model.config.get_text_config(decoder=True)
    return CausalSpec(
        layers=tuple(CausalLayer(heads) for heads, _ in shapes),
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        head_dim=shapes[0][1],
        vocab_size=int(output.logits.shape[-1]),
        max_length=_context(file, config, max_length),
        bos_token_id=config.bos_token_id,
        eos_token_ids=_ids(config.eos_token_id),
    )


def _key_value_shapes(file: Path, output: Any) -> list[tuple[int, int]]:
    """Key-value heads and head size of each layer."""
    layers = getattr(getattr(output, "past_key_values", None), "layers", None) or ()
    other = {type(layer).__name__ for layer in layers} - set(_KEYS_AND_VALUES)
    if not layers or other:
        found = ", ".join(sorted(other)) or f"none in {type(output).__name__}"
        raise UnsupportedModelError(
            f"{file}: between tokens this model keeps something else than keys and values of each layer ({found}), for "
            "which the runtime has no place; deploy a decoder with attention alone"
        )
    sizes = [tuple(part.shape) for layer in layers for part in (layer.keys, layer.values) if part is not None]
    widths = {size[-1] for size in sizes if len(size) == 4}
    pairs = zip(sizes[::2], sizes[1::2], strict=False)
    if len(sizes) != 2 * len(layers) or len(widths) != 1 or any(key != value for key, value in pairs):
        raise UnsupportedModelError(
            f"{file}: the runtime keeps keys and values of one size, and those of this model are {sizes[0]} and "
            f"{sizes[-1]}"
        )
    return [(int(size[1]), int(size[3])) for size in sizes[::2]]


def _context(file: Path, config: Any, asked: int | None) -> int:
    found = next((value for name in CONTEXT_FIELDS if type(value := getattr(config, name, None)) is int), None)
    if asked is not None and (found is None or asked <= found):
        return asked
    if asked is not None:
        raise InputError(f"{file}: the model was made for {found} tokens; give --max-length {found} or less")
    if found is None:
        raise UnsupportedModelError(f"{file} names no length of context; give --max-length")
    return found


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
