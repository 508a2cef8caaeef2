"""Makes a whole checkpoint of a LoRA adapter and its base: W + scale · B A, written once as an ordinary folder.

    a plain checkpoint                         -> that folder, as it is
    an adapter whose base is given or resolves -> a temporary folder with the merged weights, removed after use
    an adapter without a base, of another kind, or with a setting that changes the maths -> one sentence naming it

The merge is exact: products and sums are float32, and what they change is stored as float32 whatever the base is; the
rest is copied byte by byte. One tensor is in memory at a time. A tied embedding that the adapter changes is untied, as
the adapter leaves the other use of it alone. Knows LoRA's file format (that of peft, which is not needed) and nothing
of architectures.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmdeploy.artifacts import scratch
from slmdeploy.checkpoint import (
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    Weights,
    chat_templates,
    read_config,
    read_json,
    require_exact_weights,
    resolve_checkpoint,
)
from slmdeploy.errors import CorruptArtifactError, InputError, ResourceError, SlmdeployError, UnsupportedModelError
from slmdeploy.progress import SILENT, Progress

CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_NO_MATHS = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules"),
        *("inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "lora_ga_config"),
        *("megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config"),
        *("target_modules", "task_type", "tuner_type"),
    )
)
"""Fields about training, and those that say which modules there are, which the tensors' names say too."""
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out"})
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Other initialisations (pissa, olora, loftq ...) change the base that the adapter was trained on.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_TIES = (
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
)
"""Embedding and head of the families that may tie them."""
_MERGE_IT = "merge the adapter with peft's merge_and_unload and export the result"
_PICKLED = (
    "{folder} holds its adapter pickled, which can run code when it is opened; if you trust its source, save it "
    "with python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{folder}/adapter_model.bin', "
    "weights_only=True), '{folder}/adapter_model.safetensors')\""
)
_OTHER_BASE = "give the base that the adapter was trained on with --base"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be read, and the folders that it was made from where it was made just now."""

    path: Path
    origins: dict[str, Path] = field(default_factory=dict)


@contextmanager
def whole_checkpoint(
    name: Path | str,
    *,
    beside: Path,
    base: Path | str | None = None,
    revision: str | None = None,
    cache_dir: Path | str | None = None,
    progress: Progress | None = None,
) -> Iterator[Source]:
    """A checkpoint by folder or Hugging Face id; an adapter is merged into its base first.

    beside: the output of the verb, on whose disk the merged folder lies for as long as the context is open. base: the
    checkpoint that the adapter was trained on; None for what its adapter_config.json names. Raises what
    `resolve_checkpoint` raises, InputError for a base that is missing or superfluous, and UnsupportedModelError for a
    setting or tensor that is not plain LoRA.
    """
    folder = resolve_checkpoint(name, revision=revision, cache_dir=cache_dir)
    if not is_adapter(folder):
        if base is not None:
            raise InputError(f"{folder} is no adapter (it has no {CONFIG}), so it has no base; leave the base out")
        yield Source(folder)
        return
    adapter = _Adapter(folder)
    base_folder = _resolve_base(adapter, base, cache_dir)
    with scratch(beside, "merged") as merged:
        _merge(adapter, base_folder, merged, progress or SILENT)
        yield Source(merged, {"adapter": folder, "base": base_folder})


def is_adapter(folder: Path) -> bool:
    """True for a folder that holds an adapter instead of a model; InputError when it holds both."""
    if not (folder / CONFIG).is_file():
        return False
    for name in (SINGLE, INDEX):
        if (folder / name).is_file():
            raise InputError(f"{folder} holds both {name} and {CONFIG}; remove the one that is not to be exported")
    return True


class _Adapter:
    """adapter_config.json and adapter_model.safetensors, checked; its tensors by the name of the weight they change."""

    def __init__(self, folder: Path) -> None:
        self.file, self.config = folder / ADAPTER, read_json(folder / CONFIG)
        _check_fields(folder / CONFIG, self.config)
        if not self.file.is_file() and (folder / "adapter_model.bin").is_file():
            raise InputError(_PICKLED.format(folder=folder))
        self._weights = Weights(folder, ADAPTER)
        self.low_rank: dict[str, tuple[str, str]] = {}  # weight -> the names of A and B
        self.whole: dict[str, str] = {}  # weight -> the name of what replaces it
        for name in self._weights:
            self._sort(name)

    def _sort(self, name: str) -> None:
        module, _, kind = name.removeprefix("base_model.model.").replace(".default.", ".").partition(".lora_")
        if not kind:
            self.whole[module.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
        elif kind in ("A.weight", "embedding_A"):
            partner = name.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_A", ".lora_embedding_B")
            if partner not in self._weights:
                raise CorruptArtifactError(f"{self.file} has {name} without its other half {partner}; save it again")
            self.low_rank[f"{module}.weight"] = (name, partner)
        elif kind not in ("B.weight", "embedding_B"):
            raise UnsupportedModelError(f"{self.file} holds {name}, which is not plain LoRA; {_MERGE_IT}")

    def rename(self, weights: Weights) -> None:
        """Give weights the names they have in the base, which may be saved with or without the model's prefix."""

        def found(name: str) -> str:
            forms = (name, f"model.{name}", name.partition(".")[2])
            return next((form for form in forms if form in weights), name)

        self.low_rank = {found(name): pair for name, pair in self.low_rank.items()}
        self.whole = {found(name): stored for name, stored in self.whole.items()}

    def __contains__(self, weight: str) -> bool:
        return weight in self.low_rank or weight in self.whole

    def shape(self, weight: str) -> tuple[int, ...] | None:
        """The shape of a weight that the adapter replaces; None for one that it changes or leaves."""
        return self._weights.shape(self.whole[weight]) if weight in self.whole else None

    def replacement(self, weight: str) -> Floats:
        """What stands in place of the base's weight."""
        return self._weights.read(self.whole[weight])

    def change(self, weight: str) -> Floats:
        """scale · B A, in the orientation in which the base stores the weight."""
        names, rank = self.low_rank[weight], self.config["r"]
        down, up = (self._weights.read(name) for name in names)
        if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] == rank:
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise CorruptArtifactError(f"{self.file}: A and B of {weight} are {shapes}, not of rank r = {rank}")
        scale = self.config["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        change: Floats = np.float32(scale) * (up @ down)
        turned = bool(self.config.get("fan_in_fan_out")) != names[0].endswith("embedding_A")
        return change.T if turned else change


def _check_fields(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedModelError(f"{file}: peft_type = {config.get('peft_type')!r} is not supported; {_MERGE_IT}")
    for name, value in config.items():
        if name in _NO_MATHS or name in _READ or value in (None, False, [], {}):
            continue
        if name not in _ALLOWED or value not in _ALLOWED[name]:
            raise UnsupportedModelError(f"{file}: {name} = {value!r} is not plain LoRA; {_MERGE_IT}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise CorruptArtifactError(f"{file}: r = {rank!r} and lora_alpha = {alpha!r} have to be numbers, r above 0")


def _resolve_base(adapter: _Adapter, given: Path | str | None, cache_dir: Path | str | None) -> Path:
    folder, named = adapter.file.parent, adapter.config.get("base_model_name_or_path")
    if given is None and not (isinstance(named, str) and named):
        raise InputError(f"{folder} is a LoRA adapter and its {CONFIG} names no base; give it with --base")
    revision = adapter.config.get("revision") if given is None and not Path(str(named)).is_dir() else None
    try:
        base = resolve_checkpoint(str(named) if given is None else given, revision=revision, cache_dir=cache_dir)
        if is_adapter(base):
            raise InputError(f"{base} is an adapter itself")
        require_exact_weights(base)
    except SlmdeployError as error:
        kind = ResourceError if isinstance(error, ResourceError) else InputError
        raise kind(
            f"{folder} is a LoRA adapter whose base cannot be used ({error}): give another with --base"
        ) from error
    return base


@dataclass(frozen=True)
class _Entry:
    """One tensor of the merged checkpoint and the base's tensor that it starts from."""

    name: str
    source: str
    shape: tuple[int, ...]


def _merge(adapter: _Adapter, base: Path, out: Path, progress: Progress) -> None:
    """Write the checkpoint that adapter and base make together."""
    weights, config = Weights(base), read_config(base)
    adapter.rename(weights)
    entries = _entries(adapter, weights)
    _write_config(adapter, config, entries, out / "config.json")
    _copy_texts(adapter.file.parent, base, out)
    progress.start("merge the adapter", len(entries), "tensors")
    with (out / SINGLE).open("wb") as file:
        file.write(_header(adapter, weights, entries))
        for entry in entries:
            if entry.name in adapter:
                file.write(_merged(adapter, weights, entry).data)
            else:
                weights.copy(entry.source, file)
            progress.advance()
    progress.finish()


def _entries(adapter: _Adapter, weights: Weights) -> list[_Entry]:
    sources = {name: name for name in weights}
    for embedding, head in _TIES:
        # A head that is the embedding in the base gets a tensor of its own when the adapter changes one of the two.
        if embedding in weights and head not in weights and (embedding in adapter or head in adapter):
            sources[head] = embedding
    for name in (*adapter.low_rank, *adapter.whole):
        if name not in sources:
            raise InputError(f"{adapter.file} changes {name}, which {weights.checkpoint} does not have; {_OTHER_BASE}")
    return [_Entry(name, source, adapter.shape(name) or weights.shape(source)) for name, source in sources.items()]


def _write_config(adapter: _Adapter, config: dict[str, Any], entries: Sequence[_Entry], file: Path) -> None:
    """config.json of the base, with the tie and the size of the vocabulary as they are after the merge."""
    shapes = {entry.name: entry.shape for entry in entries}
    for embedding, head in _TIES:
        if embedding in shapes and (embedding in adapter or head in adapter):
            config |= {"tie_word_embeddings": False, "vocab_size": shapes[embedding][0]}
    file.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _copy_texts(adapter: Path, base: Path, out: Path) -> None:
    """The tokenizer files of the adapter where it has a tokenizer, else the base's; the rest of the base."""
    texts = adapter if (adapter / "tokenizer.json").is_file() else base
    copies = [(texts, name) for name in (*TOKENIZER_FILES, *chat_templates(texts))]
    for folder, name in [*copies, (base, "generation_config.json")]:
        if (folder / name).is_file():
            (out / name).parent.mkdir(exist_ok=True)
            copyfile(folder / name, out / name)


def _header(adapter: _Adapter, weights: Weights, entries: Sequence[_Entry]) -> bytes:
    header, start = {}, 0
    for entry in entries:
        stored = weights.stored(entry.source)
        dtype, size = stored.dtype, stored.end - stored.start
        if entry.name in adapter:
            dtype, size = "F32", 4 * math.prod(entry.shape)
        header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [start, start + size]}
        start += size
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded


def _merged(adapter: _Adapter, weights: Weights, entry: _Entry) -> Floats:
    name = entry.name
    weight = adapter.replacement(name) if name in adapter.whole else weights.read(entry.source)
    if name in adapter.low_rank:
        change = adapter.change(name)
        if change.shape != weight.shape:
            shapes = f"{list(change.shape)}, but {weights.checkpoint} has it as {list(weight.shape)}"
            raise InputError(f"{adapter.file} changes {name} as {shapes}; {_OTHER_BASE}")
        weight = weight + change
    merged: Floats = np.ascontiguousarray(weight, "<f4")
    return merged
