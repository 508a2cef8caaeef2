"""lanes.py: the faster way of scoring is measured and written down; where there is no choice, nothing is."""

import json
from pathlib import Path

import pytest

from slmdeploy.building import lanes
from slmdeploy.building.onnxruntime import open_folder
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import Model
from tests.graphs import write_tiny_graph


def set_threads(folder: Path, threads: int) -> None:
    runtime = json.loads((folder / "runtime.json").read_text())
    runtime["session"]["threads"] = threads
    (folder / "runtime.json").write_text(json.dumps(runtime))


@pytest.mark.parametrize("faster", [False, True])
def test_what_is_faster_goes_into_runtime_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    folder = write_tiny_graph(tmp_path / "build")
    set_threads(folder, 2)
    asked = set()

    def seconds(model: Model, prefix: list[int], items: list[list[int]]) -> float:
        asked.update((len(prefix), len(item), len(items)) for item in items)
        assert model.score_ids(prefix, items).shape == (len(items), 2)
        return 1.0 if model.runtime.parallel_items is faster else 2.0

    monkeypatch.setattr(lanes, "_seconds", seconds)
    found = lanes.choose_lanes(open_folder(folder), folder)
    times = {"in_lanes_ms": 1000.0, "in_one_ms": 2000.0} if faster else {"in_lanes_ms": 2000.0, "in_one_ms": 1000.0}
    assert found == times | {"parallel_items": faster}
    assert read_runtime(folder).parallel_items is faster
    assert asked == {(16, 16, 16)}, "shortened to the context of 64 tokens"


@pytest.mark.parametrize(("threads", "tasks"), [(1, ("generate", "score")), (2, ("generate",))])
def test_without_a_choice_nothing_is_written(tmp_path: Path, threads: int, tasks: tuple[str, ...]) -> None:
    folder = write_tiny_graph(tmp_path / "build", tasks=tasks)
    set_threads(folder, threads)
    before = (folder / "runtime.json").read_bytes()
    assert lanes.choose_lanes(open_folder(folder), folder) is None
    assert (folder / "runtime.json").read_bytes() == before
