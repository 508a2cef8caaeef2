"""The main job in miniature, from a teacher to a package that was tried; resumed, re-selected, killed and refused."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import slmdeploy
from slmdeploy import pipeline
from slmdeploy.errors import InputError
from slmdeploy.profiling import profile as profiling
from slmdeploy.profiling.measure import Effort
from slmdeploy.profiling.search import search
from slmdeploy.progress import SILENT
from slmdeploy.specs import load_recipe
from tests.commandline import slm
from tests.worlds import RECIPE, tiny_project


@pytest.fixture(autouse=True, scope="module")
def _brief() -> Iterator[None]:
    """Measures for a moment: what figures are worth is asked in tests/profiling."""
    effort = Effort(rounds=2, seconds=0.05, limit_s=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "profile", partial(profiling.profile, effort=effort))
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny_project(tmp_path_factory.mktemp("project"))
    pipeline.run(recipe, recipe.parent / "run")
    return recipe


def test_a_run_makes_every_artifact_and_tries_the_package(project: Path) -> None:
    summary = json.loads((project.parent / "run" / "summary.json").read_text())
    names = [step["name"] for step in summary["steps"]]
    assert names == [
        "prune",
        "distill 1",
        "distill 2",
        "export",
        "build cpu-fp32",
        "build cpu-int8",
        "profile",
        "select",
        "package",
        "report",
    ]
    assert "cpu-int8" in Path(summary["report"]).read_text(encoding="utf-8")
    assert {row["build"] for row in summary["rows"]} == {"baseline", "cpu-fp32", "cpu-int8"}
    assert summary["feasible"]
    assert summary["trial"]["torch_importable"] is False
    assert len(summary["trial"]["scores"]) == 4


def test_a_second_run_does_nothing(project: Path) -> None:
    again = pipeline.run(project, project.parent / "run")
    assert all(step.reused for step in again.steps)
    assert again.feasible


def test_other_targets_and_searched_options_take_part(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each way to use threads is a process more.
    monkeypatch.setattr(profiling, "search", lambda *given, **options: search(*given, **(options | {"cores": 1})))
    shutil.copytree(project.parent / "run", tmp_path / "run")
    other = project.parent / "targets.toml"
    extra = 'profiles = ["cpu-int8"]\nestimate = ["nvidia-ada-sm89"]\nsearch = true\n'
    other.write_text(RECIPE.replace('profiles = ["cpu-fp32", "cpu-int8"]\n', extra))
    outcome = pipeline.run(other, tmp_path / "run")
    assert {"estimate nvidia-ada-sm89", "profile"} <= {step.name for step in outcome.steps if not step.reused}
    assert outcome.selection is not None
    pairs = {(one.build, one.target, one.source) for one in outcome.selection.candidates}
    assert {source for _, _, source in pairs} == {"measured", "estimated"}
    assert all(row["search"]["compared"] for row in outcome.rows if row["role"] == "candidate")
    again = pipeline.run(other, tmp_path / "run")
    assert all(step.reused for step in again.steps)


def test_a_changed_budget_only_selects_again(project: Path) -> None:
    other = project.parent / "other.toml"
    other.write_text(RECIPE.replace("size_bytes <= 1e9", "size_bytes <= 9e8"))
    outcome = pipeline.run(other, project.parent / "run")
    assert [step.name for step in outcome.steps if not step.reused] == ["select", "report"]


def test_an_infeasible_budget_says_which_constraint_binds_and_exits_with_3(project: Path) -> None:
    other = project.parent / "infeasible.toml"
    other.write_text(RECIPE.replace("size_bytes <= 1e9", "size_bytes <= 10"))
    done = slm("run", other, "-o", project.parent / "run", "--json")
    assert done.returncode == 3, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["feasible"] is False
    assert outcome["package"] is None
    assert "size_bytes" in outcome["selection"]["binding"]
    assert "error: " in done.stderr


def test_the_verbs_work_alone_on_the_artifacts_of_a_run(project: Path, tmp_path: Path) -> None:
    run = project.parent / "run"
    for arguments in (
        ("build", run / "graph", "-o", tmp_path / "int4", "--profile", "cpu-int4", "--json"),
        ("profile", run / "builds/cpu-fp32", "-o", tmp_path / "m", "--recipe", project, "--limit", "0.1", "--json"),
        ("select", tmp_path / "m", "--budget", "load_s<=1000", "--objective", "smallest", "--json"),
        ("package", run / "builds/cpu-fp32", "-o", tmp_path / "pkg", "--archive", tmp_path / "pkg.tar.gz", "--json"),
        ("verify", tmp_path / "pkg.tar.gz", "--json"),
        ("verify", run / "graph"),
        ("generate", tmp_path / "pkg", "the box", "--max-new-tokens", "4", "--json"),
        ("generate", run / "graph", "the box", "--max-new-tokens", "4", "--temperature", "0.8", "--seed", "1"),
        ("score", tmp_path / "pkg", "--prefix", "the box", " opens is", " time is", "--json"),
        ("score", run / "builds/cpu-fp32", "--prefix", "the box", " opens is", " time is"),
    ):
        done = slm(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        if "--json" in arguments:
            json.loads(done.stdout.splitlines()[-1])


def test_the_python_api_runs_what_was_made(project: Path) -> None:
    model = slmdeploy.load(project.parent / "run" / "package")
    text = model.generate("the box", max_new_tokens=5).text
    assert "".join(model.stream("the box", max_new_tokens=5)) == text
    assert len(model.score("the box", [" opens is", " time is"])) == 2


KILLED_RUN = """
import os, signal, sys
from slmdeploy import pipeline

class Killing:
    def start(self, label, total, unit):
        self.label, self.calls = label, 0

    def advance(self, n=1, note=""):
        self.calls += 1
        if self.label == "distil" and self.calls == 2:  # behind the first step of two
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self):
        pass

pipeline.run(sys.argv[1], sys.argv[2], progress=Killing())
"""


def test_kill_9_loses_only_the_stage_it_hits(tmp_path: Path) -> None:
    recipe, out = tiny_project(tmp_path), tmp_path / "run"
    ended = subprocess.run([sys.executable, "-c", KILLED_RUN, recipe, out], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (out / "pruned").is_dir()
    assert not (out / "distilled-1").exists()
    for reused in (["prune"], ["prune", "distill 1", "distill 2"]):
        steps = pipeline._Steps(pipeline.Outcome("tiny", out), lambda text: None)
        pipeline._compress(load_recipe(recipe), recipe, tmp_path / "teacher", out, steps, SILENT)
        assert [step.name for step in steps.outcome.steps if step.reused] == reused
    assert not list(out.glob(".*")), "what the killed run had half written is gone"


def test_pruning_in_rounds_is_resumed_round_by_round(tmp_path: Path) -> None:
    recipe = tiny_project(tmp_path)
    between = "\nrounds = 2\n[prune.between]\nsteps = 1\nbatch_rows = 2\nlength = 64\n"
    recipe.write_text(RECIPE.replace("\ncalibration_tokens = 512\n", f"\ncalibration_tokens = 512{between}"))
    names = ["prune 1", "distill between 1", "prune 2"]
    for reused in ([], names[:2], names):
        steps = pipeline._Steps(pipeline.Outcome("tiny", tmp_path / "run"), lambda text: None)
        spec, teacher, data = load_recipe(recipe), tmp_path / "teacher", tmp_path / "data"
        made = pipeline._smaller(spec, teacher, data, tmp_path / "run", steps, SILENT)
        assert [step.name for step in steps.outcome.steps] == names
        assert [step.name for step in steps.outcome.steps if step.reused] == reused
        if not reused:
            shutil.rmtree(made)  # as a run that was killed in the last round leaves it


def test_what_cannot_work_is_refused_before_any_work(project: Path, tmp_path: Path) -> None:
    for old, new, said in (
        ('teacher = "teacher"', 'teacher = "nobody"', "nobody"),
        ('source = "data"', 'source = "nodata"', "nodata"),
        ('"cpu-int8"]', '"cpu-int9"]', "did you mean"),
        ("[candidates]", '[candidates]\ntarget = "nvidia-hopper-sm90"', "nvidia-hopper-sm90"),
    ):
        recipe = project.parent / "wrong.toml"
        recipe.write_text(RECIPE.replace(old, new))
        with pytest.raises(InputError, match=said):
            pipeline.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
