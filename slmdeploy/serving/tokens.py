"""Text on the way in and tokens on the way out: prompts encoded off the event loop, tokens named for log-probabilities.

A long prompt takes the tokenizer milliseconds, in which the loop would serve nobody; the tokenizer lets go of Python's
lock, so two threads of its own do it. Knows neither engine nor HTTP.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tokenizers import Tokenizer, decoders

from slmdeploy.runtime.text import Words

T = TypeVar("T")
THREADS = 2
"""Encoding is short beside generating: more threads would only take cores from the engine's."""


class TextThreads:
    """Runs what is slow and is no model's work beside the event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="slmdeploy-text")

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns or raises."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*arguments))

    def close(self) -> None:
        """End the threads once they are idle."""
        self._pool.shutdown(wait=False)


class TokenNames:
    """What a token is called in log-probabilities, and the bytes that it stands for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = Words(tokenizer) if isinstance(tokenizer.decoder, decoders.ByteLevel) else None
        self._known: dict[int, tuple[str, bytes]] = {}

    def __getitem__(self, token: int) -> tuple[str, bytes]:
        """Text, with U+FFFD for part of a character, and bytes; a special token is called by its name."""
        if token not in self._known:
            self._known[token] = self._look_up(token)
        return self._known[token]

    def _look_up(self, token: int) -> tuple[str, bytes]:
        data = self._words[token] if self._words is not None else None
        if not data:
            text = self._tokenizer.decode([token], skip_special_tokens=False)
            return text, text.encode()
        return data.decode("utf-8", "replace"), data
