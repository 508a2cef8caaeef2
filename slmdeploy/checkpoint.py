"""Finds and reads a checkpoint: a Hugging Face folder with config.json, safetensors weights and tokenizer.json.

    resolve_checkpoint("HuggingFaceTB/SmolLM2-135M") -> a local folder, downloaded if need be
    resolve_checkpoint("work/student")               -> that folder
    read_config(folder)                              -> config.json as a dict
    Weights(folder).read("model.norm.weight")        -> float32 array

Reads safetensors itself, because the numpy side of that package has no bfloat16 and torch must not be needed to look at
a checkpoint. Pickled weights are refused: opening them would run what they hold. Knows nothing of architectures.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slmdeploy.errors import CorruptArtifactError, InputError, ResourceError

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
LABELS = (" no", " yes")
"""The default label words of a scorer, in the order of the label values 0 and 1."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors format's own limit
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_checkpoint(name_or_path: str | Path) -> Path:
    """The local folder of a checkpoint, given as a folder or as a Hugging Face id `owner/name`.

    An existing folder always wins. An id is downloaded into the Hugging Face cache: json, jinja, merges and safetensors
    at the top of the repository, nothing else. Raises InputError when it is neither, ResourceError when it cannot be
    downloaded.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path} is a file; give the checkpoint folder that holds config.json and {SINGLE}")
    if not _HUB_ID.fullmatch(str(name_or_path)):
        raise InputError(f"{path} does not exist; give a checkpoint folder or a Hugging Face id such as owner/name")
    return _download(str(name_or_path))


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    unreachable = (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError)
    patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        raise InputError(f"{repository} is gated on Hugging Face; accept its terms and run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{repository} is neither a folder here nor a public Hugging Face model") from error
    except unreachable as error:
        raise ResourceError(
            f"{repository} is not a folder here, and as a Hugging Face id it is not in the local cache and could not "
            "be downloaded; connect to the network or give a folder"
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


def tokenizer_file(checkpoint: Path) -> Path:
    """tokenizer.json of a checkpoint folder; InputError when it is not there."""
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} is missing; save the tokenizer in its fast form with save_pretrained")
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

    Raises InputError when there is no safetensors file or a dtype is not F32, F16 or BF16, and CorruptArtifactError
    for a file whose header and length disagree.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._tensors = dict(entry for file in _weight_files(checkpoint) for entry in _entries(file))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

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
        return flat.astype(np.float32, copy=False).reshape(stored.shape)


def _weight_files(checkpoint: Path) -> list[Path]:
    if (checkpoint / SINGLE).is_file():
        return [checkpoint / SINGLE]
    if not (checkpoint / INDEX).is_file():
        if any(next(checkpoint.glob(pattern), None) for pattern in _PICKLES):
            raise InputError(f"{checkpoint} holds pickled weights only, which can run code; save it as {SINGLE}")
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
