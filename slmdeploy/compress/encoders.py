"""Opens encoders for training: classifiers of texts and pairs, cross-encoders, and embedders with their pooling.

What a checkpoint is for is told by its class, and for an embedder by the files of sentence-transformers. Weights come
from safetensors alone; only a head that a classifier is yet to learn may be new. Knows nothing of data and losses.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from slmdeploy.checkpoint import Weights, read_config, read_json, read_tokenizer
from slmdeploy.compress import loading, surgery
from slmdeploy.compress.families import ENCODERS
from slmdeploy.errors import InputError, UnsupportedModelError

Role = Literal["classifier", "embedder"]
Row = dict[str, Tensor]
CLASSIFIER = "ForSequenceClassification"
MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
COPIED = (
    MODULES,
    POOLING,
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
PADDED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
# Parts that may be missing from a checkpoint: a classifier's head, and the pooler that feeds none of our outputs.
HEADS = ("classifier", "score", "pre_classifier", "pooler", "head", "bert.pooler")


def role_of(checkpoint: Path) -> Role:
    """What the class in config.json is for: a classifier by its ending, any other encoder embeds."""
    named = read_config(checkpoint).get("architectures") or [""]
    if str(named[0]).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForTokenClassification")):
        raise UnsupportedModelError(
            f"{checkpoint}: {named[0]} is no encoder of whole texts: training on a table of texts takes classifiers, "
            "cross-encoders and embedders"
        )
    return "classifier" if str(named[0]).endswith(CLASSIFIER) else "embedder"


@dataclass(frozen=True)
class Encoder:
    """A model with its tokenizer; ``pooling`` is None for a classifier, ``fresh`` are tensors that are yet to learn."""

    checkpoint: Path
    model: PreTrainedModel
    tokenizer: Tokenizer
    pooling: Literal["mean", "cls"] | None
    fresh: tuple[str, ...]

    def rows(self, texts: list[str], pairs: list[str] | None) -> Row:
        """Texts, or pairs, as rows padded on the right to the longest; int64 [texts, tokens]."""
        inputs: list[Any] = texts if pairs is None else list(zip(texts, pairs, strict=True))
        encoded = self.tokenizer.encode_batch(inputs)
        last, known = max(max(one.ids, default=0) for one in encoded), self.model.config.vocab_size
        if last >= known:
            raise InputError(
                f"a text has the token {self.tokenizer.id_to_token(last)!r}, number {last}, and {self.checkpoint} has "
                f"a vocabulary of {known}: resize its embeddings, or take the token out"
            )
        longest = max(len(one.ids) for one in encoded)
        pad = self.model.config.pad_token_id or 0
        found = {
            "input_ids": [one.ids + [pad] * (longest - len(one.ids)) for one in encoded],
            "attention_mask": [[1] * len(one.ids) + [0] * (longest - len(one.ids)) for one in encoded],
        }
        if (getattr(self.model.config, "type_vocab_size", 0) or 0) > 1:
            found["token_type_ids"] = [one.type_ids + [0] * (longest - len(one.ids)) for one in encoded]
        return {name: torch.tensor(values) for name, values in found.items()}

    def outputs(self, model: Any, row: Row) -> Tensor:
        """Logits [texts, labels] of a classifier, else vectors [texts, width]; ``model`` may be a wrapped one."""
        made = model(**row)
        if self.pooling is None:
            logits: Tensor = made.logits
            return logits
        return pooled(made.last_hidden_state, row["attention_mask"], self.pooling)


def pooled(states: Tensor, mask: Tensor, pooling: Literal["mean", "cls"]) -> Tensor:
    """One vector of each text's token states [texts, tokens, width]: of the first token, or the mean of all real."""
    if pooling == "cls":
        return states[:, 0]
    real = mask[..., None].to(states.dtype)
    return (states * real).sum(1) / real.sum(1)


def open_encoder(
    checkpoint: Path, role: Role, length: int, labels: tuple[str, ...] | None = None, seed: int = 0
) -> Encoder:
    """The encoder in float32 with its tokenizer set to cut to ``length`` tokens.

    ``labels`` gives a classifier a new head of these classes, of one score where they are empty, drawn by ``seed``;
    None leaves it the one that it has. Raises InputError for weights that are not whole and a length beyond the
    positions of the model.
    """
    Weights(checkpoint)  # missing, pickled or truncated weights are told of in our words
    config = loading.load_config(checkpoint)
    _check_length(checkpoint, config, length)
    settings: dict[str, Any] = {}
    if labels is not None:
        names = labels or ("score",)
        settings = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        settings["num_labels"] = len(names)
    kind: Any = AutoModelForSequenceClassification if role == "classifier" else AutoModel
    if (shapes := getattr(config, "layer_shapes", None)) is not None:
        kind = _uneven(checkpoint, kind, config, shapes)
    try:
        with loading.quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = kind.from_pretrained(
                checkpoint,
                dtype=torch.float32,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=labels is not None,
                output_loading_info=True,
                **settings,
            )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:240]
        raise InputError(f"{checkpoint} cannot be loaded as a {role}: {reason}") from error
    fresh = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if wrong := [name for name in fresh if not name.startswith(HEADS)]:
        raise InputError(f"{checkpoint} does not hold {wrong[0]} as its config.json has it: fetch it again")
    tokenizer = read_tokenizer(checkpoint)
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    pooling = read_pooling(checkpoint) if role == "embedder" else None
    return Encoder(checkpoint, model, tokenizer, pooling, tuple(fresh))


def _uneven(checkpoint: Path, kind: Any, config: Any, shapes: Any) -> Any:
    """The class of a model whose layers have the sizes that ``shapes`` lists, which transformers has no config for."""
    if config.model_type not in ENCODERS or not surgery.are_layer_shapes(shapes, len(shapes)):
        raise InputError(
            f"{checkpoint / 'config.json'}: layer_shapes is not what prune writes for model_type = "
            f"{config.model_type!r}: prune again"
        )
    whole: Any = kind._model_mapping[type(config)]

    class Uneven(whole):  # type: ignore[misc]
        """Of these sizes from the start, so that loading and saving are transformers' own."""

        def __init__(self, config: Any, *rest: Any, **named: Any) -> None:
            super().__init__(config, *rest, **named)
            surgery.resize(self, shapes)

    Uneven.__name__ = whole.__name__  # which config.json names as the architecture
    return Uneven


def _check_length(checkpoint: Path, config: Any, length: int) -> None:
    limit = positions_of(config)
    if limit is not None and length > limit:
        raise InputError(f"length = {length} is more than the {limit} positions of {checkpoint}: lower it")


def positions_of(config: Any) -> int | None:
    """How many tokens an encoder has positions for; None where nothing bounds them."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    # A table of positions that has a padding row counts from behind it, as RoBERTa's does.
    return positions - ((config.pad_token_id or 0) + 1) if config.model_type in PADDED_POSITIONS else positions


def read_pooling(checkpoint: Path) -> Literal["mean", "cls"]:
    """How token states become a vector, as sentence-transformers' files say; the mean where there are none.

    Raises UnsupportedModelError for modules beyond pooling and normalisation: their weights would not be trained.
    """
    if not (checkpoint / MODULES).is_file():
        return "mean"
    try:
        kinds = [str(one["type"]).rsplit(".", 1)[1] for one in json.loads((checkpoint / MODULES).read_text("utf-8"))]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{checkpoint / MODULES} is no list of modules ({error}): fetch it again") from error
    if kinds[:2] != ["Transformer", "Pooling"] or not set(kinds[2:]) <= {"Normalize"}:
        raise UnsupportedModelError(
            f"{checkpoint / MODULES}: modules {', '.join(kinds)} are not trained here, only Transformer, Pooling and "
            "Normalize"
        )
    modes = read_json(checkpoint / POOLING)
    named = modes.get("pooling_mode")
    chosen = (
        [named] if named else [name for name, on in modes.items() if name.startswith("pooling_mode_") and on is True]
    )
    if chosen in (["mean"], ["pooling_mode_mean_tokens"]):
        return "mean"
    if chosen in (["cls"], ["pooling_mode_cls_token"]):
        return "cls"
    raise UnsupportedModelError(f"{checkpoint / POOLING}: pooling {chosen} is not trained here, only mean and cls")


def save_encoder(encoder: Encoder, model: PreTrainedModel, folder: Path) -> None:
    """Write the model in the dtype that its checkpoint has, with its tokenizer and what belongs to it."""
    with loading.quiet():
        config = loading.load_config(encoder.checkpoint)
        model.to(loading.stored_dtype(config)).save_pretrained(folder)  # type: ignore[arg-type]
    copy_companions(encoder.checkpoint, folder)


def copy_companions(checkpoint: Path, folder: Path) -> None:
    """Copy the tokenizer and sentence-transformers' files of ``checkpoint`` byte for byte."""
    loading.copy_companions(checkpoint, folder)
    for name in COPIED:
        if (checkpoint / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint / name, folder / name)
