"""Records to packed rows: what counts, what is cut, that packed sequences do not see each other, and bad input."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM

from slmdeploy.compress.data import Piece, Texts, make_texts, open_sources, pieces, prompts
from slmdeploy.compress.packing import mixed_rows, rows
from slmdeploy.errors import InputError

LABELS = (" no", " yes")
GENERATE = {"prompt": "the quick", "completion": " brown fox"}
SCORE = {"prefix": "fox\n", "items": ["dog", "fox", "the"], "labels": [0, 1, 0]}
TEXT_ALONE: dict[str, Any] = {"length": 64, "score_share": 0.0, "seed": 0}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def first_piece(path: Path, teacher: Path, length: int = 64) -> tuple[Piece, Texts]:
    (source,) = open_sources(path, "train").values()
    texts = make_texts(teacher, (1,), LABELS, source.kind == "score")
    return next(pieces(source, texts, length, 0)), texts


def test_a_completion_counts_and_its_prompt_does_not(tmp_path: Path, teacher: Path) -> None:
    piece, texts = first_piece(lines(tmp_path / "d.jsonl", GENERATE), teacher)
    prompt = texts.tokenizer.encode("the quick").ids
    answer = texts.tokenizer.encode(" brown fox", add_special_tokens=False).ids
    assert prompt[0] == 0  # BOS by the tokenizer's own post-processor
    assert piece.ids == [*prompt, *answer, 1]
    assert piece.weights == [0.0] * len(prompt) + [1.0] * (len(answer) + 1)


def test_a_label_word_counts_as_much_as_all_before_it(tmp_path: Path, teacher: Path) -> None:
    (source,) = open_sources(lines(tmp_path / "d.jsonl", SCORE), "train").values()
    texts = make_texts(teacher, (1,), LABELS, True)
    found = list(islice(pieces(source, texts, 64, 0), 3))
    prefix = texts.tokenizer.encode("fox\n").ids
    assert texts.label_ids is not None
    expected = {}
    for item, label in zip(SCORE["items"], SCORE["labels"], strict=True):
        ids = texts.tokenizer.encode(item, add_special_tokens=False).ids
        expected[tuple(prefix + ids)] = texts.label_ids[label]
    assert {tuple(piece.ids[:-1]): piece.ids[-1] for piece in found} == expected
    assert all((piece.weights[0], piece.weights[-1]) == (0, 1) for piece in found)
    assert all(sum(piece.weights[:-1]) == pytest.approx(1) and min(piece.weights[1:]) > 0 for piece in found)


@pytest.mark.parametrize("suffix", [".txt", ".parquet", ".jsonl"])
def test_texts_count_whole_and_are_cut_into_windows(
    tmp_path: Path, teacher: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where a stream of parquet is left half-way, datasets gives pyarrow's threads this long to end.
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    path, text = tmp_path / f"d{suffix}", "the quick brown fox " * 20
    if suffix == ".txt":
        path.write_text(text, encoding="utf-8")
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
    else:
        lines(path, {"text": text})
    (source,) = open_sources(path, "train").values()
    texts = make_texts(teacher, (1,), LABELS, False)
    whole = [*texts.tokenizer.encode(text).ids, 1]
    count = -(-len(whole) // 32)
    found = list(islice(pieces(source, texts, 32, 0), count))
    assert [token for piece in found for token in piece.ids] == whole
    assert all(piece.weights == [0.0] + [1.0] * (len(piece.ids) - 1) for piece in found)


def test_what_is_too_long_is_cut_or_dropped_and_counted(tmp_path: Path, teacher: Path) -> None:
    long_answer = {"prompt": "the", "completion": " fox" * 50}
    long_prompt = {"prompt": "the fox " * 50, "completion": " dog"}
    piece, texts = first_piece(lines(tmp_path / "d.jsonl", long_answer, long_prompt), teacher, length=32)
    (source,) = open_sources(tmp_path / "d.jsonl", "train").values()
    assert len(piece.ids) == len(piece.weights) == 32
    list(islice(pieces(source, texts, 32, 0), 2))
    assert texts.tally.truncated >= 2
    assert texts.tally.dropped >= 1
    with pytest.raises(InputError, match="no record that fits into 32 tokens with one to predict: raise length"):
        first_piece(lines(tmp_path / "e.jsonl", long_prompt), teacher, length=32)


def test_rows_are_full_weighted_to_one_and_restart_positions(data: Path, teacher: Path) -> None:
    sources = open_sources(data, "train")
    texts = make_texts(teacher, (1,), LABELS, True)
    found = list(islice(mixed_rows(sources, texts, length=64, score_share=0.25, seed=0), 8))
    assert [bool(row["is_text"]) for row in found] == [True, True, True, False] * 2
    for row in found:
        assert all(row[name].shape == (64,) for name in ("input_ids", "position_ids", "weights"))
        assert row["weights"].sum().item() == pytest.approx(1)
        starts = row["position_ids"] == 0
        assert starts.sum() > 2
        assert (row["weights"][starts] == 0).all()
    assert texts.tally.row_tokens == 64 * 8
    assert 0 < texts.tally.counted_tokens < texts.tally.row_tokens


def test_rows_repeat_for_a_seed_and_differ_between_seeds(data: Path, teacher: Path) -> None:
    def take(seed: int) -> torch.Tensor:
        texts = make_texts(teacher, (1,), LABELS, True)
        stream = mixed_rows(open_sources(data, "train"), texts, length=64, score_share=0.5, seed=seed)
        return torch.stack([row["input_ids"] for row in islice(stream, 30)])  # more than one pass over the data

    assert torch.equal(take(3), take(3))
    assert not torch.equal(take(3), take(4))


def test_packed_logits_equal_separate_ones(teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    assert model.config._attn_implementation == "sdpa"
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(2, 200, (n,), generator=generator).tolist() for n in (1, 9, 20, 14)]
    texts = make_texts(teacher, (), LABELS, False)
    stream = iter([Piece(part, [0.0] + [1.0] * (len(part) - 1)) for part in parts] + [Piece([5] * 64, [1.0] * 64)] * 2)
    row = next(rows(stream, texts, 64))
    with torch.no_grad():
        packed = model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False).logits
        alone = torch.cat([model(input_ids=torch.tensor([part])).logits for part in parts], 1)
    torch.testing.assert_close(packed[:, : alone.shape[1]], alone, atol=1e-4, rtol=1e-4)


def test_prompts_keep_their_ends(tmp_path: Path, teacher: Path) -> None:
    (source,) = open_sources(
        lines(tmp_path / "d.jsonl", {"prompt": "a" * 50, "completion": "b"}, GENERATE), "train"
    ).values()
    texts = make_texts(teacher, (1,), LABELS, False)
    found = prompts(source, texts, length=10, count=9, seed=0)
    assert len(found) == 2
    assert all(len(prompt) <= 10 and prompt[0] == 0 for prompt in found)


def _missing(folder: Path) -> Path:
    return folder / "nothing.jsonl"


def _empty(folder: Path) -> Path:
    return lines(folder / "empty.jsonl")


def _broken(folder: Path) -> Path:
    path = folder / "broken.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": ', encoding="utf-8")
    return path


def _folder(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_missing, "nothing.jsonl does not exist"),
        (_empty, "empty.jsonl"),
        (_broken, "broken.jsonl"),
        (_folder, "holds neither generate.train.jsonl nor score.train.jsonl"),
        (lambda d: lines(d / "c.jsonl", {"question": "a"}), "c.jsonl has the columns question: needed are prompt"),
        (lambda d: lines(d / "c.csv", "a,b"), "is of a kind that is not read"),
        (lambda d: lines(d / "n.jsonl", GENERATE, {"prompt": None, "completion": "x"}), "n.jsonl:2: prompt is None"),
        (lambda d: lines(d / "s.jsonl", SCORE, {**SCORE, "labels": [1]}), "s.jsonl:2: labels must be one 0 or 1"),
        (lambda d: lines(d / "s.jsonl", SCORE, {**SCORE, "labels": [0, 2, 0]}), "s.jsonl:2: labels must be one"),
        (lambda d: lines(d / "s.jsonl", {**SCORE, "items": []}), "s.jsonl:1: items must be a list"),
    ],
)
def test_unfit_data_is_one_sentence(tmp_path: Path, teacher: Path, make: Callable[[Path], Path], said: str) -> None:
    path = make(tmp_path)

    def read() -> None:
        (source,) = open_sources(path, "train").values()
        texts = make_texts(teacher, (1,), LABELS, source.kind == "score")
        list(islice(pieces(source, texts, 64, 0), 8))

    with pytest.raises(InputError, match=said) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_label_word_of_several_tokens_is_refused(teacher: Path) -> None:
    with pytest.raises(InputError, match=r"the label 'irrelevant' is \d+ tokens"):
        make_texts(teacher, (1,), ("irrelevant", " yes"), True)
    assert make_texts(teacher, (1,), LABELS, True).label_ids is not None


def test_a_kind_that_is_missing_from_the_data_is_named(tmp_path: Path, teacher: Path) -> None:
    sources = open_sources(lines(tmp_path / "d.jsonl", GENERATE), "train")
    texts = make_texts(teacher, (1,), LABELS, False)
    with pytest.raises(InputError, match="no score records"):
        next(mixed_rows(sources, texts, length=64, score_share=0.5, seed=0))
    with pytest.raises(InputError, match="no generate records"):
        next(mixed_rows({}, texts, length=64, score_share=0.0, seed=0))


def test_label_words_bear_their_query_and_a_visit_shows_as_many_items_as_asked(tmp_path: Path, teacher: Path) -> None:
    record = {"prefix": "q", "items": list("abcdef"), "labels": [0, 0, 1, 0, 1, 0]}
    sources = open_sources(lines(tmp_path / "s.jsonl", record, record), "train")
    texts = make_texts(teacher, (1,), LABELS, True, 4)
    assert texts.label_ids is not None
    row = next(mixed_rows(sources, texts, length=64, score_share=1.0, seed=0))
    ends = row["queries"] > 0
    assert set(row["queries"][ends].tolist()) <= {1, 2}
    assert set(row["input_ids"][ends].tolist()) == set(texts.label_ids)
    first = row["queries"][ends][:4]
    assert len(set(first.tolist())) == 1
    assert (row["input_ids"][ends][:4] == texts.label_ids[1]).sum() == 1  # one relevant item, the rest not
    plain = next(mixed_rows(open_sources(lines(tmp_path / "g.jsonl", GENERATE), "train"), texts, **TEXT_ALONE))
    assert plain["queries"].sum() == 0


def test_answers_stand_for_the_generate_records(tmp_path: Path, teacher: Path) -> None:
    sources = open_sources(lines(tmp_path / "g.jsonl", GENERATE), "train")
    texts = make_texts(teacher, (1,), LABELS, False)
    answers = [([0, 50 + i], [60 + i, 1]) for i in range(3)]
    row = next(mixed_rows(sources, texts, **TEXT_ALONE, answers=answers))
    found = row["input_ids"][row["weights"] > 0].tolist()
    assert set(found) == {60, 61, 62, 1}
    assert found[1::2] == [1] * (len(found) // 2)
    assert sorted(found[0:6:2]) == [60, 61, 62]  # each once before any comes again


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "data [1]*"
    folder.mkdir()
    (folder / "generate.train.jsonl").write_text('{"prompt": "the", "completion": " fox"}\n')
    (record,) = open_sources(folder, "train")["generate"].shuffled(0)
    assert record["prompt"] == "the"


def test_a_token_that_the_model_does_not_know_is_named(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    small = checkpoint(vocab_size=260)
    source = lines(tmp_path / "d.jsonl", GENERATE)
    with pytest.raises(InputError, match=r"d\.jsonl has a text with the token .* has a vocabulary of 260"):
        first_piece(source, small)
    (opened,) = open_sources(source, "train").values()
    with pytest.raises(InputError, match="resize its embeddings, or take the token out"):
        prompts(opened, make_texts(small, (1,), LABELS, False), length=32, count=1, seed=0)


def test_records_that_leave_nothing_to_predict_are_refused(tmp_path: Path, teacher: Path) -> None:
    (source,) = open_sources(lines(tmp_path / "d.jsonl", {"prompt": "the quick", "completion": ""}), "train").values()
    with pytest.raises(InputError, match=r"with one to predict: raise length, or fill in what is empty"):
        list(islice(pieces(source, make_texts(teacher, (), LABELS, False), 64, 0), 9))


def test_empty_prompts_are_passed_over_and_none_at_all_refused(tmp_path: Path, teacher: Path) -> None:
    texts = make_texts(teacher, (1,), LABELS, False)
    texts.tokenizer.post_processor = processors.Sequence([])  # a tokenizer without BOS
    empty = {"prompt": "", "completion": "fox"}
    (source,) = open_sources(lines(tmp_path / "d.jsonl", empty, GENERATE), "train").values()
    assert len(prompts(source, texts, length=32, count=9, seed=0)) == 1
    (source,) = open_sources(lines(tmp_path / "e.jsonl", empty), "train").values()
    with pytest.raises(InputError, match=r"e\.jsonl has no prompt that is not empty"):
        prompts(source, texts, length=32, count=9, seed=0)
