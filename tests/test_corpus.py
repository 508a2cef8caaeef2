"""The embedded default data: split by module, hard negatives, the documented form."""

import json
from pathlib import Path

import pytest

from slmdeploy import corpus

SOURCE = '''
class Box:
    """A box that holds things."""
    def put(self, thing, *, where=None):
        """Put one thing into the box. Further text."""
    def get(self):
        """Take the oldest thing out."""
def open_box(path):
    """Open the box stored at a path."""
def close_box(box):
    """Close the given box for good."""
def untold(): pass
'''


def test_symbols_have_qualified_names_signatures_and_first_sentences() -> None:
    found = list(corpus.symbols("boxes.core", SOURCE))
    assert [s.signature for s in found] == [
        "boxes.core.Box",
        "boxes.core.Box.put(self, thing, *, where=None)",
        "boxes.core.Box.get(self)",
        "boxes.core.open_box(path)",
        "boxes.core.close_box(box)",
    ]
    assert found[1].summary == "Put one thing into the box."


def test_a_score_record_has_one_relevant_item_and_negatives_of_its_own_package() -> None:
    records = corpus.score_records(list(corpus.symbols("boxes.core", SOURCE)))
    assert len(records) == 5
    for record in records:
        assert sum(record["labels"]) == 1  # type: ignore[call-overload]
        assert len(set(record["items"])) == len(record["items"]) == 5  # type: ignore[call-overload, arg-type]
        assert all("boxes.core." in item for item in record["items"])  # type: ignore[attr-defined]


def test_chunks_give_the_text_back() -> None:
    text = "".join(f"line number {i} of a long file\n" for i in range(300))
    records = list(corpus.chunks(text))
    assert "".join(r["prompt"] + r["completion"] for r in records) == text
    assert len(records) > 3


def test_the_library_is_split_by_module_and_no_module_is_on_two_sides() -> None:
    modules = [module for module, _ in corpus.sources(corpus.library_root())]
    assert len(modules) == len(set(modules))
    assert {corpus.split_of(module) for module in modules} == set(corpus.SPLITS)


def written(folder: Path) -> dict[str, int]:
    """Different prefixes in each file of scores that `write` makes; the number of records it tells is right."""
    folder.mkdir()
    made = corpus.write(folder)
    assert made["records"].keys() == {f"{t}.{s}" for t in ("generate", "score") for s in corpus.SPLITS}  # type: ignore[attr-defined]
    found = {}
    for split in corpus.SPLITS:
        lines = (folder / f"score.{split}.jsonl").read_text().splitlines()
        assert made["records"][f"score.{split}"] == len(lines)  # type: ignore[index]
        found[split] = len({json.loads(line)["prefix"] for line in lines})
    return found


@pytest.mark.slow
def test_the_whole_library_is_written(tmp_path: Path) -> None:
    assert min(written(tmp_path / "data").values()) > 100


def test_writing_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = corpus.library_root() / "asyncio"
    monkeypatch.setattr(corpus, "library_root", lambda: part)
    assert min(written(tmp_path / "a").values()) > 0
    written(tmp_path / "b")
    assert (tmp_path / "a" / "score.train.jsonl").stat().st_size > 1000
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
