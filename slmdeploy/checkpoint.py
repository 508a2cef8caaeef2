"""Finds and reads a checkpoint: a Hugging Face folder with config.json, safetensors weights and tokenizer.json.

    resolve_checkpoint("HuggingFaceTB/SmolLM2-135M") -> a local folder, downloaded if need be
    resolve_checkpoint("work/student")               -> that folder
    read_config(folder)                              -> config.json as a dict
    require_exact_weights(folder)                    -> nothing, or why these weights are not what was trained
    Weights(folder).read("model.norm.weight")        -> float32 array

Reads safetensors itself, because the numpy side of that package has no bfloat16 and torch must not be needed to look at
a checkpoint. Pickled weights are refused: opening them would run what they hold; so is code that comes along, because
nothing here ever runs it. Knows nothing of architectures.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from slmdeploy.errors import CorruptArtifactError, InputError, ResourceError, UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
CHAT_TEMPLATES = "additional_chat_templates"
"""The folder in which a checkpoint keeps further chat templates, each NAME.jinja."""
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
"""Where the families keep the length of their context in config.json, each in one of these."""
LABELS = (" no", " yes")
"""The default label words of a scorer, in the order of the label values 0 and 1."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CONVERT = "python -c \"from transformers import {auto} as A; A.from_pretrained('{source}').save_pretrained('{out}')\""
_QUANTISED = ("quantization_config", "quantization", "compression_config")
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_COPY_BYTES = 16 << 20
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors format's own limit
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_checkpoint(
    name_or_path: str | Path, *, revision: str | None = None, cache_dir: Path | str | None = None
) -> Path:
    """The local folder of a checkpoint, given as a folder or as a Hugging Face id `owner/name`.

    An existing folder always wins. An id is downloaded into the Hugging Face cache, or into `cache_dir`: json, jinja,
    merges and safetensors, nothing that could run. `revision` is a branch, a tag or a commit. With HF_HUB_OFFLINE set
    only the cache is read. Raises InputError when it is neither folder nor id, or for a revision that is not there,
    ResourceError when it cannot be downloaded.
    """
    path = Path(name_or_path)
    if path.is_dir():
        if revision is not None:
            raise InputError(f"{path} is a folder, which has no revision {revision!r}; leave the revision out")
        return path
    if path.exists():
        raise InputError(f"{path} is a file; give the checkpoint folder that holds config.json and {SINGLE}")
    if not _HUB_ID.fullmatch(str(name_or_path)):
        raise InputError(f"{path} does not exist; give a checkpoint folder or a Hugging Face id such as owner/name")
    return _download(str(name_or_path), revision, cache_dir)


def _download(repository: str, revision: str | None, cache_dir: Path | str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    name = repository if revision is None else f"{repository} at revision {revision}"
    wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
    # The same weights once more, in another format; 2_Dense of sentence-transformers has its own.
    unwanted = ["[!0-9]*/*.safetensors", "consolidated*"]
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, cache_dir=cache_dir, allow_patterns=wanted, ignore_patterns=unwanted
            )
        )
    except hub.GatedRepoError as error:
        raise InputError(f"{repository} is gated on Hugging Face; accept its terms and run `hf auth login`") from error
    except hub.RepositoryNotFoundError as error:
        raise InputError(f"{repository} is neither a folder here nor a public Hugging Face model") from error
    except hub.RevisionNotFoundError as error:
        raise InputError(
            f"{repository} has no revision {revision!r}; give a branch, a tag or a commit of it"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.HfHubHTTPError, ConnectionError, TimeoutError) as error:
        cache = cache_dir or constants.HF_HUB_CACHE
        why = (
            "HF_HUB_OFFLINE is set; unset it" if constants.is_offline_mode() else "it could not be downloaded; connect"
        )
        raise ResourceError(
            f"{name} is not a folder here and as a Hugging Face id not (or not wholly) in the cache {cache}, and {why} "
            "to download it, or give a folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; InputError when it is missing, CorruptArtifactError when it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; a checkpoint folder needs it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptArtifactError(f"{path} is not JSON ({error}); download or save the checkpoint again") from error
    if not isinstance(value, dict):
        raise CorruptArtifactError(f"{path} holds {type(value).__name__} instead of a JSON object")
    return value


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, exactly as written."""
    return read_json(checkpoint / "config.json")


def require_exact_weights(checkpoint: Path) -> None:
    """Raise UnsupportedModelError for a checkpoint that says it is quantised, whatever stored it so."""
    config = read_config(checkpoint)
    field = next((name for name in _QUANTISED if config.get(name)), None)
    if field is None:
        return
    settings = config[field] if isinstance(config[field], dict) else {}
    method = settings.get("quant_method") or settings.get("quant_algo") or settings.get("format") or "unnamed method"
    raise UnsupportedModelError(
        f"{checkpoint / 'config.json'}: {field} says that the weights are quantised already ({method}), and only "
        "float32, float16 and bfloat16 weights are supported; give the checkpoint that it was quantised from, and "
        "`slmdeploy build` quantises the graph"
    )


def chat_templates(checkpoint: Path) -> list[str]:
    """The further chat templates of a checkpoint, as names relative to it."""
    return sorted(f"{CHAT_TEMPLATES}/{file.name}" for file in (checkpoint / CHAT_TEMPLATES).glob("*.jinja"))


def tokenizer_file(checkpoint: Path) -> Path:
    """tokenizer.json of a checkpoint folder; InputError when it is not there, with what makes it of an older form."""
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        command = _CONVERT.format(auto="AutoTokenizer", source=checkpoint, out=checkpoint)
        first = "pip install sentencepiece && " if (checkpoint / "tokenizer.model").is_file() else ""
        raise InputError(
            f"{path} is missing; where the folder has its tokenizer in another form, write it with {first}{command}"
        )
    return path


def read_tokenizer(checkpoint: Path) -> "Tokenizer":
    """The tokenizer of a checkpoint folder. Raises InputError when it is missing, CorruptArtifactError when damaged."""
    from tokenizers import Tokenizer  # not needed to read weights

    file = tokenizer_file(checkpoint)
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the binding raises nothing narrower
        raise CorruptArtifactError(f"{file} is not a tokenizer ({error}); save or download it again") from error


def label_token_ids(checkpoint: Path, labels: tuple[str, str] = LABELS) -> tuple[int, int]:
    """The token of each label word; InputError for a word that is not exactly one token, or twice the same one."""
    tokenizer = read_tokenizer(checkpoint)
    encoded = [tokenizer.encode(word, add_special_tokens=False).ids for word in labels]
    for word, ids in zip(labels, encoded, strict=True):
        if len(ids) != 1:
            raise InputError(f"{checkpoint}: the label {word!r} is {len(ids)} tokens; a label has to be exactly one")
    first, second = (int(ids[0]) for ids in encoded)
    if first == second:
        raise InputError(f"{checkpoint}: the labels {labels[0]!r} and {labels[1]!r} are the same token")
    return first, second


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes `start` to `end` of `file`, row-major, little-endian."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Weights:
    """The tensors of a checkpoint by name, read on demand from one safetensors file or from an indexed set of shards.

    Raises InputError when there is no safetensors file, a dtype is not F32, F16 or BF16, or a tensor that is read has a
    NaN or an infinity, and CorruptArtifactError for a file whose header and length disagree.
    """

    def __init__(self, checkpoint: Path, name: str | None = None) -> None:
        """name: one file of the folder to read instead of what a whole model consists of."""
        self.checkpoint = checkpoint
        files = weight_files(checkpoint) if name is None else [_present(checkpoint / name)]
        self._tensors = dict(entry for file in files for entry in _entries(file))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies and in what form."""
        return self._tensors[name]

    def copy(self, name: str, file: BinaryIO) -> None:
        """Append one tensor to `file` as it is stored, whatever its form."""
        stored = self._tensors[name]
        with stored.file.open("rb") as source:
            source.seek(stored.start)
            left = stored.end - stored.start
            while left:
                file.write(piece := source.read(min(left, _COPY_BYTES)))
                if not piece:
                    raise CorruptArtifactError(f"{stored.file} ends inside {name}; download it again")
                left -= len(piece)

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32 (bfloat16 and float16 are widened exactly)."""
        stored = self._tensors[name]
        if stored.dtype not in _ITEM_BYTES:
            raise InputError(f"{stored.file}: {name} has dtype {stored.dtype}; save it as F32, F16 or BF16")
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[stored.dtype]
        count = math.prod(stored.shape)
        flat = np.fromfile(stored.file, dtype=kind, count=count, offset=stored.start)
        if stored.dtype == "BF16":
            flat = (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)
        array = flat.astype(np.float32, copy=False).reshape(stored.shape)
        if not _finite(array):
            raise InputError(
                f"{stored.file}: {name} has {int((~np.isfinite(array)).sum())} of {count} values that are NaN or "
                "infinite, so every answer would be; use a checkpoint from before its training diverged"
            )
        return array


def _finite(array: NDArray[np.float32]) -> bool:
    # The sum is finite for all but broken weights and takes one pass without a copy; only a bad one is looked into.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())


def _present(file: Path) -> Path:
    if not file.is_file():
        raise InputError(f"{file} is missing; weights have to be there as safetensors")
    return file


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or all shards that the index names."""
    if (checkpoint / SINGLE).is_file():
        return [checkpoint / SINGLE]
    if not (checkpoint / INDEX).is_file():
        if any(next(checkpoint.glob(pattern), None) for pattern in _PICKLES):
            command = _CONVERT.format(auto="AutoModelForCausalLM", source=checkpoint, out=f"{checkpoint}-safetensors")
            raise InputError(
                f"{checkpoint} holds pickled weights only, which can run code when they are opened; if you trust where "
                f"they come from, save them as safetensors with {command}"
            )
        if next(checkpoint.glob("*.gguf"), None):
            raise InputError(
                f"{checkpoint} holds GGUF weights only; give the safetensors checkpoint they were made from"
            )
        raise InputError(f"{checkpoint / SINGLE} is missing; a checkpoint folder needs its weights as safetensors")
    names = read_json(checkpoint / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CorruptArtifactError(f"{checkpoint / INDEX} has no weight_map of file names")
    files = [checkpoint / name for name in sorted(set(names.values()))]
    for file in files:
        if file.parent != checkpoint or file.name == "..":
            raise CorruptArtifactError(f"{checkpoint / INDEX} names {file}, which is not in the checkpoint folder")
        if not file.is_file():
            raise InputError(f"{file} is missing although {INDEX} names it; download the checkpoint again")
    return files


def _entries(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_LIMIT_BYTES):
            raise CorruptArtifactError(f"{file} is truncated or not a safetensors file; download it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CorruptArtifactError(f"{file} has a damaged safetensors header; download it again") from error
    if not isinstance(header, dict):
        raise CorruptArtifactError(f"{file} has a damaged safetensors header; download it again")
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, _stored(file, name, entry, 8 + length, size)


def _stored(file: Path, name: str, entry: Any, base: int, size: int) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        start, end = (base + int(offset) for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptArtifactError(f"{file}: the header entry of {name} is damaged; download it again") from error
    expected = math.prod(shape) * _ITEM_BYTES.get(dtype, 0)
    if min(shape, default=0) < 0 or not base <= start <= end <= size or (expected and end - start != expected):
        raise CorruptArtifactError(f"{file}: {name} does not fit in the file; it is truncated, download it again")
    return StoredTensor(file, dtype, shape, start, end)
