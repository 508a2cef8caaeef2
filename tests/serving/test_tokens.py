"""Tokens are named by their text and their bytes, parts of characters too."""

import asyncio
import threading

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from slmdeploy.errors import InputError
from slmdeploy.serving.tokens import TextThreads, TokenNames
from tests.graphs import tiny_tokenizer


def test_a_byte_level_token_is_its_bytes() -> None:
    tokenizer = tiny_tokenizer()
    names = TokenNames(tokenizer)
    first, second = tokenizer.encode("é", add_special_tokens=False).ids
    assert names[first] == ("\N{REPLACEMENT CHARACTER}", b"\xc3")
    assert names[second] == ("\N{REPLACEMENT CHARACTER}", b"\xa9")
    assert names[tokenizer.token_to_id("Ġyes")] == (" yes", b" yes")
    assert names[1] == ("</s>", b"</s>")


def test_any_other_token_is_what_the_tokenizer_says() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TokenNames(tokenizer)[1] == ("b", b"b")


def test_text_is_encoded_beside_the_loop() -> None:
    threads = TextThreads()

    def fail() -> None:
        raise InputError("Not so.")

    async def both() -> str:
        with pytest.raises(InputError, match="Not so"):
            await threads.run(fail)
        return await threads.run(lambda: threading.current_thread().name)

    assert asyncio.run(both()).startswith("slmdeploy-text")
    threads.close()
