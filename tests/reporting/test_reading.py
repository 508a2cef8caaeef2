"""Reading: what a run holds arrives, what it lacks is said, and whatever is wrong with a file is one sentence."""

import json
import shutil
from pathlib import Path

import pytest

from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.reporting.reading import read_run
from slmdeploy.reporting.records import Run
from tests.reporting.fixtures import measurement, write_measurement


def written(folder: Path, change: dict) -> Path:
    """A measurement's .json file with some of its keys replaced."""
    file = folder / "m.json"
    file.write_text(json.dumps(measurement() | change), encoding="utf-8")
    return file


def test_a_run_has_everything(run: Run) -> None:
    assert run.name == "synthetic"
    assert run.labels[:2] == ["baseline", "cpu-fp32"]
    assert run.labels[-1] == "cpu-int8-split@x86-64-amx"
    assert run.baseline is run.rows[0]
    assert run.selection is not None
    assert run.selection.chosen == "cpu-int8-split"
    assert run.left_out == ()


def test_lineage_names_stages_and_what_no_stage_made(run: Run) -> None:
    stages = {stage.name: stage for stage in run.stages}
    assert stages["prune"].sources == ("data", "checkpoint")
    assert stages["distill 1"].sources == ("data", "teacher", "prune")
    assert stages["build cpu-int4"].sources == ("export", "data")
    assert stages["select"].sources == ("profile", "estimate x86-64-amx")
    assert stages["data"].reused
    assert len(stages["export"].key) == 64


def test_sensitivity_is_what_the_manifest_says(run: Run) -> None:
    (found,) = run.sensitivities
    assert found.build == "cpu-int4"
    assert [(part, loss) for part, _, _, loss in found.kept] == [
        ("lm_head", 8.5e-3),
        ("model.layers.0.mlp.down_proj", 1.6e-3),
    ]
    assert found.forms == {"int4 block 128": 3, "int8 block 128": 2}


def test_a_run_may_have_moved(run_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(run_folder, moved)
    assert read_run(moved).labels == read_run(run_folder).labels


def test_rows_that_were_imported_are_named(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary["steps"] = [step for step in summary["steps"] if not step["name"].startswith("estimate")]
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (said,) = read_run(folder).left_out
    assert said.startswith("The figures of cpu-int8-split@x86-64-amx are left out: they were imported")


def test_the_report_of_an_earlier_run_is_no_stage(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / "report.html").write_text("earlier", encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    step = {"name": "report", "path": f"{summary['out']}/report.html", "reused": True, "seconds": 0.1}
    summary["steps"].append(step)
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    assert [stage.name for stage in read_run(folder).stages][-1] == "select"


def test_a_measurement_alone_says_what_is_left_out(run_folder: Path, tmp_path: Path) -> None:
    for place in (run_folder / "measurement", written(tmp_path, {})):
        found = read_run(place)
        assert found.selection is None
        assert found.stages == ()
        assert "need the folder of a run" in found.left_out[0]


def test_an_earlier_schema_is_refused_with_the_remedy(tmp_path: Path) -> None:
    old = measurement()
    del old["schema"]
    file = tmp_path / "old.json"
    file.write_text(json.dumps(old), encoding="utf-8")
    with pytest.raises(InputError, match="has schema 1, but this version reads 2: measure again"):
        read_run(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": [{"build": 3}]}, "rows.0.build"),
        ({"rows": "many"}, "rows: Input should be a valid"),
        ({"threads": "two"}, "threads"),
        ({"rows": [measurement()["rows"][1] | {"build": "two\nlines"}]}, "rows.0.build"),
        ({"rows": measurement()["rows"] * 2}, "two rows of build 'baseline'"),
    ],
)
def test_a_file_of_another_form_is_one_sentence(tmp_path: Path, change: dict, said: str) -> None:
    with pytest.raises(CorruptArtifactError, match=said) as failure:
        read_run(written(tmp_path, change))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"fast"', "null"])
def test_a_figure_that_is_no_number_is_refused(tmp_path: Path, value: str) -> None:
    text = json.dumps(measurement())
    name = '"size_bytes": '
    at = text.index(name) + len(name)
    file = tmp_path / "m.json"
    file.write_text(text[:at] + value + text[text.index(",", at) :], encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="size_bytes"):
        read_run(file)


def test_a_metric_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    rows = measurement()["rows"]
    rows[1]["metrics"]["speed"] = 1.0
    with pytest.raises(CorruptArtifactError, match="the metric 'speed'"):
        read_run(written(tmp_path, {"rows": rows}))


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is no JSON file"), ("[1]", "is not a JSON object"), ("[" * 10**5, "is no JSON file")]
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "m.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=said):
        read_run(file)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_run(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"neither summary\.json nor manifest\.json"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="no rows"):
        read_run(written(tmp_path, {"rows": []}))


@pytest.mark.parametrize("path", ["runs/tiny/../../etc", "/etc", "elsewhere/graph"])
def test_a_step_outside_the_run_is_refused(run_folder: Path, tmp_path: Path, path: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary["steps"][0]["path"] = path
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="not in the folder of the run"):
        read_run(folder)


def test_a_changed_measurement_is_refused(tmp_path: Path) -> None:
    folder = write_measurement(tmp_path / "measurement", measurement())
    file = folder / "measurement.json"
    file.write_text(file.read_text(encoding="utf-8").replace("Synthetic", "Synthesis"), encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"measurement\.json"):
        read_run(folder)
