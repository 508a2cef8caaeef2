"""From a checkpoint's config.json to its `DecoderSpec`, by the row of its family.

    an architecture of the table, every field understood -> DecoderSpec
    another architecture, or custom code (`auto_map`)     -> UnsupportedModelError naming the field
    a field of the maths with a value not implemented     -> UnsupportedModelError naming field and value
    a field that the family's row does not mention        -> the same: it may change the maths, so it is not passed over

Absent fields take the defaults of transformers' config classes. A new field in a new transformers version stops the
export instead of bending its result. Knows nothing of ONNX.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from slmdeploy.checkpoint import read_config
from slmdeploy.errors import InputError
from slmdeploy.exporting.config import Fields
from slmdeploy.exporting.families import FAMILIES, Family, Field
from slmdeploy.exporting.rope_config import GIVEN, longest, read_ropes
from slmdeploy.exporting.spec import Activation, DecoderSpec, LayerSpec, Norm

_ACTIVATIONS: dict[str, Activation] = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"},
}
_ONE_VALUE = {"is_encoder_decoder": False, "add_cross_attention": False, "use_bfloat16": False}
_SHARED = frozenset(
    (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
        *("bos_token_id", "eos_token_id", "layer_types", "layer_shapes"),
    )
)
_NO_MATHS = frozenset(
    (
        *("_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "bad_words_ids"),
        *("chunk_size_feed_forward", "dtype", "finetuning_task", "id2label", "initializer_range", "label2id"),
        *("model_type", "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp"),
        *("problem_type", "return_dict", "task_specific_params", "tie_last_hidden_states", "tokenizer_class"),
        *("torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "unsloth_version"),
        *("use_cache", "_commit_hash", "is_decoder", "prefix", "attn_implementation", "_attn_implementation_autoset"),
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "classifier_dropout", "residual_dropout"),
        *("embedding_dropout", "cache_implementation", "gradient_checkpointing", "n_ctx", "sep_token_id"),
        *("_num_labels", "n_special", "predict_special_tokens"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    )
)


def read_spec(checkpoint: Path, max_length: int | None = None) -> DecoderSpec:
    """The spec of a checkpoint folder, for a context of `max_length` tokens instead of the config's if that is given.

    Raises UnsupportedModelError as the module's table says, and InputError for a context that the model was not made
    for.
    """
    fields = Fields(checkpoint / "config.json", read_config(checkpoint))
    family = _family(fields)
    _check_fields(fields, family)
    return _Reader(fields, family).spec(max_length)


def _family(fields: Fields) -> Family:
    named = fields.values.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in FAMILIES:
        raise fields.refusal("architectures", f"the decoders that are built from their weights are {_known()}")
    family = FAMILIES[named[0]]
    if fields.values.get("model_type") != family.model_type:
        raise fields.refusal("model_type", f"{named[0]} goes with {family.model_type!r}")
    return family


def _known() -> str:
    return ", ".join(sorted(FAMILIES))


_NO_CODE = (
    "code that comes with a checkpoint is never run, and there is no --trust-remote-code; if transformers' own class "
    "computes the same, remove the entry"
)


def _check_fields(fields: Fields, family: Family) -> None:
    one_value = _ONE_VALUE | {"partial_rotary_factor": 1.0} | dict(family.one_value)
    read = (family.fields() | _SHARED | GIVEN) - (frozenset() if family.grouped else {"num_key_value_heads"})
    for name, value in fields.values.items():
        if value is None or name in read or name in _NO_MATHS:
            continue
        if name == "auto_map":
            raise fields.refusal(name, _NO_CODE)
        if name not in one_value:
            raise fields.refusal(name, "this field is not known and may change the maths")
        if value != one_value[name]:
            raise fields.refusal(name, f"only {one_value[name]!r} is implemented")


class _Reader:
    """Reads one config.json by one row."""

    def __init__(self, fields: Fields, family: Family) -> None:
        self.fields, self.family = fields, family

    def spec(self, max_length: int | None) -> DecoderSpec:
        fields, family = self.fields, self.family
        hidden = self._size("hidden_size")
        head_dim = fields.size("head_dim", hidden // self._size("num_attention_heads"))
        trained = self._size("max_position_embeddings", family.length)
        ropes = read_ropes(fields, family, head_dim, trained)
        bos = self._end("bos_token_id", family.bos)
        flow = family.flow if isinstance(family.flow, str) else family.flow.convert(self._flag(family.flow))
        one_norm = family.shared_norm and flow == "parallel"
        return DecoderSpec(
            names=replace(family.names, before_mlp=None) if one_norm else family.names,
            hidden=hidden,
            vocab_size=self._size("vocab_size"),
            head_dim=head_dim,
            max_length=self._context(max_length, trained, longest(ropes, trained)),
            layers=self._layers(),
            norm=Norm(
                family.norm,
                fields.number(family.eps.name, family.eps.default),
                family.norm_offset,
                family.norm == "layer",
            ),
            ropes=ropes,
            attention_scale=self._scale(head_dim),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=self._end("eos_token_id", family.eos),
            flow=flow,
            activation=self._activation(),
            gated=family.gated,
            qkv_bias=self._flag(family.qkv_bias),
            output_bias=self._flag(family.output_bias),
            mlp_bias=self._flag(family.mlp_bias),
            qk_norm=family.qk_norm,
            attention_softcap=self._optional(family.attention_softcap),
            logits_softcap=self._optional(family.logits_softcap),
            embedding_multiplier=self._embedding_multiplier(hidden),
            residual_multiplier=self._optional(family.residual_multiplier) or 1.0,
            logits_multiplier=self._optional(family.logits_multiplier) or 1.0,
            positions=trained if family.names.positions else 0,
            tied=fields.flag("tie_word_embeddings", family.tied),
        )

    def _size(self, name: str, default: Any = ...) -> int:
        return self.fields.size(self.family.sizes.get(name, name), default)

    def _flag(self, value: bool | Field) -> bool:
        return value if isinstance(value, bool) else self.fields.flag(value.name, value.default)

    def _optional(self, field: Field | None) -> float | None:
        """A number that may be absent, by its default, or null, which is none."""
        if field is None or self.fields.values.get(field.name, field.default) is None:
            return None
        return float(field.convert(self.fields.number(field.name, field.default)))

    def _end(self, name: str, default: int | None) -> tuple[int, ...]:
        return self.fields.token_ids(name, default)

    def _scale(self, head_dim: int) -> float:
        field = self.family.scale
        if field is None:
            return float(head_dim**-0.5)
        if isinstance(field.default, bool):
            return float(head_dim**-0.5) if self._flag(field) else 1.0
        return float(field.convert(self.fields.number(field.name, field.default)))

    def _embedding_multiplier(self, hidden: int) -> float:
        given = self.family.embedding_multiplier
        return hidden**0.5 if given == "root of hidden" else (self._optional(given) or 1.0)

    def _activation(self) -> Activation:
        field = self.family.activation
        name = self.fields.value(field.name, field.default)
        if name not in _ACTIVATIONS:
            raise self.fields.refusal(field.name, f"only {', '.join(_ACTIVATIONS)} are implemented")
        return _ACTIVATIONS[name]

    def _context(self, asked: int | None, trained: int, reach: int) -> int:
        """The context in tokens: what is asked for, up to what positions and their scaling were made for."""
        if asked is not None and not 1 <= asked <= reach:
            raise InputError(
                f"max_length = {asked}: {self.fields.file} allows 1 to {reach} tokens, by max_position_embeddings "
                "and the scaling of its rotary embedding"
            )
        return asked or trained

    def _layers(self) -> tuple[LayerSpec, ...]:
        count = self._size("num_hidden_layers")
        ropes, windows = self._rope_indices(count), self._windows(count)
        return tuple(
            LayerSpec(*sizes, window=window, rope=rope)
            for sizes, window, rope in zip(self._layer_sizes(count), windows, ropes, strict=True)
        )

    def _layer_sizes(self, count: int) -> list[tuple[int, int, int]]:
        """Heads, key-value heads and intermediate size of each layer; `layer_shapes` has those of a pruned model."""
        hidden, heads = self._size("hidden_size"), self._size("num_attention_heads")
        kv_heads = self._size("num_key_value_heads", heads)
        # a fused projection in GPT-2's and GPT-NeoX's form has as many key-value heads as heads
        default = 4 * hidden if self.family.sizes else ...
        sizes = (heads, kv_heads, self._size("intermediate_size", default))
        keys = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

        def sound(value: Any) -> bool:
            return (
                isinstance(value, dict)
                and set(value) == set(keys)
                and all(type(v) is int and v > 0 for v in value.values())
            )

        given = self.fields.items("layer_shapes", count, sound, f"an object of the sizes {', '.join(keys)}")
        found = [sizes] * count if given is None else [(one[keys[0]], one[keys[1]], one[keys[2]]) for one in given]
        if given is not None and len(self.family.names.qkv) == 1:
            raise self.fields.refusal("layer_shapes", f"{self.family.model_type} has its projections fused", "…")
        if any(one[0] % one[1] for one in found):
            raise self.fields.refusal("num_key_value_heads", f"it does not divide num_attention_heads = {heads}")
        return found

    def _rope_indices(self, count: int) -> list[int | None]:
        if self.family.rope == "none":
            return [None] * count
        if self.family.rope == "two":
            return [1 if sliding else 0 for sliding in self._sliding(count)]
        if self.family.rope == "one":
            return [0] * count
        every = self.fields.size("no_rope_layer_interval", 4)
        given = self.fields.items("no_rope_layers", count, lambda value: value in (0, 1), "0 or 1")
        listed = [int((i + 1) % every != 0) for i in range(count)] if given is None else given
        return [0 if rotated else None for rotated in listed]

    def _windows(self, count: int) -> list[int | None]:
        fields, family = self.fields, self.family
        used = "use_sliding_window" not in family.read or fields.flag("use_sliding_window", False)
        given = fields.values.get("sliding_window", family.window_default) if used else None
        window = None if given is None else fields.size("sliding_window", given)
        return [window if sliding else None for sliding in self._sliding(count)]

    def _sliding(self, count: int) -> list[bool]:
        """Which layers see a window only."""
        kinds = ("full_attention", "sliding_attention")
        given = self.fields.items("layer_types", count, lambda value: value in kinds, " or ".join(kinds))
        if given is not None:
            sliding = [kind == kinds[1] for kind in given]
            if any(sliding) and self.family.windows == "none":
                raise self.fields.refusal("layer_types", f"{self.family.model_type} has no sliding windows here")
            return sliding
        match self.family.windows:
            case "all":
                return [True] * count
            case "types":
                every = self._pattern()
                return [bool((i + 1) % every) for i in range(count)]
            case "from_layer" if self.fields.flag("use_sliding_window", False):
                first = self.fields.value("max_window_layers", 28)
                return [i >= first for i in range(count)]
            case "without_rope" if self.fields.flag("use_sliding_window", False):
                return [rope is None for rope in self._rope_indices(count)]
        return [False] * count

    def _pattern(self) -> int:
        """Every which layer is a full one: 2 in Gemma 2, a field in Gemma 3."""
        if "sliding_window_pattern" not in self.family.read:
            return 2
        return self.fields.size("sliding_window_pattern", self.fields.size("_sliding_window_pattern", 6))
