"""The families as pruning sees them, each a row of data: which dimensions of which tensors a group takes along.

Every dimension of a tensor has a label, "hidden", "neurons", "queries" or "keys", or several joined by "+" where a
family stores parts in one tensor. A row also says which groups a family's config has no words for, and why. Supporting
a family means adding a row; surgery.py does the rest. Reads config.json and knows nothing of torch or of methods.
The exporter has a table of its own, of how a family computes; a test keeps the two from naming different tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from slmdeploy.errors import InputError, UnsupportedModelError

Axes = tuple[str, ...]
GroupKind = Literal["kv_heads", "neurons", "hidden"]

_QKV: dict[str, Axes] = {
    "self_attn.q_proj": ("queries", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
}
_OUT: dict[str, Axes] = {"self_attn.o_proj": ("hidden", "queries"), "mlp.down_proj": ("hidden", "neurons")}
_GATED: dict[str, Axes] = {"mlp.gate_proj": ("neurons", "hidden"), "mlp.up_proj": ("neurons", "hidden")}
_SIZES = {
    "hidden": "hidden_size",
    "neurons": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "layers": "num_hidden_layers",
}
_DERIVED = "its head width is hidden size over heads, so neither changes alone"
_LONGROPE = "its config class takes the length of longrope's factors from hidden size over heads"
_BOUND: dict[GroupKind, str] = {"kv_heads": _DERIVED, "hidden": _DERIVED}


@dataclass(frozen=True)
class Family:
    """A row. Paths are modules: `base` in the causal model, `stack`, `embeddings` and `final_norm` in the base.

    `linear` has the axes of each weight matrix of a layer, as torch stores them; a bias goes with the output.
    `norms` are those over the hidden width, `bound` the groups that cannot go and why. `whole_heads`: config classes
    that refuse a hidden size which the query heads do not divide. `scaled_by_width`: embeddings are multiplied by the
    root of the hidden size. `longrope_by_width`: a config class that derives the length of longrope's factors from
    hidden size and heads, whatever head_dim says. `norm_offset` is added to a norm's stored weight. `encoder`: sees the
    whole text at once, and has no config field for fewer heads, so that the config then lists `layer_shapes`.
    """

    linear: Mapping[str, Axes] = field(default_factory=lambda: {**_QKV, **_GATED, **_OUT})
    attention_out: str = "self_attn.o_proj"
    mlp_out: str = "mlp.down_proj"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    base: str = "model"
    stack: str = "layers"
    embeddings: tuple[str, ...] = ("embed_tokens",)
    final_norm: str = "norm"
    head: str = "lm_head"
    sizes: Mapping[str, str] = field(default_factory=lambda: dict(_SIZES))
    bound: Mapping[GroupKind, str] = field(default_factory=dict)
    whole_heads: bool = False
    scaled_by_width: bool = False
    longrope_by_width: bool = False
    norm_offset: float = 0.0
    transposed: bool = False
    encoder: bool = False

    @property
    def prefix(self) -> str:
        """What stands before the names of the base's tensors; nothing where the base is the whole model."""
        return f"{self.base}." if self.base else ""

    @property
    def fused(self) -> bool:
        """Whether some tensor holds several parts, which a config with sizes per layer cannot describe."""
        return self.transposed or any("+" in label for axes in self.linear.values() for label in axes)

    def layer_axes(self, name: str) -> Axes | None:
        """The axes of a layer's tensor such as "mlp.up_proj.bias"; None for one that no group touches."""
        module, _, kind = name.rpartition(".")
        if module in self.norms:
            return ("hidden",)
        if module not in self.linear:
            return None
        axes = self.linear[module]
        return axes if kind == "weight" else (axes[-1] if self.transposed else axes[0],)

    def model_axes(self, name: str) -> tuple[Axes | None, int | None]:
        """The axes of any tensor of the causal model, and the layer that it belongs to."""
        stack = f"{self.prefix}{self.stack}."
        if name.startswith(stack):
            index, _, rest = name.removeprefix(stack).partition(".")
            return self.layer_axes(rest), int(index)
        module = name.rpartition(".")[0]
        if module in (self.head, *(f"{self.prefix}{part}" for part in self.embeddings)):
            return (("rows", "hidden") if name.endswith(".weight") else ("rows",)), None
        return (("hidden",) if module == f"{self.prefix}{self.final_norm}" else None), None

    def size(self, config: Mapping[str, Any], what: str) -> int | None:
        """A size of config.json by its label in `sizes`; None where the field is absent."""
        value = config.get(self.sizes.get(what, ""))
        return None if value is None else int(value)


_PRE = Family()
_SANDWICH = (*_PRE.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GEMMA = Family(norms=_SANDWICH, whole_heads=True, scaled_by_width=True, norm_offset=1.0)
_PLAIN_MLP: dict[str, Axes] = {"mlp.c_fc": ("neurons", "hidden")}

FAMILIES: dict[str, Family] = {
    "llama": Family(whole_heads=True),
    "mistral": _PRE,
    "qwen2": _PRE,
    "qwen3": _PRE,
    "smollm3": _PRE,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Family(
        linear={
            "self_attn.qkv_proj": ("queries+keys+keys", "hidden"),
            "mlp.gate_up_proj": ("neurons+neurons", "hidden"),
            **_OUT,
        },
        longrope_by_width=True,
    ),
    "granite": _PRE,
    "olmo2": Family(
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        bound={"kv_heads": "its query and key norms run over all heads at once, so heads depend on each other"},
    ),
    "stablelm": Family(bound=_BOUND),
    "gpt2": Family(
        linear={"mlp.c_fc": ("hidden", "neurons"), "mlp.c_proj": ("neurons", "hidden")},
        attention_out="attn.c_proj",
        mlp_out="mlp.c_proj",
        norms=("ln_1", "ln_2"),
        base="transformer",
        stack="h",
        embeddings=("wte", "wpe"),
        final_norm="ln_f",
        sizes={"hidden": "n_embd", "neurons": "n_inner", "heads": "n_head", "layers": "n_layer"},
        bound=_BOUND,
        transposed=True,
    ),
    "gpt_neox": Family(
        linear={"mlp.dense_h_to_4h": ("neurons", "hidden"), "mlp.dense_4h_to_h": ("hidden", "neurons")},
        attention_out="attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        base="gpt_neox",
        embeddings=("embed_in",),
        final_norm="final_layer_norm",
        head="embed_out",
        sizes={name: value for name, value in _SIZES.items() if name != "kv_heads"},
        bound=_BOUND,
    ),
    "starcoder2": Family(
        linear={
            **_QKV,
            **_PLAIN_MLP,
            "self_attn.o_proj": ("hidden", "queries"),
            "mlp.c_proj": ("hidden", "neurons"),
        },
        mlp_out="mlp.c_proj",
    ),
}
"""Decoders, by the model_type of config.json."""

_WHOLE = "the residual stream of an encoder is normalised behind every part, and its pooler reads it whole"
_BERT = Family(
    linear={
        "attention.self.query": ("queries", "hidden"),
        "attention.self.key": ("keys", "hidden"),
        "attention.self.value": ("keys", "hidden"),
        "attention.output.dense": ("hidden", "queries"),
        "intermediate.dense": ("neurons", "hidden"),
        "output.dense": ("hidden", "neurons"),
    },
    attention_out="attention.output.dense",
    mlp_out="output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    base="bert",
    stack="encoder.layer",
    embeddings=(),
    sizes={name: value for name, value in _SIZES.items() if name != "kv_heads"},
    bound={"hidden": _WHOLE},
    encoder=True,
)
_ROBERTA = replace(_BERT, base="roberta")

ENCODERS: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": replace(_BERT, base="electra"),
    "distilbert": Family(
        linear={
            "attention.q_lin": ("queries", "hidden"),
            "attention.k_lin": ("keys", "hidden"),
            "attention.v_lin": ("keys", "hidden"),
            "attention.out_lin": ("hidden", "queries"),
            "ffn.lin1": ("neurons", "hidden"),
            "ffn.lin2": ("hidden", "neurons"),
        },
        attention_out="attention.out_lin",
        mlp_out="ffn.lin2",
        norms=("sa_layer_norm", "output_layer_norm"),
        base="distilbert",
        stack="transformer.layer",
        embeddings=(),
        sizes={"hidden": "dim", "neurons": "hidden_dim", "heads": "n_heads", "layers": "n_layers"},
        bound={"hidden": _WHOLE},
        encoder=True,
    ),
}
"""Encoders, by the model_type of config.json."""

ROWS = FAMILIES | ENCODERS


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: layers, hidden width, MLP neurons, heads and how wide one is.

    The last three are those of every layer; a query head belongs to the KV head that it reads.
    """

    layers: int
    hidden: int
    neurons: int
    kv_heads: int
    queries_per_kv: int
    head_dim: int

    @property
    def group_width(self) -> int:
        """Columns of the attention's output projection that belong to one KV head."""
        return self.queries_per_kv * self.head_dim


def family_of(checkpoint: Path, config: Mapping[str, Any]) -> Family:
    """The row of a checkpoint; UnsupportedModelError for another family, InputError for layers of unequal sizes."""
    known = config.get("model_type")
    if known not in ROWS:
        raise UnsupportedModelError(
            f"{checkpoint}: model_type = {known!r} cannot be pruned, only {', '.join(sorted(ROWS))}"
        )
    if config.get("layer_shapes") is not None:
        raise InputError(
            f"{checkpoint}: its layers have sizes of their own (config field layer_shapes), so it has been pruned "
            "unevenly before: prune the checkpoint that it was made from"
        )
    family, rope = ROWS[known], config.get("rope_parameters") or config.get("rope_scaling") or {}
    if family.longrope_by_width and rope.get("rope_type", rope.get("type", "default")) != "default":
        return replace(family, bound={"kv_heads": _LONGROPE, "hidden": _LONGROPE})
    return family


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that the config of a known family describes, by the fields of its own names."""
    family = ROWS[config["model_type"]]
    hidden, heads, layers = (_needed(config, family, what) for what in ("hidden", "heads", "layers"))
    kv_heads = family.size(config, "kv_heads") or heads
    head_dim = None if "hidden" in family.bound else config.get("head_dim")
    return Shape(
        layers=layers,
        hidden=hidden,
        neurons=family.size(config, "neurons") or 4 * hidden,
        kv_heads=kv_heads,
        queries_per_kv=heads // kv_heads,
        head_dim=head_dim or hidden // heads,
    )


def _needed(config: Mapping[str, Any], family: Family, what: str) -> int:
    if (value := family.size(config, what)) is None:
        raise InputError(f"config.json does not say {family.sizes[what]}: it is damaged, fetch the checkpoint again")
    return value
