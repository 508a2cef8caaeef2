"""Tiny random checkpoints of encoders: a folder as transformers or sentence-transformers saves it, with a tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from slmdeploy.exporting.tracing import quietly

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
ROLES: dict[str, Any] = {
    "embed": AutoModel,
    "classify": AutoModelForSequenceClassification,
    "score": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
}
"""What each role is saved by; "tokens" is the task classify on a token classifier."""

_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_MARKS = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
# RoBERTa counts positions from behind the padding token's row.
_ROBERTA = {**_SIZES, "max_position_embeddings": 50, "pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 56}
_MODERN = {"local_attention": 16, "global_attn_every_n_layers": 2, "classifier_pooling": "mean"}
_V3: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "BERT": BertConfig(**_SIZES),
    "RoBERTa": RobertaConfig(**_ROBERTA),
    "XLM-R": XLMRobertaConfig(**_ROBERTA),
    "DistilBERT": DistilBertConfig(**_SIZES | _DISTIL),
    "MiniLM (XLM-R form)": XLMRobertaConfig(**_ROBERTA | {"num_hidden_layers": 3, "hidden_size": 24}),
    "DeBERTa-v2": DebertaV2Config(**_SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "DeBERTa-v3": DebertaV2Config(**_SIZES | _V3),
    "ModernBERT": ModernBertConfig(**_SIZES | _MARKS | _MODERN),
    "ELECTRA": ElectraConfig(**_SIZES | {"embedding_size": 16}),
    "ALBERT": AlbertConfig(**_SIZES | {"embedding_size": 16}),
    "MPNet": MPNetConfig(**_SIZES | {"max_position_embeddings": 50, "pad_token_id": 1}),
}


def encoder_tokenizer(pad: int = 0) -> Tokenizer:
    """WordPiece over letters and a few words, lower case, [CLS] a [SEP] b [SEP]; padding has the id `pad`."""
    special = [word for word in SPECIAL if word != "[PAD]"]
    special.insert(pad, "[PAD]")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*special, *letters, *(f"##{c}" for c in letters), ".", ",", "?", "the", "cat", "sat", "where", "is", "on"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))],
    )
    return tokenizer


def write_encoder(
    folder: Path, family: str = "BERT", role: str = "embed", *, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Save a random encoder with its tokenizer; norms and biases are random too, so that a swapped one shows."""
    labels = {"classify": 3, "score": 1, "tokens": 5}.get(role)
    if labels and not {"id2label", "num_labels"}.intersection(changes):
        changes["id2label"] = {i: f"label {i}" for i in range(labels)}
    config = FAMILIES[family].__class__(**FAMILIES[family].to_dict() | changes)
    torch.manual_seed(0)
    with quietly():
        model: PreTrainedModel = ROLES[role].from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("bias" not in name), std=0.2)
    model.to(dtype).save_pretrained(folder)
    encoder_tokenizer(config.pad_token_id or 0).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1000000000000000019884624838656})
    return model.float().eval()


def write_modules(folder: Path, *kinds: str, pooling: dict[str, Any] | None = None) -> None:
    """Make a checkpoint a sentence-transformers folder: Transformer, Pooling and then these kinds of modules."""
    modules = []
    for i, kind in enumerate(("Transformer", "Pooling", *kinds)):
        path = "" if i == 0 else f"{i}_{kind}"
        modules.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
        if path:
            (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", modules)
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **modes, **(pooling or {})})


def write_json(path: Path, value: object) -> None:
    """`value` as a JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")
