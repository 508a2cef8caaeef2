"""docs/selection.md says what its commands print, and the program that writes it replaces exactly the outputs."""

from pathlib import Path

import pytest

from benchmarks import selection_stories
from benchmarks.selection_stories import PAGE, STORY, retold
from slmdeploy.errors import InputError
from tests.selection.rows import entry, measurement


def test_the_page_is_what_its_commands_print() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(STORY.findall(page)) >= 7
    assert retold(page) == page


def test_outputs_are_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_stories, "ROOT", tmp_path)
    measurement(tmp_path / "m.json", entry("a"))
    story = "```sh\nslmdeploy select m.json \\\n  --budget 'tpot_ms_p50<={}'\n```\n```text\nold\n```\n"
    other = "```sh\nslmdeploy targets\n```\nand\n```text\nold\n```\n"
    page = retold(f"# Page\n{story.format(3)}{story.format(1)}{other}")
    assert page.count("old") == 1
    assert page.startswith("# Page\n```sh\nslmdeploy select m.json")
    assert "```text\nselected: a\n" in page
    assert "tpot_ms_p50 <= 1 is missed" in page
    assert "\nexit code 3\n```\n" in page


def test_a_story_that_cannot_be_told_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_stories, "ROOT", tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        retold("```sh\nslmdeploy select nowhere.json\n```\n```text\n```\n")
