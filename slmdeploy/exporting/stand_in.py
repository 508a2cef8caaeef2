"""What the fallback costs: its graph timed beside a stand-in that takes the fast path, on the machine that exports.

A model that only the fallback can export has no fast path of its own to be compared with. The stand-in is a Llama of
the same layers, hidden size, heads, head size and vocabulary, its MLP made as wide as it takes to have as many
parameters; its weights are one constant, since dense float32 kernels take the same time for all numbers. A mixture of
experts has no such equal, so of its ratio only the trend says something. Nothing of the stand-in is kept.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from slmdeploy.building.gate import speed_gate
from slmdeploy.checkpoint import Weights
from slmdeploy.exporting.decoder import build_decoder
from slmdeploy.exporting.reading import read_spec
from slmdeploy.exporting.spec import DecoderSpec
from slmdeploy.runtime.bundle import RuntimeConfig, read_runtime
from slmdeploy.runtime.model import Model
from slmdeploy.runtime.text import load_tokenizer


def measured_cost(graph: Path, *, hidden: int, heads: int, parameters: int) -> dict[str, Any]:
    """Times of a fallback's graph folder, which needs no manifest yet, over those of its stand-in, and what that is.

    prefill_ratio is of 128 tokens to the first new one, decode_ratio of 32 steps behind them (gate.speed_gate).
    """
    config = read_runtime(graph)
    asked = stand_in_config(config, hidden=hidden, heads=heads, parameters=parameters)
    with tempfile.TemporaryDirectory(prefix="slmdeploy-stand-in-") as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(asked), encoding="utf-8")
        spec = read_spec(folder)
        ir.save(build_decoder(spec, _ConstantWeights(spec)), folder / "model.onnx", external_data="model.onnx.data")
        tokenizer = load_tokenizer(graph)
        kv_heads = tuple(layer.kv_heads for layer in spec.layers)
        same = replace(config, interface="shared", kv_heads=kv_heads, head_dim=spec.head_dim)
        ratios, _ = speed_gate(
            Model(folder, same, tokenizer, same.threads), Model(graph, config, tokenizer, config.threads)
        )
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {
        "prefill_ratio": ratios["prefill_ratio"],
        "decode_ratio": ratios["decode_ratio"],
        "against": "a Llama of the same sizes on the fast path",
        "stand_in": {name: asked[name] for name in (*sizes, "intermediate_size", "vocab_size")},
    }


def stand_in_config(config: RuntimeConfig, *, hidden: int, heads: int, parameters: int) -> dict[str, Any]:
    """config.json of the Llama that has these sizes and, as nearly as a whole MLP width allows, these parameters."""
    kv_heads, dim = max(config.kv_heads), config.head_dim
    heads = max(kv_heads, heads // kv_heads * kv_heads)
    attention = 2 * hidden * dim * (heads + kv_heads)
    left = parameters - 2 * config.vocab_size * hidden - config.layers * attention
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": max(1, left // (3 * hidden * config.layers)),
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": False,
    }


class _ConstantWeights(Weights):
    """Weights of a spec's shapes, all of one number, that take no memory until they are written."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.checkpoint = Path("stand-in")
        self._shapes = spec.tensor_shapes()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> NDArray[np.float32]:
        return np.broadcast_to(np.float32(0.01), self._shapes[name])
