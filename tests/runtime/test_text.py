"""Text that streams is the text that is decoded at once, and stop strings never show."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from slmdeploy.runtime.errors import CorruptArtifactError, InputError
from slmdeploy.runtime.text import (
    ByteLevelDetokenizer,
    StopStrings,
    TextCodec,
    WindowDetokenizer,
    Words,
    byte_level_alphabet,
    load_tokenizer,
)
from tests.graphs import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TOKENIZER.add_tokens(["<tool>", "Ω→"])
WORDS = Words(TOKENIZER)


def sentencepiece_like() -> Tokenizer:
    """A tokenizer whose decoder is that of Llama 2: a marker for spaces, byte fallback, the first space stripped."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁cat", "é", "s"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    replace, fuse = decoders.Replace("▁", " "), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), fuse, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


SENTENCEPIECE = sentencepiece_like()


def streamed(detokenizer: ByteLevelDetokenizer | WindowDetokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]


def test_the_alphabet_is_that_of_the_tokenizers_library() -> None:
    assert set(byte_level_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_level_alphabet().values()) == list(range(256))


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1), max_size=40))
def test_any_byte_level_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    assert "".join(streamed(ByteLevelDetokenizer(WORDS), ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=40))
def test_no_piece_of_a_text_ends_inside_a_character(text: str) -> None:
    pieces = streamed(ByteLevelDetokenizer(WORDS), TOKENIZER.encode(text, add_special_tokens=False).ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_a_character_over_four_tokens_comes_whole() -> None:
    ids = TOKENIZER.encode("🐍!", add_special_tokens=False).ids
    assert streamed(ByteLevelDetokenizer(WORDS), ids) == ["", "", "", "🐍", "!", ""]


def test_an_unfinished_character_is_one_replacement() -> None:
    ids = TOKENIZER.encode("🐍", add_special_tokens=False).ids[:3]
    assert streamed(ByteLevelDetokenizer(WORDS), ids) == ["", "", "", "\ufffd"]


def test_special_and_unknown_ids_are_no_text_and_added_words_are_themselves() -> None:
    ids = [0, TOKENIZER.token_to_id("Ω→"), 1, TOKENIZER.token_to_id("<tool>"), 10**6]
    assert "".join(streamed(ByteLevelDetokenizer(WORDS), ids)) == "Ω→<tool>"


PIECES = st.sampled_from(["▁the", "▁cat", "é", "s", "▁", "</s>"]).map(lambda piece: [SENTENCEPIECE.token_to_id(piece)])
SPELLED = st.text("aπ→🐍", min_size=1, max_size=2).map(lambda text: [2 + byte for byte in text.encode()])


@given(st.lists(st.one_of(PIECES, SPELLED), max_size=12))
def test_sentencepiece_streams_to_what_it_decodes_to(parts: list[list[int]]) -> None:
    ids = [token for part in parts for token in part]
    pieces = streamed(WindowDetokenizer(SENTENCEPIECE), ids)
    assert "".join(pieces) == SENTENCEPIECE.decode(ids, skip_special_tokens=True)
    assert all("\ufffd" not in piece for piece in pieces)


def test_sentencepiece_keeps_the_space_behind_a_prompt_and_does_not_wait_for_ever_on_bad_bytes() -> None:
    the, cat = SENTENCEPIECE.token_to_id("▁the"), SENTENCEPIECE.token_to_id("▁cat")
    assert "".join(streamed(WindowDetokenizer(SENTENCEPIECE, [the]), [cat])) == " cat"
    assert any(streamed(WindowDetokenizer(SENTENCEPIECE), [2 + 0xFF] * 8)[:-1])


def test_a_codec_picks_the_detokenizer_by_the_decoder() -> None:
    assert isinstance(TextCodec(TOKENIZER).detokenizer([]), ByteLevelDetokenizer)
    assert isinstance(TextCodec(SENTENCEPIECE).detokenizer([]), WindowDetokenizer)


def test_prompts_get_special_tokens_and_items_do_not() -> None:
    codec = TextCodec(TOKENIZER)
    assert codec.prompt(" yes", "prompt") == [0, *codec.item(" yes", "item")]


@pytest.mark.parametrize("text", ["", "\ud800"])
def test_texts_that_are_none_are_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match="The prompt"):
        TextCodec(TOKENIZER).prompt(text, "prompt")


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"known": 0, "[UNK]": 1}, unk_token="[UNK]"),
        models.Unigram([("known", -1.0), ("[UNK]", -2.0)], unk_id=1),
    ],
)
def test_a_text_of_unknown_tokens_alone_is_refused(model: models.Model) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    codec = TextCodec(tokenizer)
    assert codec.item("known", "item 0") == [0]
    with pytest.raises(InputError, match=r"item 0 'ξξ' has no token that the tokenizer of this model knows"):
        codec.item("ξξ", "item 0")


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("a long text").ids) > 2


@pytest.mark.parametrize("content", [b"{}", b"not json", b"\xff\xfe", b""])
def test_a_file_that_is_no_tokenizer_is_corrupt(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def cut_by_reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first end of any stop string, and of several there the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.data())
def test_stop_strings_cut_the_same_however_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    matcher, out = StopStrings(stops), ""
    expected, matched = cut_by_reference(text, stops)
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        out += matcher.feed(text[start:end])
        assert expected.startswith(out), "something leaked that had to be held back"
    assert (out + matcher.flush(), matcher.matched) == (expected, matched)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    matcher = StopStrings(["STOP"])
    pieces = ("go S", "T", "ART ", "ST", "OP now", "more")
    assert [matcher.feed(piece) for piece in pieces] == ["go ", "", "START ", "", "", ""]
    assert matcher.matched
    assert matcher.flush() == ""


@pytest.mark.parametrize("stops", ["STOP", [""], [1]])
def test_stop_strings_must_be_a_list_of_strings(stops: object) -> None:
    with pytest.raises(InputError, match="stop must be a list of strings"):
        StopStrings(stops)  # type: ignore[arg-type]
