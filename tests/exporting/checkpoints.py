"""Tiny random checkpoints for the tests of export: a folder as transformers saves it, or just the tensors in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from slmdeploy.exporting.spec import DecoderSpec
from tests.graphs import tiny_tokenizer

TINY: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}


def write_checkpoint(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Save a random Llama with its tokenizer; norms and biases are random too, so that a swapped one shows."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY | changes))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return model.eval()


class FakeWeights:
    """Random tensors of a spec's shapes, with the interface of checkpoint.Weights."""

    checkpoint = Path("checkpoint")

    def __init__(self, spec: DecoderSpec) -> None:
        random = np.random.default_rng(0)
        shapes = spec.tensor_shapes()
        self.arrays = {name: 0.2 * random.standard_normal(s, dtype=np.float32) for name, s in shapes.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arrays[name].shape

    def read(self, name: str) -> NDArray[np.float32]:
        return self.arrays[name]
