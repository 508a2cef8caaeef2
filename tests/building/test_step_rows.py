"""step_rows.py: from which number of rows on steps run in the graph of prompts is measured and written down."""

from pathlib import Path

import pytest

from slmdeploy.building import step_rows
from slmdeploy.building.build import build
from slmdeploy.building.onnxruntime import open_folder
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.runtime.model import Model, load
from slmdeploy.specs import Profile
from tests.building.small import write_graph


@pytest.mark.parametrize(
    ("times", "rows"),
    [
        ({2: (1.0, 2.0), 4: (2.0, 2.0), 8: (4.0, 2.0), 16: (8.0, 2.0)}, 8),
        ({2: (2.0, 1.0), 4: (3.0, 1.0)}, 2),
        ({2: (2.0, 1.0), 4: (3.0, 4.0), 8: (6.0, 4.0)}, 8),
        ({2: (1.0, 1.0), 4: (1.0, 0.99)}, 0),
    ],
)
def test_the_other_graph_has_to_be_faster_from_there_on(times: dict[int, tuple[float, float]], rows: int) -> None:
    assert step_rows.first_that_pays(times) == rows


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    profile = Profile.model_validate(
        {
            "name": "mine",
            "summary": "s",
            "engine": "onnxruntime",
            "weights": {"scheme": "weight-only", "bits": 4, "block_size": 32},
            "prefill": {"scheme": "w8a8", "bits": 8},
            "gate": {"max_kl": 10.0, "min_top1": 0.0, "max_ppl_ratio": 10.0},
        }
    )
    return build(write_graph(folder / "graph"), profile=profile, out=folder / "build").path


def test_what_is_measured_goes_into_runtime_json(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_rows, "_step_ms", lambda model, rows: (float(rows), 4.0))
    model = open_folder(split)
    found = step_rows.choose_step_rows(model, split)
    assert found is not None
    assert found["step_rows"] == 6
    assert found["ms"]["16"] == {"steps": 16.0, "prompts": 4.0}
    assert read_runtime(split).step_rows == 6
    assert read_runtime(split).own_prefill


def test_both_graphs_are_timed(split: Path) -> None:
    model = open_folder(split)
    before = model.decoder.step_rows
    own, other = step_rows._step_ms(model, 3)
    assert own > 0
    assert other > 0
    assert model.decoder.step_rows == before


def test_a_build_of_one_form_has_no_choice(tmp_path: Path) -> None:
    folder = write_graph(tmp_path / "graph")
    before = (folder / "runtime.json").read_bytes()
    model: Model = load(folder)
    assert step_rows.choose_step_rows(model, folder) is None
    assert (folder / "runtime.json").read_bytes() == before
