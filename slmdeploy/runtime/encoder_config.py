"""runtime.json of an encoder: what running model.onnx of an embedder or a classifier needs to know about it.

The same file name as a decoder's, told apart by its key `model`, and as strict: a missing or unknown key, a wrong type
or an impossible value is a CorruptArtifactError. Knows nothing of how the graph is run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundle import ENCODER, RUNTIME, RUNTIME_FORMAT, existing_folder, openvino_precision
from .strictjson import Fields, read_object

TASKS = ("embed", "classify", "score")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
ACTIVATIONS = ("softmax", "sigmoid", "none")
POOLINGS = ("mean", "cls", "last")
_MAX_TOKENS = 1 << 24
_MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class Embedding:
    """The vectors of an embedder: their size, the pooling and normalisation in the graph, and texts put in front.

    prompts: by name; the one called `default_prompt` goes in front of a text where no other is asked for.
    """

    dimension: int
    pooling: str
    normalized: bool
    prompts: dict[str, str]
    default_prompt: str | None


@dataclass(frozen=True)
class Labels:
    """The labels of a classifier in the order of its logits, for each token or for the text as a whole.

    activation: what makes scores of logits: "softmax" (one label is right), "sigmoid" (any may be), "none".
    """

    names: tuple[str, ...]
    per_token: bool
    activation: str


@dataclass(frozen=True)
class EncoderConfig:
    """runtime.json of an encoder, checked. Embedders have `embedding`, classifiers and cross-encoders `labels`.

    inputs: names of the graph's inputs; max_length: tokens that a text is cut to; threads 0: one per physical core.
    inference_precision: what a build of the engine openvino computes in, None for ONNX Runtime's. numerics_only: the
    graph is meant for another engine's compiler, and what runs here are its numbers.
    """

    tasks: tuple[str, ...]
    inputs: tuple[str, ...]
    vocab_size: int
    max_length: int
    pad_token_id: int
    embedding: Embedding | None
    labels: Labels | None
    threads: int
    spinning: bool
    precision: str
    inference_precision: str | None = None
    numerics_only: bool = False

    @property
    def engine(self) -> str:
        """What runs the folder: "onnxruntime" or "openvino"."""
        return "onnxruntime" if self.inference_precision is None else "openvino"


def is_encoder(folder: Path) -> bool:
    """Whether `folder`/runtime.json is an encoder's; it is read as carefully either way."""
    return read_object(existing_folder(folder) / RUNTIME).value.get("model") == ENCODER


def read_encoder(path: Path | str) -> EncoderConfig:
    """Parse `path`/runtime.json of an encoder; unknown and missing keys and impossible values are refused."""
    fields = read_object(existing_folder(path) / RUNTIME)
    if fields.get("format") != RUNTIME_FORMAT or type(fields.value["format"]) is not int:
        fields.refuse("format", f"{RUNTIME_FORMAT}, the only version that this slmdeploy reads")
    if fields.get("model") != ENCODER:
        fields.refuse("model", f'"{ENCODER}"')
    vocab, session = fields.integer("vocab_size", 2, _MAX_TOKENS), fields.object("session")
    config = EncoderConfig(
        tasks=_names(fields, "tasks", TASKS),
        inputs=_names(fields, "inputs", INPUTS),
        vocab_size=vocab,
        max_length=fields.integer("max_length", 1, _MAX_TOKENS),
        pad_token_id=fields.integer("pad_token_id", 0, vocab - 1),
        embedding=None if fields.get("embedding") is None else _embedding(fields.object("embedding")),
        labels=None if fields.get("labels") is None else _labels(fields.object("labels")),
        threads=session.integer("threads", 0, 4096),
        spinning=session.boolean("spinning"),
        precision=fields.string("precision", 64),
        inference_precision=openvino_precision(fields),
        numerics_only="numerics_only" in fields.value and fields.boolean("numerics_only"),
    )
    session.finish()
    fields.finish()
    _check(fields, config)
    return config


def _check(fields: Fields, config: EncoderConfig) -> None:
    """What no field says alone: the tasks decide which of `embedding` and `labels` there is."""
    embeds = config.tasks == ("embed",)
    if "embed" in config.tasks and not embeds:
        fields.refuse("tasks", "embed alone, or classify and score")
    if embeds != (config.embedding is not None):
        fields.refuse("embedding", 'an object exactly when tasks has "embed"')
    if embeds == (config.labels is not None):
        fields.refuse("labels", 'an object exactly when tasks has "classify" or "score"')
    if "score" in config.tasks and (config.labels is None or config.labels.per_token or len(config.labels.names) > 2):
        fields.refuse("labels", "one or two for a text, as the task score needs")
    if config.inputs[:2] != INPUTS[:2]:
        fields.refuse("inputs", f"{INPUTS[0]}, {INPUTS[1]} and perhaps {INPUTS[2]}")


def _names(fields: Fields, key: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(fields.items(key, f"names out of {', '.join(known)}", known.__contains__, 1, len(known)))
    if len(set(names)) != len(names):
        fields.refuse(key, "a list without repetition")
    return names


def _one_of(fields: Fields, key: str, known: tuple[str, ...]) -> str:
    value = fields.string(key, 64)
    if value not in known:
        fields.refuse(key, f"one of {', '.join(known)}")
    return value


def _embedding(fields: Fields) -> Embedding:
    prompts = fields.object("prompts")
    texts = {name: prompts.string(name, 1 << 16) for name in prompts.value}
    default = None if fields.get("default_prompt") is None else fields.string("default_prompt")
    if default is not None and default not in texts:
        fields.refuse("default_prompt", "null or the name of a prompt")
    embedding = Embedding(
        dimension=fields.integer("dimension", 1, _MAX_SIZE),
        pooling=_one_of(fields, "pooling", POOLINGS),
        normalized=fields.boolean("normalized"),
        prompts=texts,
        default_prompt=default,
    )
    fields.finish()
    return embedding


def _labels(fields: Fields) -> Labels:
    def word(value: Any) -> bool:
        return isinstance(value, str) and len(value) <= 4096

    labels = Labels(
        names=tuple(fields.items("names", "strings", word, 1)),
        per_token=fields.boolean("per_token"),
        activation=_one_of(fields, "activation", ACTIVATIONS),
    )
    fields.finish()
    return labels
