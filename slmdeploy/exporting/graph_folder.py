"""What stands in a decoder's graph folder beside its graphs: runtime.json, config, tokenizer and chat templates.

Knows nothing of how a graph is made: it serves those that are built from weights and those that are traced.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmdeploy.checkpoint import TOKENIZER_FILES, chat_templates, read_json, read_tokenizer
from slmdeploy.errors import InputError
from slmdeploy.exporting.spec import DecoderSpec

if TYPE_CHECKING:
    from slmdeploy.exporting.causal import CausalSpec

    Spec = DecoderSpec | CausalSpec


def check_vocabulary(checkpoint: Path, spec: "Spec") -> None:
    """Raise InputError for a tokenizer with more tokens than the model."""
    tokens = read_tokenizer(checkpoint).get_vocab_size(with_added_tokens=True)
    if tokens > spec.vocab_size:
        raise InputError(
            f"{checkpoint / 'tokenizer.json'} has {tokens} tokens, but the model's vocab_size is {spec.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def copy_texts(source: Path, folder: Path, spec: "Spec") -> None:
    """Config and tokenizer files as they are; a generation_config.json is made where the checkpoint has none."""
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES, *chat_templates(source)):
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    if not (folder / "generation_config.json").exists():
        ids = {"bos_token_id": spec.bos_token_id, "eos_token_id": list(spec.eos_token_ids)}
        _write_json(folder / "generation_config.json", ids)


def write_runtime(
    folder: Path,
    spec: "Spec",
    tasks: Sequence[str],
    *,
    interface: str,
    labels: tuple[str, str] | None = None,
    label_ids: tuple[int, int] | None = None,
) -> None:
    """runtime.json: what running the graph needs to know about it (runtime/bundle.py reads it).

    Needs generation_config.json, where the end tokens are looked up.
    """
    score = None
    if labels is not None and label_ids is not None:
        score = {"labels": list(labels), "label_ids": list(label_ids)}
    _write_json(
        folder / "runtime.json",
        {
            "format": 1,
            "tasks": list(tasks),
            "interface": interface,
            "layers": len(spec.layers),
            "kv_heads": [layer.kv_heads for layer in spec.layers],
            "head_dim": spec.head_dim,
            "vocab_size": spec.vocab_size,
            "max_length": spec.max_length,
            "bos_token_id": spec.bos_token_id,
            "eos_token_ids": _end_ids(folder, spec),
            "score": score,
            "session": {"threads": 0, "spinning": True, "parallel_items": False},
            "precision": "fp32",
        },
    )


def _end_ids(folder: Path, spec: "Spec") -> list[int]:
    """End tokens as transformers finds them: generation_config.json goes before config.json."""
    file = folder / "generation_config.json"
    value = read_json(file).get("eos_token_id", list(spec.eos_token_ids))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < spec.vocab_size for i in ids):
        raise InputError(f"{file}: eos_token_id = {value!r} has to be token ids below {spec.vocab_size}")
    return ids


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
