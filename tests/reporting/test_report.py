"""The verb: writes whole files where it may, refuses where it may not; its command ends with the documented codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slmdeploy.errors import InputError, OutputExistsError
from slmdeploy.reporting.report import report
from tests.reporting.fixtures import make_run, measurement


def slm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slmdeploy", "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_page_of_a_run_lies_in_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert report(folder) == folder / "report.html"
    with pytest.raises(OutputExistsError, match="pass --force"):
        report(folder)
    assert report(folder, markdown=tmp_path / "new" / "report.md", force=True) == folder / "report.html"
    assert (tmp_path / "new" / "report.md").is_file()
    assert not list(folder.glob(".*"))


def test_the_page_of_a_measurement_lies_beside_it(run_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    file.write_text(json.dumps(measurement()), encoding="utf-8")
    assert report(file) == tmp_path / "m-report.html"
    assert report(run_folder / "measurement", out=tmp_path / "x.html").is_file()


def test_a_file_that_is_no_report_is_never_replaced(run_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "thesis.html"
    mine.write_text("<p>ten years of work", encoding="utf-8")
    for settings in ({"out": mine}, {"out": tmp_path / "r.html", "markdown": mine}):
        with pytest.raises(OutputExistsError, match="is no report of slmdeploy"):
            report(run_folder, force=True, **settings)
    assert mine.read_text(encoding="utf-8") == "<p>ten years of work"
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(InputError, match="is a folder: name the file"):
        report(run_folder, out=tmp_path)


def test_the_command_writes_and_says_where(run_folder: Path, tmp_path: Path) -> None:
    page, text = tmp_path / "r.html", tmp_path / "r.md"
    done = slm(run_folder, "-o", page, "--markdown", text, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"path": str(page), "markdown": str(text)}
    assert page.is_file()
    assert text.is_file()


def test_the_command_compares_and_fails_on_a_regression(run_folder: Path, tmp_path: Path) -> None:
    slower = make_run(tmp_path / "b", slower={"cpu-int8": 1.2}, seed=50)
    pair = ("--compare", run_folder, slower)
    done = slm(*pair, "-o", tmp_path / "c.html", "--markdown", tmp_path / "c.md")
    assert done.returncode == 0, done.stderr
    assert "9 regressions" in done.stdout
    assert "9 regressions" in (tmp_path / "c.html").read_text(encoding="utf-8")
    failed = slm(*pair, "--fail-on-regression", "--json")
    assert failed.returncode == 4
    assert "is worse than" in failed.stderr
    assert json.loads(failed.stdout.splitlines()[-1])["threshold"] == 0.05
    assert slm(*pair, "--fail-on-regression", "--threshold", "0.5").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "report takes one of the two"),
        (("RUN", "--compare", "RUN", "RUN"), "report takes one of the two"),
        (("nothing",), "nothing does not exist"),
        (("RUN", "--fail-on-regression"), "go with --compare"),
        (("RUN", "--threshold", "0.2"), "go with --compare"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(run_folder: Path, arguments: tuple[str, ...], said: str) -> None:
    done = slm(*(run_folder if argument == "RUN" else argument for argument in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
