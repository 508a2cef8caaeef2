"""Texts have exactly as many tokens as were asked for."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from slmdeploy.errors import InputError
from slmdeploy.profiling.live_texts import IdRequests, TextRequests
from tests.profiling.live_server import word_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer of a few whole words."""
    return word_tokenizer(tmp_path)


def test_texts_have_the_length_that_was_asked_for(folder: Path) -> None:
    requests, tokenizer = TextRequests(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    made = requests.made({"op": "score", "prefix_ids": [5, 9, 3, 77], "item_ids": [[8, 8], [1, 2, 3]]})
    assert len(tokenizer.encode(made["prefix"]).ids) == 4
    assert [len(tokenizer.encode(item, add_special_tokens=False).ids) for item in made["items"]] == [2, 3]
    rows = requests.made({"op": "encode", "rows": [[4, 5, 6], [7, 8]]})["texts"]
    assert [len(tokenizer.encode(row).ids) for row in rows] == [3, 2]
    assert requests.text([1, 2, 3]) != requests.text([2, 3, 1])
    generate = {"op": "generate", "prompt_ids": [1], "new_tokens": 2}
    assert requests.made(generate) == {"op": "generate", "prompt": [1], "new_tokens": 2}


def test_without_a_tokenizer_only_generation_can_be_asked_for(tmp_path: Path) -> None:
    generate = {"op": "generate", "prompt_ids": [1], "new_tokens": 2}
    assert IdRequests().made(generate) == {"op": "generate", "prompt": [1], "new_tokens": 2}
    with pytest.raises(InputError, match="name a folder with the tokenizer"):
        IdRequests().made({"op": "score", "prefix_ids": [1], "item_ids": [[2]]})
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        TextRequests(tmp_path)


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="has no word of letters that is one token"):
        TextRequests(tmp_path)
