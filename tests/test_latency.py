"""The clock of `prune --latency`: real builds of slices, a table that remembers, and tables that are none."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from slmdeploy.errors import InputError
from slmdeploy.latency import BuildClock, goal_of, read_table
from slmdeploy.specs import load_profile, parse_latency
from tests.worlds import tiny_teacher


def copied(source: Path, calls: list[Path], folder: Path) -> None:
    calls.append(folder)
    shutil.copytree(source, folder, dirs_exist_ok=True)


def test_a_checkpoint_is_built_timed_and_remembered(tmp_path: Path) -> None:
    teacher, calls = tmp_path / "teacher", list[Path]()
    tiny_teacher(teacher)
    table, make = tmp_path / "cache" / "table.json", partial(copied, teacher, calls)
    clock = BuildClock(load_profile("cpu-int8"), parse_latency("ttft_16_ms<=5"), table)
    first = clock.milliseconds({"layers": 2}, make)
    assert first > 0
    # another limit of the same kind is answered from the table, another profile or metric is not
    again = BuildClock(load_profile("cpu-int8"), parse_latency("ttft_16_ms<=9"), table)
    assert again.milliseconds({"layers": 2}, make) == first
    assert len(calls) == 1
    other = BuildClock(load_profile("cpu-fp32"), parse_latency("tpot_16_ms<=5"), table)
    assert other.milliseconds({"layers": 2}, make) > 0
    assert len(calls) == len(read_table(table)) == 2
    (entry, *_) = read_table(table).values()
    assert (entry["layers"], entry["metric"], entry["profile"]) == (2, "ttft_16_ms", "cpu-int8")
    assert not calls[0].exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2, "entries": {}}', '{"format": 1, "entries": {"a": {"ms": -1}}}']
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(InputError, match=r"table\.json is no table of latencies .* remove it"):
        read_table(tmp_path / "table.json")


def test_no_table_is_an_empty_one(tmp_path: Path) -> None:
    assert read_table(tmp_path / "none.json") == {}


def test_a_context_that_is_too_short_and_builds_that_do_not_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    clock = goal_of("tpot_64_ms<=5", load_profile("cpu-fp32"), tmp_path / "t.json").clock
    with pytest.raises(InputError, match=r"needs a context of 81 tokens to be timed in, and .* has 64"):
        clock.check(tmp_path)
    goal_of("tpot_32_ms<=5", load_profile("cpu-fp32"), tmp_path / "t.json").clock.check(tmp_path)
    with pytest.raises(InputError, match="nothing here can run and time"):
        goal_of("ttft_16_ms<=5", load_profile("tensorrt-fp8"))
