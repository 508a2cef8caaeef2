"""Opens and verifies what slmdeploy writes: manifest.json of any artifact, runtime.json of a graph, build or package.

A manifest lists every file with its size and sha256; reading it decides nothing about the files, `verify_files` reads
them all. Both treat the folder as hostile: names that leave it (absolute, "..", backslash, drive letter, NUL), links,
wrong types, wrong sizes and unknown versions are each a CorruptArtifactError of one sentence. Knows nothing of how an
artifact is written (slmdeploy/artifacts.py) or run (model.py). The hashes protect against damage, not against someone
who can rewrite the manifest too.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from .errors import CorruptArtifactError, InputError, ResourceError
from .strictjson import Fields, read_object

MANIFEST = "manifest.json"
RUNTIME = "runtime.json"
SCHEMA = 1
RUNTIME_FORMAT = 1
ENCODER = "encoder"
"""What the key `model` of an encoder's runtime.json says; a decoder's has no such key."""
KINDS = ("checkpoint", "data", "graph", "build", "measurement", "selection", "package")
TASKS = ("generate", "score")
INTERFACES = ("shared", "standard", "static", "stateful")
PRECISIONS = ("f32", "bf16")
CACHES = ("float32", "float16")
PROVIDERS = ("cpu", "cuda", "tensorrt", "tensorrt_rtx")
MAX_FILE_BYTES = 1 << 44
FOR_OTHERS = ("standard.onnx", "genai_config.json")
"""Files of a graph or build that only other runtimes read."""
_MAX_TOKENS = 1 << 24
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file of an artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """manifest.json, checked. `raw` is the whole JSON object, for fields that only reports read."""

    kind: str
    content_key: str
    files: dict[str, FileEntry]
    plan: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def total_bytes(self) -> int:
        """Bytes of all listed files together, the manifest itself not counted."""
        return sum(entry.bytes for entry in self.files.values())


@dataclass(frozen=True)
class ScoreConfig:
    """The two label words of a scorer and their token ids, in the order of the label values: labels[1] is "yes"."""

    labels: tuple[str, str]
    label_ids: tuple[int, int]


@dataclass(frozen=True)
class RuntimeConfig:
    """runtime.json, checked: everything that running the graphs of a folder needs to know about them.

    kv_heads has one entry per layer (pruning may leave unequal ones); max_length is the context in tokens;
    threads 0 means one per physical core; parallel_items lets a scorer run shares of the items side by side.
    interface: "shared" when past and present of model.onnx may be one buffer, "standard" when present is past and more,
    "static" when both are one buffer of fixed capacity (decoding.py, standard.py, static.py), "stateful" when there is
    openvino_model.xml instead (openvino_decoding.py), which computes in inference_precision; that is None elsewhere.
    prefill_chunk: a prompt runs in pieces of so many tokens, 0 for all at once. own_prefill: prompts have a graph of
    their own, prefill.onnx, over the same KV cache (phase split). step_rows: steps of a batch of so many rows or more
    run in that graph too, 0 for none. numerics_only: the graph is meant for another engine, and what runs here are its
    numbers, at a speed that says nothing. cache: the number type of keys and values.
    provider: what ONNX Runtime runs it with (providers.py).
    """

    tasks: tuple[str, ...]
    interface: str
    layers: int
    kv_heads: tuple[int, ...]
    head_dim: int
    vocab_size: int
    max_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    score: ScoreConfig | None
    threads: int
    spinning: bool
    parallel_items: bool
    precision: str
    prefill_chunk: int = 0
    own_prefill: bool = False
    step_rows: int = 0
    inference_precision: str | None = None
    numerics_only: bool = False
    cache: str = "float32"
    provider: str = "cpu"

    @property
    def engine(self) -> str:
        """What runs the folder: "onnxruntime" or "openvino"."""
        return "onnxruntime" if self.inference_precision is None else "openvino"


def read_manifest(path: Path | str) -> Manifest:
    """Parse `path`/manifest.json; InputError if there is no such folder, CorruptArtifactError if it is not sound."""
    folder = existing_folder(path)
    if not (folder / MANIFEST).is_file():
        raise CorruptArtifactError(f"{folder} has no {MANIFEST}: it is no artifact of slmdeploy or is incomplete.")
    fields = read_object(folder / MANIFEST)
    schema = fields.get("schema")
    if schema != SCHEMA or type(schema) is not int:
        fields.refuse("schema", f"{SCHEMA}, the only version that this slmdeploy reads")
    kind = fields.string("kind")
    if kind not in KINDS:
        fields.refuse("kind", f"one of {', '.join(KINDS)}")
    entries = fields.object("files")
    files = {name: _file_entry(entries, name) for name in entries.value}
    optional = {key: fields.object(key).value for key in ("plan", "inputs", "result") if key in fields.value}
    return Manifest(kind, fields.string("content_key", 256), files, raw=fields.value, **optional)


def existing_folder(path: Path | str) -> Path:
    """`path` as a Path if it is a folder, else InputError."""
    folder = Path(path)
    if "\0" not in str(folder) and folder.is_file():
        raise InputError(f"{folder} is a file: if it is a package's archive, slmdeploy unpack makes a folder of it.")
    if "\0" in str(folder) or not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder: give the path of a graph, build or package.")
    return folder


def _file_entry(entries: Fields, name: str) -> FileEntry:
    problem = name_problem(name)
    if problem:
        raise CorruptArtifactError(f"{entries.path}: the file name {name[:80]!r} {problem}.")
    entry = entries.object(name)
    sha256 = entry.string("sha256", 64)
    if len(sha256) != 64 or not _HEX.issuperset(sha256):
        entry.refuse("sha256", "64 lower-case hexadecimal digits")
    found = FileEntry(sha256, entry.integer("bytes", 0, MAX_FILE_BYTES))
    entry.finish()
    return found


def name_problem(name: str) -> str | None:
    """Why `name` may not name a file of an artifact, as the end of a sentence; None if it may.

    The same rule on every system: a name that is harmless on Linux and leaves the folder on Windows is refused on both.
    """
    if not name or len(name) > 1024:
        return "is empty or longer than 1024 characters"
    if any(ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in name):
        return "has a control character or a broken code point"
    if "\\" in name or ":" in name:
        return "has a backslash or a colon"
    if name.startswith("/"):
        return "is absolute"
    if any(part in ("", ".", "..") or len(part.encode()) > 255 for part in name.split("/")):
        return "leaves the folder or is not in its plain form"
    if name == MANIFEST:
        return "is the manifest itself"
    return None


def verify_files(path: Path | str, manifest: Manifest) -> None:
    """Check that every listed file is there as a regular file with the listed size and sha256.

    Sizes are looked at first, so that a truncated artifact is refused before gigabytes are hashed.
    Files that are not listed are not looked at; `require_listed` refuses those that would be run.
    """
    folder = existing_folder(path)
    for name, entry in manifest.files.items():
        _check_size(folder, name, entry)
    for name, entry in manifest.files.items():
        if sha256_file(folder / name) != entry.sha256:
            raise CorruptArtifactError(f"{folder / name} has changed: its sha256 is not the one in {MANIFEST}.")


def _check_size(folder: Path, name: str, entry: FileEntry) -> None:
    file = folder
    for part in name.split("/"):
        file = file / part
        if file.is_symlink():
            raise CorruptArtifactError(f"{file} is a symbolic link, which an artifact may not contain.")
    if not file.is_file():
        raise CorruptArtifactError(f"{file} is missing; make or unpack the artifact again.")
    size = file.stat().st_size
    if size != entry.bytes:
        raise CorruptArtifactError(f"{file} has {size} bytes where {MANIFEST} says {entry.bytes}.")


def sha256_file(path: Path | str) -> str:
    """Lower-case hexadecimal sha256 of a file; links are followed (`verify_files` refuses them beforehand)."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:
        raise ResourceError(f"{path} cannot be read: check its permissions.") from None


def require_listed(path: Path | str, manifest: Manifest, needed: Iterable[str]) -> None:
    """Refuse an artifact that lacks a file in `needed`, or holds a graph or tensor file that no hash covers."""
    folder = existing_folder(path)
    for name in needed:
        if name not in manifest.files:
            raise CorruptArtifactError(f"{folder / MANIFEST} does not list {name}, which is needed to run it.")
    stray = [name for name in os.listdir(folder) if ".onnx" in name and name not in manifest.files]
    if stray:
        raise CorruptArtifactError(f"{folder / min(stray)} is not listed in {MANIFEST}; remove it or rebuild.")


def read_runnable(path: Path | str, *, verify: bool = True) -> Manifest:
    """The manifest of a folder that can be run, its files checked against it if `verify`; else InputError."""
    manifest = read_manifest(path)
    if manifest.kind not in ("graph", "build", "package"):
        raise InputError(f"{path} is a {manifest.kind}, which cannot be run: give a graph, a build or a package.")
    if verify:
        verify_files(path, manifest)
    return manifest


def thread_count(asked: int | None, configured: int) -> int:
    """The threads that a caller asked for, else those of runtime.json; InputError for a negative number."""
    if asked is not None and asked < 0:
        raise InputError(f"threads must be 0 or more, not {asked}.")
    return configured if asked is None else asked


def read_runtime(path: Path | str) -> RuntimeConfig:
    """Parse a decoder's `path`/runtime.json; unknown and missing keys, wrong types and impossible values are refused.

    Of an encoder's (encoder_config.py reads those) it is an InputError, since the folder itself may be sound.
    """
    fields = read_object(existing_folder(path) / RUNTIME)
    if fields.value.get("model") == ENCODER:
        raise InputError(
            f"{path} is an encoder's: embed, classify and score run it, but what was asked for needs a decoder."
        )
    if fields.get("format") != RUNTIME_FORMAT or type(fields.value["format"]) is not int:
        fields.refuse("format", f"{RUNTIME_FORMAT}, the only version that this slmdeploy reads")
    layers, vocab = fields.integer("layers", 1, 4096), fields.integer("vocab_size", 2, _MAX_TOKENS)
    session = fields.object("session")
    config = RuntimeConfig(
        tasks=_tasks(fields),
        interface=_interface(fields),
        layers=layers,
        kv_heads=_kv_heads(fields, layers),
        head_dim=fields.integer("head_dim", 1, 1 << 16),
        vocab_size=vocab,
        max_length=fields.integer("max_length", 1, _MAX_TOKENS),
        bos_token_id=None if fields.get("bos_token_id") is None else fields.integer("bos_token_id", 0, vocab - 1),
        eos_token_ids=_token_ids(fields, "eos_token_ids", vocab),
        score=_score(fields, vocab),
        threads=session.integer("threads", 0, 4096),
        spinning=session.boolean("spinning"),
        parallel_items=session.boolean("parallel_items"),
        precision=fields.string("precision", 64),
        **_prefill(fields),
        inference_precision=openvino_precision(fields),
        numerics_only="numerics_only" in fields.value and fields.boolean("numerics_only"),
        cache=_choice(fields, "cache", CACHES),
        provider=_choice(fields, "provider", PROVIDERS),
    )
    session.finish()
    fields.finish()
    if ("score" in config.tasks) != (config.score is not None):
        fields.refuse("score", 'an object exactly when tasks has "score"')
    if (config.interface == "stateful") != (config.engine == "openvino"):
        fields.refuse("interface", '"stateful" exactly when there is the key openvino')
    if config.provider != "cpu" and config.tasks != ("generate",):
        fields.refuse("provider", '"cpu" where there is the task score')
    if config.provider not in ("cpu", "cuda") and config.interface != "standard":
        fields.refuse("provider", '"cpu" or "cuda" where the interface is not "standard"')
    return config


def _tasks(fields: Fields) -> tuple[str, ...]:
    tasks = tuple(fields.items("tasks", f"names out of {', '.join(TASKS)}", TASKS.__contains__, low=1, high=2))
    if len(set(tasks)) != len(tasks):
        fields.refuse("tasks", "a list without repetition")
    return tasks


def _interface(fields: Fields) -> str:
    interface = fields.string("interface", 64)
    if interface not in INTERFACES:
        fields.refuse("interface", f"one of {', '.join(INTERFACES)}")
    return interface


class _Prefill(TypedDict, total=False):
    prefill_chunk: int
    own_prefill: bool
    step_rows: int


def _prefill(fields: Fields) -> _Prefill:
    """How prompts run; graphs of `export` say nothing of it."""
    if "prefill" not in fields.value:
        return {}
    prefill = fields.object("prefill")
    found = _Prefill(prefill_chunk=prefill.integer("chunk", 0, _MAX_TOKENS), own_prefill=prefill.boolean("own_graph"))
    if "step_rows" in prefill.value:
        found["step_rows"] = prefill.integer("step_rows", 0, _MAX_TOKENS)
        if found["step_rows"] and not found["own_prefill"]:
            prefill.refuse("step_rows", "0 where own_graph is false")
    prefill.finish()
    return found


def openvino_precision(fields: Fields) -> str | None:
    """The precision that a build of the engine openvino computes in; the folders of ONNX Runtime have no such key."""
    if "openvino" not in fields.value:
        return None
    options = fields.object("openvino")
    precision = options.string("inference_precision", 16)
    if precision not in PRECISIONS:
        options.refuse("inference_precision", f"one of {', '.join(PRECISIONS)}")
    options.finish()
    return precision


def _choice(fields: Fields, key: str, values: tuple[str, ...]) -> str:
    """One of these strings; the first of them in folders without the key."""
    if key not in fields.value:
        return values[0]
    value = fields.string(key, 16)
    if value not in values:
        fields.refuse(key, f"one of {', '.join(values)}")
    return value


def _kv_heads(fields: Fields, layers: int) -> tuple[int, ...]:
    def positive(value: Any) -> bool:
        return type(value) is int and 1 <= value <= 1 << 16

    return tuple(fields.items("kv_heads", f"{layers} positive integers, one per layer", positive, layers, layers))


def _token_ids(fields: Fields, key: str, vocab: int, low: int = 0, high: int = 1 << 16) -> tuple[int, ...]:
    def token_id(value: Any) -> bool:
        return type(value) is int and 0 <= value < vocab

    return tuple(fields.items(key, f"token ids from 0 to {vocab - 1}", token_id, low, high))


def _score(fields: Fields, vocab: int) -> ScoreConfig | None:
    if fields.get("score") is None:
        return None
    score = fields.object("score")
    no, yes = score.items("labels", "two words", lambda value: isinstance(value, str), 2, 2)
    no_id, yes_id = _token_ids(score, "label_ids", vocab, 2, 2)
    score.finish()
    return ScoreConfig((no, yes), (no_id, yes_id))
