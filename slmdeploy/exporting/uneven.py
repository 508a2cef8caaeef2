"""Opens a checkpoint whose layers differ in heads and MLP width, which transformers has no config for.

Structured pruning may leave such layers; config.json then lists them as `layer_shapes`, each with num_attention_heads,
num_key_value_heads and intermediate_size. The model is transformers' own, with each linear layer that has another size
put in its place. Serves the torch side of parity; knows nothing of pruning or of graphs.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slmdeploy.checkpoint import Weights, weight_files
from slmdeploy.exporting.spec import DecoderSpec


def uneven_encoder(kind: Any, checkpoint: Path) -> Any:
    """The class of an encoder whose linear layers have the sizes that the checkpoint stores; ``kind`` is an auto class.

    Loading with it is transformers' own, with every check of what is missing or does not fit.
    """
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    whole: Any = kind._model_mapping[type(config)]
    weights = Weights(checkpoint)

    class Uneven(whole):  # type: ignore[misc]
        def __init__(self, config: Any, *rest: Any, **named: Any) -> None:
            super().__init__(config, *rest, **named)
            for name, module in list(self.named_modules()):
                if isinstance(module, nn.Linear) and f"{name}.weight" in weights:
                    rows, columns = weights.shape(f"{name}.weight")
                    if (rows, columns) != tuple(module.weight.shape):
                        self.set_submodule(name, nn.Linear(columns, rows, bias=module.bias is not None))

    return Uneven


def load_uneven(checkpoint: Path, spec: DecoderSpec, attention: str) -> PreTrainedModel:
    """The model in float32 with the sizes of `spec`, whose tensors the checkpoint is known to hold."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )
    for name, shape in spec.tensor_shapes().items():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and isinstance(old := model.get_submodule(path), nn.Linear) and old.weight.shape != shape:
            model.set_submodule(path, nn.Linear(shape[1], shape[0], bias=old.bias is not None))
    for index, layer in enumerate(spec.layers):
        module = model.get_submodule(f"{spec.names.layers}.{index}.{spec.names.attention_out.rpartition('.')[0]}")
        module.num_key_value_groups = layer.heads // layer.kv_heads  # type: ignore[assignment]
    for file in weight_files(checkpoint):
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()}, strict=False)
    model.tie_weights()
    model.eval()
    return model
