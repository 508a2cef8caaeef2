"""Opens an encoder's folder and runs its tasks: vectors of texts, labels of texts or tokens, scores of pairs.

What runtime/model.py is for decoders. Knows nothing of batches and padding (encoding.py) or of what made the graph. The
session opens on first use. One EncoderModel is not safe to share between threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .bundle import RUNTIME, read_runnable, require_listed, thread_count
from .encoder_config import EncoderConfig, Labels, is_encoder, read_encoder
from .encoding import GRAPH, Encoder, Floats, Row, RowCodec, Text, check_texts, row_of
from .errors import InputError
from .openvino_encoding import OpenVinoEncoder
from .openvino_session import GRAPH as OPENVINO_GRAPH
from .openvino_session import WEIGHTS as OPENVINO_WEIGHTS
from .tensorrt_encoding import TensorRTEncoder
from .tensorrt_plan import PLAN, RECIPE
from .tensorrt_session import PlanSession, runs_here
from .text import TOKENIZER, load_tokenizer


@dataclass(frozen=True)
class Label:
    """The most probable label and its score; `scores` has all of them in the order of the model's labels."""

    label: str
    score: float
    scores: tuple[float, ...]


@dataclass(frozen=True)
class TokenLabel:
    """The label of one token, which is text[start:end]."""

    label: str
    score: float
    start: int
    end: int


def load_encoder(
    path: Path | str, *, threads: int | None = None, spinning: bool | None = None, verify: bool = True
) -> "EncoderModel":
    """Open a folder that `export` made of an encoder; the options are those of runtime.model.load.

    Raises InputError if there is no such folder or it is a decoder's, CorruptArtifactError if it is not sound.
    """
    folder = Path(path)
    manifest = read_runnable(folder, verify=verify)
    if not is_encoder(folder):
        raise InputError(f"{folder} is a decoder, which generates and scores: embed and classify need an encoder.")
    config = read_encoder(folder)
    config = config if spinning is None else replace(config, spinning=spinning)
    graphs = [GRAPH] if config.engine == "onnxruntime" else [OPENVINO_GRAPH, OPENVINO_WEIGHTS]
    plan = [PLAN, RECIPE] if (folder / PLAN).exists() else []  # no hash may be missing for code that would be run
    require_listed(folder, manifest, [RUNTIME, TOKENIZER, *graphs, *plan])
    return EncoderModel(folder, config, load_tokenizer(folder), thread_count(threads, config.threads))


def open_encoder(folder: Path, config: EncoderConfig, threads: int) -> Encoder:
    """What runs the folder's graph, by the engine that its runtime.json says, or its plan where that runs here."""
    if config.numerics_only and runs_here(folder):
        plan = PlanSession(folder)
        return TensorRTEncoder(folder, config, plan.phase("encode"), plan.stream, plan.outputs, plan.most_rows)
    return (Encoder if config.engine == "onnxruntime" else OpenVinoEncoder)(folder, config, threads)


class EncoderModel:
    """A loaded encoder. `runtime` is its runtime.json, `tokenizer` its tokenizer, with truncation on."""

    def __init__(self, folder: Path, runtime: EncoderConfig, tokenizer: Tokenizer, threads: int) -> None:
        self.path = folder
        self.runtime = runtime
        self.tokenizer = tokenizer
        self._threads = threads
        self._codec = RowCodec(tokenizer, runtime)

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it can do: "embed", or "classify", "score" or both."""
        return self.runtime.tasks

    @property
    def labels_tokens(self) -> bool:
        """Whether it is a classifier of tokens: `classify_tokens` rather than `classify`."""
        return self.runtime.labels is not None and self.runtime.labels.per_token

    @cached_property
    def encoder(self) -> Encoder:
        """The open graph; for checks that ask for arrays."""
        return open_encoder(self.path, self.runtime, self._threads)

    def embed(self, texts: Sequence[str], *, prompt: str | None = None) -> Floats:
        """The vector of each text, float32 [texts, dimension], pooled and perhaps normalised as runtime.json says.

        prompt: the name of a text of the model's to put in front of each; its default one where None. Raises InputError
        for no texts, an empty one, and a prompt that the model does not have.
        """
        self._require("embed")
        embedding = self.runtime.embedding
        assert embedding is not None, "read_encoder lets no embed task through without its embedding"
        name = embedding.default_prompt if prompt is None else prompt
        if name is not None and name not in embedding.prompts:
            known = ", ".join(embedding.prompts) or "none"
            raise InputError(f"{self.path} has no prompt named {name!r}; it has: {known}.")
        front = "" if name is None else embedding.prompts[name]
        check_texts(texts)
        rows = self._codec.rows([front + text for text in texts])
        return np.stack(self.encoder.rows(rows, "sentence_embedding"))

    def classify(self, texts: Sequence[Text]) -> list[Label]:
        """The label of each text or pair of texts. Raises InputError for no texts, an empty one, and a tagger."""
        labels = self._labels(per_token=False)
        return [label_of(labels, logits) for logits in self.encoder.rows(self._codec.rows(texts), "logits")]

    def classify_tokens(self, texts: Sequence[str]) -> list[list[TokenLabel]]:
        """The label of each token of each text, special tokens left out; for models that label tokens."""
        labels = self._labels(per_token=True)
        encodings = self._codec.encodings(texts)
        found = self.encoder.rows([row_of(encoding) for encoding in encodings], "logits")
        return [
            [
                TokenLabel(best.label, best.score, *encoding.offsets[i])
                for i, best in enumerate(label_of(labels, row) for row in logits)
                if not encoding.special_tokens_mask[i]
            ]
            for encoding, logits in zip(encodings, found, strict=True)
        ]

    def score(self, prefix: str, items: Sequence[str]) -> list[float]:
        """How well each item goes with the prefix (a query), in the order of the items.

        The logit of a model with one label, the difference logit(label 1) - logit(label 0) of one with two. Raises
        InputError for an empty prefix, no items or an empty one.
        """
        self._require("score")
        if isinstance(items, str) or not items:
            raise InputError("There are no items to score: give a list of at least one string.")
        rows = self._codec.rows([(prefix, item) for item in items])
        logits = np.stack(self.encoder.rows(rows, "logits"))
        scores: list[float] = (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).tolist()
        return scores

    def encode_ids(self, rows: Sequence[Sequence[int]]) -> list[Floats]:
        """The vector, or the logits, of each row of token ids, special tokens among them; every token is of type 0."""
        name = "sentence_embedding" if self.runtime.embedding else "logits"
        return self.encoder.rows([Row(tuple(ids), (0,) * len(ids)) for ids in rows], name)

    def score_ids(self, prefix_ids: Sequence[int], item_ids: Sequence[Sequence[int]]) -> Floats:
        """Logits [items, labels] of the pairs of a prefix and each item, as token ids with their special tokens."""
        self._require("score")
        types = (0,) * len(prefix_ids)
        rows = [Row((*prefix_ids, *item), types + (1,) * len(item)) for item in item_ids]
        return np.stack(self.encoder.rows(rows, "logits"))

    def _labels(self, *, per_token: bool) -> Labels:
        self._require("classify")
        labels = self.runtime.labels
        assert labels is not None, "read_encoder lets no classify task through without its labels"
        if labels.per_token is not per_token:
            what, use = ("tokens", "classify_tokens") if labels.per_token else ("texts", "classify")
            raise InputError(f"{self.path} labels {what}: use {use}.")
        return labels

    def _require(self, task: str) -> None:
        if task not in self.tasks:
            raise InputError(
                f"{self.path} was made for {' and '.join(self.tasks)}, not for {task}: export it with --task {task}."
            )


def label_of(labels: Labels, logits: npt.NDArray[np.float32]) -> Label:
    """The best label and the scores of all, for the logits [labels] of one text or token."""
    if labels.activation == "softmax":
        exponents = np.exp(logits - logits.max())
        scores = exponents / exponents.sum()
    elif labels.activation == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = logits
    best = int(scores.argmax())
    return Label(labels.names[best], float(scores[best]), tuple(map(float, scores)))
