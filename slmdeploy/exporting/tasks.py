"""Which tasks a checkpoint can do and which part of it does them, from its config.json alone.

    LlamaForCausalLM                    -> generate, score    a decoder, built from its weights
    BertModel, or a sentence-transformers folder -> embed     an encoder, traced
    XLMRobertaForSequenceClassification -> classify, and score with one label or two
    DebertaV2ForTokenClassification     -> classify, each token
    T5ForConditionalGeneration          -> refused: an encoder and a decoder

The class that saved a checkpoint is named in `architectures`; its ending says what it computes, in every family alike.
Without a task the first that the class is for is taken, and of a cross-encoder score. Knows nothing of weights, and
nothing of whether the family can be exported: the exporters say that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmdeploy.checkpoint import read_config
from slmdeploy.errors import InputError, UnsupportedModelError

TASKS = ("generate", "score", "embed", "classify")
DECODER, EMBEDDER = "decoder", "embedder"
SEQUENCE_CLASSIFIER, TOKEN_CLASSIFIER = "sequence classifier", "token classifier"
SENTENCE_MODULES = "modules.json"
"""The file that makes a folder a sentence-transformers one: which modules its embeddings pass through."""

_ENDINGS = {
    "ForCausalLM": DECODER,
    "LMHeadModel": DECODER,
    "ForConditionalGeneration": DECODER,
    "ForSequenceClassification": SEQUENCE_CLASSIFIER,
    "ForTokenClassification": TOKEN_CLASSIFIER,
    "ForMaskedLM": EMBEDDER,
    "ForPreTraining": EMBEDDER,
    "Model": EMBEDDER,
}
"""The first ending that fits; "Model" alone is last, as GPT2LMHeadModel has it too."""
_UNASKED = ("ForMaskedLM", "ForPreTraining")
"""Classes with a head that no task of ours uses: their encoder embeds, but only where somebody asks for that."""


@dataclass(frozen=True)
class Choice:
    """The tasks of an export, and the role of the model: decoder, embedder, sequence or token classifier."""

    tasks: tuple[str, ...]
    role: str


def choose(checkpoint: Path, tasks: Sequence[str] | None = None) -> Choice:
    """The tasks to export a checkpoint folder for: those asked for if its class can do them, else what it is for.

    Raises InputError for an unknown task, one that the class cannot do or two that no graph does both, and where
    nothing says what the checkpoint is for; UnsupportedModelError for an encoder-decoder model.
    """
    config, file = read_config(checkpoint), checkpoint / "config.json"
    if config.get("is_encoder_decoder") is True:
        raise UnsupportedModelError(
            f"{file}: is_encoder_decoder = True, and models of an encoder and a decoder (T5, BART, Whisper, …) are not "
            "supported; give a decoder (…ForCausalLM) or an encoder (BertModel, …ForSequenceClassification, …)"
        )
    if tasks is not None:
        check_names(tasks)
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    role = _role(checkpoint, architecture, tasks)
    if role is None:
        raise InputError(
            f"{file}: architectures = {named!r} does not say what to export; known are classes that end in "
            f"{', '.join(_ENDINGS)}"
        )
    able = _able(role, config)
    if tasks is None and architecture.endswith(_UNASKED) and not (checkpoint / SENTENCE_MODULES).is_file():
        raise InputError(f"{file}: architectures = {named!r} has a head that no task uses; give --task embed")
    unable = next((task for task in tasks or () if task not in able), None)
    if unable is not None:
        raise InputError(
            f"{file}: architectures = {named!r} is no model for the task {unable}; it can {' and '.join(able)}"
        )
    return Choice(tuple(tasks or able[:1]), role)


def check_names(tasks: Sequence[str]) -> None:
    """Raise InputError unless `tasks` is a list of different known ones, at least one."""
    if not tasks or isinstance(tasks, str) or len(set(tasks)) != len(tasks):
        raise InputError(f"tasks = {tasks!r}: give a list of different ones out of {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"task {task!r} is not known: choose from {', '.join(TASKS)}")


def _role(checkpoint: Path, architecture: str, tasks: Sequence[str] | None) -> str | None:
    role = next((role for ending, role in _ENDINGS.items() if architecture.endswith(ending)), None)
    if role in (None, DECODER, EMBEDDER) and (checkpoint / SENTENCE_MODULES).is_file():
        return EMBEDDER  # of whatever class: there are embedders among decoders too
    if role is None and tasks and not {"embed", "classify"}.intersection(tasks):
        return DECODER  # whose own reader says better what it does not know
    return role


def _able(role: str, config: dict[str, Any]) -> tuple[str, ...]:
    """The tasks of a role, the one that it is taken for unasked first."""
    if role == DECODER:
        return ("generate", "score")
    if role == EMBEDDER:
        return ("embed",)
    if role == TOKEN_CLASSIFIER or label_count(config) > 2:
        return ("classify",)
    cross_encoder = "sentence_transformers" in config or "sbert_ce_default_activation_function" in config
    scores = label_count(config) == 1 or cross_encoder
    return ("score", "classify") if scores else ("classify", "score")


def label_count(config: dict[str, Any]) -> int:
    """How many labels a classifier has; transformers leaves the usual two out of config.json."""
    labels, count = config.get("id2label"), config.get("num_labels")
    return len(labels) if isinstance(labels, dict) else count if isinstance(count, int) else 2
