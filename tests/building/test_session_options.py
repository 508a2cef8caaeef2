"""session_options.py: what is faster by enough is written down, and what the profile says stays."""

import json
from pathlib import Path

import pytest

from slmdeploy.building import session_options
from slmdeploy.building.onnxruntime import open_folder
from slmdeploy.building.session_options import choose_session
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import Model
from slmdeploy.specs import SessionOptions
from tests.graphs import write_tiny_graph

FREE = SessionOptions()


def race(monkeypatch: pytest.MonkeyPatch, cores: int, seconds: dict[tuple[int, bool], float]) -> None:
    """A machine of so many cores where phases take this long by threads and spinning, and 1 s where nothing is said."""

    def phases(model: Model, prompt: list[int], steps: int) -> tuple[float, float]:
        took = seconds.get((model._threads, model.runtime.spinning), 1.0)
        return took, took

    monkeypatch.setattr(session_options, "physical_cores", lambda: cores)
    monkeypatch.setattr(session_options, "generation_seconds", phases)


def chosen(folder: Path) -> tuple[int, bool]:
    runtime = read_runtime(folder)
    return runtime.threads, runtime.spinning


@pytest.mark.parametrize(
    ("cores", "seconds", "expected", "compared"),
    [
        (2, {}, (0, True), [(1, True), (0, False)]),
        (2, {(1, True): 0.95}, (0, True), [(1, True), (0, False)]),
        (2, {(1, True): 0.8}, (1, True), [(1, True), (1, False)]),
        (6, {(4, True): 0.5, (4, False): 0.4}, (4, False), [(1, True), (2, True), (4, True), (4, False)]),
        (8, {(0, False): 0.5}, (0, False), [(1, True), (2, True), (4, True), (0, False)]),
    ],
)  # fmt: skip
def test_the_fastest_by_enough_goes_into_runtime_json(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    seconds: dict[tuple[int, bool], float],
    expected: tuple[int, bool],
    compared: list[tuple[int, bool]],
) -> None:
    folder = write_tiny_graph(tmp_path / "build")
    race(monkeypatch, cores, seconds)
    found = choose_session(open_folder(folder), folder, FREE)
    assert found is not None
    assert chosen(folder) == expected == (found["threads"], found["spinning"])
    assert [(entry["threads"], entry["spinning"]) for entry in found["compared"]] == compared
    assert found["cores"] == cores


@pytest.mark.parametrize(
    ("cores", "wanted"), [(1, FREE), (4, SessionOptions(threads=0)), (4, SessionOptions(spinning=True))]
)
def test_one_core_or_a_word_of_the_profile_leaves_no_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, wanted: SessionOptions
) -> None:
    folder = write_tiny_graph(tmp_path / "build")
    before = json.loads((folder / "runtime.json").read_text())
    race(monkeypatch, cores, {(1, True): 0.1, (0, False): 0.1})
    assert choose_session(open_folder(folder), folder, wanted) is None
    assert json.loads((folder / "runtime.json").read_text()) == before


def test_both_phases_are_run(tmp_path: Path) -> None:
    model = open_folder(write_tiny_graph(tmp_path / "build"))
    first, steps = session_options.generation_seconds(model, [1, 2, 3], 4)
    assert first > 0
    assert steps > 0
