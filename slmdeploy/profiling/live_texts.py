"""Requests of load.py in the form that goes over HTTP, where scoring and encoding take texts instead of token ids.

A text of exactly n tokens is made of words that the tokenizer has whole, one for each id, and counted. Generation goes
as ids, so it needs no tokenizer. Knows nothing of servers.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from slmdeploy.errors import InputError
from slmdeploy.runtime.text import load_tokenizer

BYTES = 256
"""Token ids that every vocabulary has; the time of a dense model does not depend on which they are."""
_MOST_WORDS = 4096


class IdRequests:
    """Requests that hold ids alone, for a server whose tokenizer is not at hand."""

    vocab_size = BYTES

    def made(self, request: dict[str, Any]) -> dict[str, Any]:
        """The prompt's ids as they are; InputError for a request that has to be text."""
        if request["op"] != "generate":
            raise InputError(
                "scoring and encoding are asked for in texts: name a folder with the tokenizer, --tokenizer"
            )
        return _as_ids(request)


class TextRequests:
    """Requests in texts of exact lengths in tokens."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder} has no tokenizer.json: name a build, package or checkpoint of the served model")
        self._tokenizer = load_tokenizer(folder)
        self._words = whole_words(self._tokenizer)
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        if not self._words:
            raise InputError(f"{folder}/tokenizer.json has no word of letters that is one token: texts cannot be made")

    def made(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request of load.py with texts in place of its ids, except those of a prompt to continue."""
        match request["op"]:
            case "score":
                items = [self.text(ids) for ids in request["item_ids"]]
                return {"op": "score", "prefix": self.text(request["prefix_ids"], special=True), "items": items}
            case "encode":
                return {"op": "encode", "texts": [self.text(row, special=True) for row in request["rows"]]}
        return _as_ids(request)

    def text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """A text of as many tokens as there are ids, the special ones among them that the tokenizer adds."""
        added = self._tokenizer.num_special_tokens_to_add(False) if special else 0
        text = "".join(self._words[token % len(self._words)] for token in ids[: max(1, len(ids) - added)])
        found = len(self._tokenizer.encode(text, add_special_tokens=special).ids)
        if found != len(ids):
            raise InputError(f"no text of {len(ids)} tokens can be made with this tokenizer: it made {found}")
        return text


def _as_ids(request: dict[str, Any]) -> dict[str, Any]:
    return {"op": "generate", "prompt": request["prompt_ids"], "new_tokens": request["new_tokens"]}


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """Words with a space in front, in the order of their ids, that stay one token each when they follow one another."""
    texts = (tokenizer.decode([token]) for token in range(tokenizer.get_vocab_size()))
    words = (f" {text.strip()}" for text in texts if text.strip().isalpha() and text.strip().isascii())
    single = (
        word for word in dict.fromkeys(words) if len(tokenizer.encode(word * 2, add_special_tokens=False).ids) == 2
    )
    return list(itertools.islice(single, _MOST_WORDS))
