"""Loads half-precision checkpoints into float32 torch models with one copy of the weights in memory.

transformers maps safetensors files into memory. A float32 tensor then needs no memory of its own, but of a tensor that
is widened the pages of the file stay beside the copy until all are loaded: half as much again. Here the files are read
instead, which is faster, too. Knows nothing of what the tensors mean.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slmdeploy.checkpoint import Weights, weight_files


def load_causal_lm(checkpoint: Path, **options: Any) -> PreTrainedModel:
    """The float32 model of a checkpoint folder that transformers knows; `options` as in its from_pretrained."""
    options |= {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True, "trust_remote_code": False}
    weights = Weights(checkpoint)
    model: PreTrainedModel
    if all(weights.stored(name).dtype == "F32" for name in weights):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
        return model
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    files: list[Any] = [safe_open(file, framework="pt", backend="pread") for file in weight_files(checkpoint)]
    tensors = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
    # not through the Auto class, which copies its options, and what stands for a tensor in a file has no copy
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    return model
