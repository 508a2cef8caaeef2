"""Random checkpoints: one folder per shape, as hubs hold them, read by every engine's own converter.

bfloat16 weights for decoders and float32 for encoders, config.json in the form that older readers know too, and a
byte-level tokenizer of 258 words, because converters want one; prompts are token ids and never text.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.peers.shapes import Shape

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "bert": "BertModel"}
_SPREAD = 0.04
"""Standard deviation of the weights: logits are then far enough apart that rounding rarely turns a choice."""


def ensure_checkpoint(shape: Shape, folder: Path) -> Path:
    """The checkpoint of ``shape`` under ``folder``, written where there is none."""
    place = folder / "checkpoint"
    if not (place / "finished").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _write(shape, place)
        (place / "finished").touch()
    return place


def _write(shape: Shape, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if shape.is_decoder else torch.float32
    sizes = shape.config | {"initializer_range": _SPREAD}
    special = {"bos_token_id": 0, "eos_token_id": 1} if shape.is_decoder else {"pad_token_id": 0}
    config = AutoConfig.for_model(shape.architecture, **sizes, **special)
    kind: Any = AutoModelForCausalLM if shape.is_decoder else AutoModel
    kind.from_config(config, dtype=dtype).save_pretrained(folder)
    older = {
        "architectures": [_CLASSES[shape.architecture]],
        "model_type": shape.architecture,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu" if shape.is_decoder else "gelu",
        "head_dim": shape.head_dim,
    }
    (folder / "config.json").write_text(json.dumps(older | sizes | special))
    _write_tokenizer(folder, shape)


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet] if shape.is_decoder else ["[PAD]", "[UNK]", *alphabet]
    # Some converters size the vocabulary by the tokenizer, so it has a word for every row of the embedding.
    words += [f"<unused{i}>" for i in range(len(words), shape.config["vocab_size"])]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = (
        {"bos_token": "<s>", "eos_token": "</s>"} if shape.is_decoder else {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    )
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.config["max_position_embeddings"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | special))
