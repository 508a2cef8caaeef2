"""Text on both sides of the model: encoding with checks, decoding token by token, and stop strings.

Decoding is correct UTF-8 across tokens: what is given out never has to be taken back, and all of it together is what
the tokenizer decodes at once. Byte-level BPE (GPT-2 and what follows it: Llama 3, Qwen, SmolLM) is decoded from a
table of bytes in constant time per token; any other decoder (SentencePiece with byte fallback) through the tokenizer
itself over a short window. Stop strings hold back every end that may still become one. Knows nothing of models.
"""

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer, decoders, models

from .errors import CorruptArtifactError, InputError
from .strictjson import read_regular

TOKENIZER = "tokenizer.json"
_MAX_TOKENIZER_BYTES = 256 << 20
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, with truncation and padding off: both would change a prompt silently."""
    data = read_regular(folder / TOKENIZER, _MAX_TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the binding raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise CorruptArtifactError(f"{folder / TOKENIZER} is not a tokenizer ({reason}).") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextCodec:
    """Text to token ids and back. A text that the tokenizer can say nothing about is an InputError that names it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._unknown_id = unknown_id(tokenizer)
        self._words = Words(tokenizer) if isinstance(tokenizer.decoder, decoders.ByteLevel) else None

    def prompt(self, text: str, name: str) -> list[int]:
        """Ids of a prompt or prefix, with the special tokens that the tokenizer's post-processor adds."""
        self.item(text, name)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=True).ids
        return ids

    def item(self, text: str, name: str) -> list[int]:
        """Ids of an item or completion, which goes behind a prefix and gets no special tokens."""
        if not text:
            raise InputError(f"The {name} is empty: give at least one character.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"The {name} is no Unicode text: it has half a surrogate pair or bytes that are no UTF-8.")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids or all(token == self._unknown_id for token in ids):
            raise InputError(f"The {name} {text[:40]!r} has no token that the tokenizer of this model knows.")
        return ids

    def detokenizer(self, context: Sequence[int]) -> "Detokenizer":
        """A fresh detokenizer for what comes behind these ids."""
        return WindowDetokenizer(self.tokenizer, context) if self._words is None else ByteLevelDetokenizer(self._words)


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id that stands for text outside the vocabulary; None where there is none, as in byte-level BPE."""
    if isinstance(tokenizer.model, models.Unigram):
        unigram_id: int | None = json.loads(tokenizer.to_str())["model"]["unk_id"]
        return unigram_id
    token = tokenizer.model.unk_token
    return None if token is None else tokenizer.token_to_id(token)


class Detokenizer(Protocol):
    """Decodes one sequence; the pieces together are the text, special tokens left out."""

    def feed(self, token: int) -> str:
        """The text that has become certain with this token, perhaps none."""

    def flush(self) -> str:
        """The rest, with U+FFFD for what never became a character."""


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that stand for no text, such as the end of a sequence."""
    return frozenset(i for i, added in tokenizer.get_added_tokens_decoder().items() if added.special)


def byte_level_alphabet() -> dict[str, int]:
    """Character → byte of GPT-2's byte-level BPE: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = byte_level_alphabet()


class Words:
    """The bytes of each token of a byte-level vocabulary, looked up once; special tokens have none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._bytes: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        data = self._bytes.get(token)
        if data is None:
            data = self._bytes[token] = self._lookup(token)
        return data

    def _lookup(self, token: int) -> bytes:
        word = None if token in self._special else self._tokenizer.id_to_token(token)
        if word is None:
            return b""
        # An added token may have characters outside the alphabet: it stands for its own UTF-8.
        return bytes(map(_ALPHABET.__getitem__, word)) if _ALPHABET.keys() >= set(word) else word.encode()


class ByteLevelDetokenizer:
    """Each token is some bytes, and an incremental UTF-8 decoder turns bytes into characters when they are whole."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """See Detokenizer."""
        return self._decoder.decode(self._words[token])

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Decodes the last few tokens with the tokenizer and gives out what is new, unless it ends inside a character.

    The window starts one settled piece back (at first, `context`: the end of the prompt), because a decoder may treat
    the first token of its input differently, as by stripping a leading space. A character has at most 4 bytes, so what
    is unfinished after 4 tokens never becomes one.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._settled = list(context)[-_LONGEST_CHARACTER:]
        self._held: list[int] = []
        self._unfinished = 0

    def feed(self, token: int) -> str:
        """See Detokenizer."""
        if token in self._special:
            return ""
        self._held.append(token)
        text = self._new_text()
        self._unfinished = self._unfinished + 1 if text.endswith(_UNKNOWN) else 0
        if not text or 0 < self._unfinished < _LONGEST_CHARACTER:
            return ""
        self._settled, self._held, self._unfinished = self._held, [], 0
        return text

    def flush(self) -> str:
        """See Detokenizer."""
        text, self._held = self._new_text(), []
        return text

    def _new_text(self) -> str:
        before: str = self._tokenizer.decode(self._settled, skip_special_tokens=True)
        both: str = self._tokenizer.decode(self._settled + self._held, skip_special_tokens=True)
        return both[len(before) :]


class StopStrings:
    """Cuts a stream of text before the first stop string to be completed; of several completed together, the longest.

    What may still become a stop string is held back, so neither a stop string nor the beginning of one that matches
    is ever given out, however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise InputError("stop must be a list of strings that are not empty.")
        self._stops = tuple(stops)
        self._pending = ""
        self.matched = False

    def feed(self, text: str) -> str:
        """The text that is certain to stay; after a match everything before it once, then nothing more."""
        if not self._stops or self.matched:
            return "" if self.matched else text
        pending = self._pending + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := pending.find(stop)) >= 0]
        if ends:
            self.matched, self._pending = True, ""
            return pending[: min(ends)[1]]
        keep = self._longest_beginning(pending)
        self._pending = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def _longest_beginning(self, text: str) -> int:
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)

    def flush(self) -> str:
        """What was held back and became no stop string, once no more text comes."""
        text, self._pending = self._pending, ""
        return text
