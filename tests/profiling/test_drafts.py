"""Builds with a draft are rows of their own, on prompts of text; what cannot be measured so is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from slmdeploy.errors import InputError
from slmdeploy.profiling.candidates import find
from slmdeploy.profiling.drafts import Drafts, check_drafts, text_of, with_drafts
from slmdeploy.profiling.load import requests
from slmdeploy.profiling.measure import Effort
from slmdeploy.profiling.profile import measured_rows, profile
from slmdeploy.selection import choose, read_rows
from slmdeploy.specs import Workload, parse_budget
from tests.graphs import write_tiny_graph

GENERATE = Workload(name="g", task="generate", prompt_tokens=6, new_tokens=8, requests=6)
BATCH = Workload(name="b", task="generate", scenario="offline", batch=4, prompt_tokens=6, new_tokens=8, requests=6)
QUICK = Effort(rounds=2, seconds=0.05, limit_s=0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A build, a smaller one, and a data folder."""
    root = tmp_path_factory.mktemp("drafts")
    target = write_tiny_graph(root / "target", tasks=("generate",), max_length=128)
    draft = write_tiny_graph(root / "small", layers=1, tasks=("generate",), max_length=128)
    data = root / "data"
    data.mkdir()
    record = {"prompt": "def f(x):\n    return x\n", "completion": "def g(x):\n    return x\n"}
    for split in ("train", "valid", "test"):
        (data / f"generate.{split}.jsonl").write_text(json.dumps(record) + "\n")
    return target, draft, data


def test_each_build_gets_a_row_for_each_way_to_draft(folders: tuple[Path, Path, Path]) -> None:
    target, draft, _ = folders
    plain, drafted, looked = with_drafts(find([target], None), Drafts(draft, prompt_lookup=True))
    assert [one.name for one in (plain, drafted, looked)] == ["target", "target+small", "target+prompt-lookup"]
    assert (plain.drafting, drafted.drafting) == ((), ("--draft", str(draft)))
    assert drafted.metrics["size_bytes"] > looked.metrics["size_bytes"] == plain.metrics["size_bytes"]
    assert looked.facts["precision"] == "fp32, prompt-lookup"
    assert looked.metrics is not plain.metrics
    assert with_drafts([plain], Drafts()) == [plain]


def test_prompts_are_pieces_of_the_text(folders: tuple[Path, Path, Path]) -> None:
    text = text_of(folders[2], folders[0] / "tokenizer.json")
    made = requests(GENERATE, 3, vocab_size=272, seed=0, text=text)
    twice = [*text, *text]
    for request in made:
        prompt = request["prompt_ids"]
        assert any(twice[start : start + 6] == prompt for start in range(len(text)))
    score = Workload(name="s", task="score", prefix_tokens=6, items=1, item_tokens=2)
    plain = requests(score, 1, vocab_size=272, seed=0)
    assert requests(score, 1, vocab_size=272, seed=0, text=text) == plain


def test_what_says_nothing_of_drafts_is_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --data"):
        check_drafts(Drafts(prompt_lookup=True), None, [GENERATE])
    with pytest.raises(InputError, match="one sequence at a time"):
        check_drafts(Drafts(prompt_lookup=True), folders[2], [BATCH])
    check_drafts(Drafts(), None, [BATCH])
    (tmp_path / "generate.test.jsonl").write_text("")
    with pytest.raises(InputError, match="no text to cut prompts from"):
        text_of(tmp_path, folders[0] / "tokenizer.json")


def test_a_drafted_row_is_measured_and_can_be_chosen(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target, draft, data = folders
    options = {"data": data, "effort": QUICK, "quality_tokens": 40, "drafts": Drafts(draft, prompt_lookup=True)}
    profile([target], workloads=[GENERATE], out=tmp_path / "m", **options)
    rows = measured_rows(tmp_path / "m")
    assert [row["build"] for row in rows] == ["target", "target+small", "target+prompt-lookup"]
    assert rows[2]["options"]["drafting"] == "--prompt-lookup"
    assert "drafting" not in rows[0]["options"]
    assert np.allclose([row["metrics"]["bits_per_byte"] for row in rows], rows[0]["metrics"]["bits_per_byte"])
    read = read_rows(tmp_path / "m")
    selection = choose([row for row in read if row.build.endswith("lookup")], parse_budget("tpot_ms_p50<=1e9"))
    assert selection.chosen == "target+prompt-lookup"
    assert {one.build for one in choose(read, parse_budget("tpot_ms_p50<=1e9")).candidates} == {r.build for r in read}
