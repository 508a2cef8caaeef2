"""Runs an encoder's model.onnx: texts or pairs to token rows, rows to padded batches, batches through ONNX Runtime.

Texts are cut to the model's length, of a pair the longer one first, as every peer does. Rows of like length go
together, so that little is computed for padding; results come back in the order they were asked for. Knows nothing of
what an output means: model.onnx gives arrays by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from .encoder_config import EncoderConfig
from .errors import CorruptArtifactError, InputError
from .session import Binding, as_value, open_session

GRAPH = "model.onnx"
BATCH_TOKENS = 256
"""Places in a batch, padding included: with so many the values of a layer stay in the caches. In batches of 4096 a text
of a MiniLM in W8A8 takes 1.4 times as long (`benchmarks/encoder_forms.py --batches`)."""
Text = str | tuple[str, str]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """The tokens of a text or pair: ids, the type of each (0, 1 behind the first text of a pair)."""

    ids: tuple[int, ...]
    types: tuple[int, ...]


class RowCodec:
    """Texts to rows. Sets the tokenizer's truncation, so it takes one of its own."""

    def __init__(self, tokenizer: Tokenizer, config: EncoderConfig) -> None:
        self.tokenizer, self._vocab_size = tokenizer, config.vocab_size
        special = tokenizer.num_special_tokens_to_add(is_pair=True)
        if config.max_length <= special:
            raise CorruptArtifactError(
                f"runtime.json: max_length = {config.max_length} leaves no place for text beside the {special} special "
                "tokens of tokenizer.json; export the model again."
            )
        tokenizer.enable_truncation(config.max_length, strategy="longest_first")

    def encodings(self, texts: Sequence[Text]) -> list[Encoding]:
        """What the tokenizer makes of each text, special tokens included; InputError for one that is empty."""
        check_texts(texts)
        return list(self.tokenizer.encode_batch(list(texts), add_special_tokens=True))

    def rows(self, texts: Sequence[Text]) -> list[Row]:
        """The rows of the texts."""
        return [row_of(encoding) for encoding in self.encodings(texts)]


def row_of(encoding: Encoding) -> Row:
    """The row of one encoding."""
    return Row(tuple(encoding.ids), tuple(encoding.type_ids))


def check_texts(texts: Sequence[Text]) -> None:
    """Raise InputError for no texts, and for one that is empty or no Unicode."""
    if isinstance(texts, str) or not texts:
        raise InputError("There are no texts: give a list of at least one string.")
    for i, text in enumerate(texts):
        for part in (text,) if isinstance(text, str) else text:
            _check_text(part, i)


def _check_text(text: str, index: int) -> None:
    if not isinstance(text, str) or not text:
        raise InputError(f"Text {index} is empty: give at least one character.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"Text {index} is no Unicode text: it has half a surrogate pair or bytes that are no UTF-8.")


def batches(lengths: Sequence[int], places: int, rows: int | None = None) -> Iterator[list[int]]:
    """Indices of rows that are run together: of like length, the longest first, at most `places` with padding.

    rows: at most so many, None for any number.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and ((len(batch) + 1) * lengths[batch[0]] > places or len(batch) == rows):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def feed(rows: Sequence[Row], config: EncoderConfig) -> dict[str, npt.NDArray[np.int64]]:
    """The inputs by name of one batch, [rows, width], padded on the right to its longest row."""
    width = max(len(row.ids) for row in rows)
    found = {name: np.zeros((len(rows), width), np.int64) for name in config.inputs}
    found["input_ids"][:] = config.pad_token_id
    for i, row in enumerate(rows):
        found["input_ids"][i, : len(row.ids)] = row.ids
        found["attention_mask"][i, : len(row.ids)] = 1
        if "token_type_ids" in found:
            found["token_type_ids"][i, : len(row.ids)] = row.types
    return found


class Encoder:
    """model.onnx of an encoder folder, open."""

    batch_tokens = BATCH_TOKENS
    batch_rows: int | None = None

    def __init__(self, folder: Path, config: EncoderConfig, threads: int) -> None:
        self._config, self._path = config, folder / GRAPH
        self._session = open_session(
            self._path, threads=threads, spinning=config.spinning, as_written=config.numerics_only
        )
        self._check_interface()

    @property
    def inputs(self) -> dict[str, str]:
        """The element type of each input by name, as ONNX Runtime writes it."""
        return {node.name: node.type for node in self._session.get_inputs()}

    @property
    def outputs(self) -> Mapping[str, Sequence[int | str | None]]:
        """The shape of each output by name."""
        return {node.name: node.shape for node in self._session.get_outputs()}

    def _check_interface(self) -> None:
        """Refuse a graph whose inputs and outputs are not those that runtime.json calls for."""
        config, found = self._config, self.inputs
        wanted = dict.fromkeys(config.inputs, "tensor(int64)")
        last: dict[str, int] = {}
        if config.embedding:
            last = {"last_hidden_state": 0, "sentence_embedding": config.embedding.dimension}
        if config.labels:
            last = {"logits": len(config.labels.names)}
        if found != wanted or set(self.outputs) != set(last):
            raise CorruptArtifactError(
                f"{self._path} has the inputs {', '.join(found)} and the outputs {', '.join(self.outputs)}, which are "
                "not those that runtime.json calls for; export it again."
            )
        for name, size in last.items():
            if size and self.outputs[name][-1] != size:
                raise CorruptArtifactError(
                    f"{self._path}: {name} has shape {self.outputs[name]}, which does not end in {size} as "
                    "runtime.json says; export it again."
                )

    def run(self, rows: Sequence[Row], names: Sequence[str]) -> list[Floats]:
        """These outputs for one batch, padded on the right to its longest row; places of padding hold anything."""
        binding = Binding(self._session, self._path)
        for name, array in feed(rows, self._config).items():
            binding.set_input(name, as_value(array))
        for name in names:
            binding.allocate_output(name)
        binding.run()
        return [value.numpy() for value in binding.outputs()]

    def rows(self, rows: Sequence[Row], name: str) -> list[Floats]:
        """One output for each row, without what stands at padding, in the order of the rows.

        An output with a place per token gives [length of the row, …], any other its one entry.
        """
        self._check_rows(rows)
        found: list[Floats] = [np.empty(0, np.float32)] * len(rows)
        per_token = len(self.outputs[name]) == 3
        for batch in batches([len(row.ids) for row in rows], self.batch_tokens, self.batch_rows):
            (output,) = self.run([rows[i] for i in batch], [name])
            for place, i in enumerate(batch):
                found[i] = output[place, : len(rows[i].ids)] if per_token else output[place]
                if not np.isfinite(found[i]).all():
                    raise CorruptArtifactError(f"{self._path} computes NaN or infinity; its weights are damaged.")
        return found

    def _check_rows(self, rows: Sequence[Row]) -> None:
        largest = max((max(row.ids, default=0) for row in rows), default=0)
        if largest >= self._config.vocab_size:
            raise CorruptArtifactError(
                f"{self._path}: tokenizer.json gives token {largest}, but the model has {self._config.vocab_size}; use "
                "the tokenizer that the model was trained with."
            )
