"""The models of the comparison: sizes of public models as data, and what of them the arithmetic needs.

Knows nothing of engines. Sizes are those of the models' config.json; the weights are random, so only speed and size are
compared here, never quality.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One model; ``config`` is what transformers' config class takes."""

    name: str
    architecture: str
    config: dict[str, Any]

    @property
    def is_decoder(self) -> bool:
        """Whether it generates; else it is an encoder."""
        return self.architecture in ("llama", "qwen2")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return int(self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers of all blocks, so without head and tables."""
        hidden, mlp = self.config["hidden_size"], self.config["intermediate_size"]
        if self.is_decoder:
            kv = self.config["num_key_value_heads"] * self.head_dim
            block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp
        else:
            block = 4 * hidden * hidden + 2 * hidden * mlp
        return int(block * self.config["num_hidden_layers"])

    @property
    def head_parameters(self) -> int:
        """Weights of the language model's head, which one token reads whole; none in an encoder."""
        return int(self.config["vocab_size"] * self.config["hidden_size"]) if self.is_decoder else 0

    def prefill_operations(self, tokens: int) -> float:
        """Multiplications and additions of a prompt whose last logits alone are asked for, attention causal."""
        width = self.config["num_attention_heads"] * self.head_dim * self.config["num_hidden_layers"]
        attention = (2 if self.is_decoder else 4) * tokens * tokens * width
        return float(2 * self.linear_parameters * tokens + 2 * self.head_parameters + attention)


def llama(name: str, hidden: int, layers: int, heads: int, kv: int, mlp: int, vocabulary: int, **more: Any) -> Shape:
    """A Llama of the given sizes; ``more`` are further keys of its config, or others in place of these."""
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }
    return Shape(name, "llama", sizes | more)


def _bert(name: str, hidden: int, layers: int, heads: int) -> Shape:
    sizes = {
        "vocab_size": 30522,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 512,
    }
    return Shape(name, "bert", sizes)


_QWEN = llama("qwen2.5-0.5b", 896, 24, 14, 2, 4864, 151936, rope_theta=1e6, rms_norm_eps=1e-6)

SHAPES = {
    shape.name: shape
    for shape in (
        llama("smollm2-135m", 576, 30, 9, 3, 1536, 49152, rope_theta=1e5, rms_norm_eps=1e-5),
        Shape(_QWEN.name, "qwen2", _QWEN.config),
        # Plain rotary embedding instead of the llama3 scaling: it changes no cost, and every converter knows it.
        llama("llama-3.2-1b", 2048, 16, 32, 8, 8192, 128256, rope_theta=5e5, rms_norm_eps=1e-5),
        _bert("minilm-6-384", 384, 6, 12),
        _bert("bert-base", 768, 12, 12),
        # Of no public model: small, so that what an engine does around the arithmetic decides.
        llama("llama-15m", 288, 6, 6, 6, 768, 32000, rope_theta=1e4, rms_norm_eps=1e-5),
        # Of no public model: seconds instead of minutes, to try the benchmark itself.
        llama("tiny", 128, 2, 4, 2, 256, 512, rope_theta=1e4, rms_norm_eps=1e-5),
    )
}
