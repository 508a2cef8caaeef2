"""A package runs by itself: elsewhere, in a process without torch and slmdeploy, with the results of its build."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slmdeploy.artifacts import open_artifact
from slmdeploy.packaging.archive import pack
from slmdeploy.packaging.package import package
from slmdeploy.packaging.unpacking import unpack
from slmdeploy.runtime.encoder_model import load_encoder
from slmdeploy.runtime.model import load
from tests.packaging.packages import write_build, write_encoder_build

BOOTSTRAP = """
import runpy, sys
absent = {"torch", "transformers", "onnx", "slmdeploy", *sys.argv[1].split()}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def isolated(
    folder: Path, *arguments: str, absent: str = "", cwd: Path, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", BOOTSTRAP, absent, str(folder / "run"), *arguments]
    return subprocess.run(
        command, cwd=cwd, input=stdin, capture_output=True, encoding="utf-8", timeout=600, check=False
    )


RESULT = {
    "passed": True,
    "gates": {"kl": {"passed": True, "value": 0.01, "limit": 0.02}},
    "quality": {"kl": 0.01234, "sequences": "data"},
    "speed": {"prefill_ratio": 0.5, "score_ratio": None},
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_build(tmp_path_factory.mktemp("edge") / "build", RESULT)


@pytest.fixture(scope="module")
def packaged(build: Path) -> Path:
    return package(build, out=build.parent / "package").path


def test_an_unpacked_package_does_what_the_build_does_without_torch_and_slmdeploy(
    build: Path, packaged: Path, tmp_path: Path
) -> None:
    elsewhere = unpack(pack(packaged, tmp_path / "p.tar.gz"), tmp_path / "elsewhere")
    model = load(build)
    made = isolated(elsewhere, "generate", "def añ(", "--max-new-tokens", "8", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    expected = model.generate("def añ(", max_new_tokens=8)
    assert json.loads(made.stdout)["token_ids"] == list(expected.token_ids)
    assert json.loads(made.stdout)["text"] == expected.text
    scored = isolated(elsewhere, "score", "--prefix", "p", "one", "two", "--json", cwd=tmp_path)
    assert json.loads(scored.stdout)["scores"] == pytest.approx(model.score("p", ["one", "two"]), abs=1e-6)
    verified = isolated(elsewhere, "verify", cwd=tmp_path)
    assert (verified.returncode, verified.stderr) == (0, "")
    open_artifact(elsewhere, "package")
    assert not list(elsewhere.rglob("__pycache__")), "running a package must not change it"


def test_a_packaged_embedder_embeds_arguments_and_the_lines_of_stdin(tmp_path: Path) -> None:
    build = write_encoder_build(tmp_path / "b", "embed")
    made = package(build, out=tmp_path / "p").path
    expected = load_encoder(build).embed(["one", "two words"])
    for arguments, stdin in ((["one", "two words"], ""), ([], "one\ntwo words\n")):
        done = isolated(made, "embed", *arguments, "--json", cwd=tmp_path, stdin=stdin)
        assert done.returncode == 0, done.stderr
        assert np.array(json.loads(done.stdout)["embeddings"]) == pytest.approx(expected, abs=1e-6)
    refused = isolated(made, "generate", "one", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


def test_run_is_an_executable_of_its_own(packaged: Path, tmp_path: Path) -> None:
    assert (packaged / "run").read_text().startswith("#!/usr/bin/env python3\n")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    ended = subprocess.run(
        [packaged / "run", "verify"], cwd=tmp_path, env={"PATH": path}, capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_a_missing_requirement_is_one_sentence(packaged: Path, tmp_path: Path) -> None:
    ended = isolated(packaged, "verify", absent="onnxruntime", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("run: onnxruntime is not installed: python3 -m pip install -r ")
    assert ended.stderr.count("\n") == 1


def test_a_damaged_package_is_exit_code_5_without_a_traceback(packaged: Path, tmp_path: Path) -> None:
    damaged = unpack(pack(packaged, tmp_path / "p.tar.gz"), tmp_path / "p")
    with (damaged / "model.onnx.data").open("r+b") as data:
        data.write(b"\0\1\2\3")
    for verb in (["verify"], ["generate", "x"]):
        ended = isolated(damaged, *verb, cwd=tmp_path)
        assert ended.returncode == 5
        assert "model.onnx.data has changed" in ended.stderr
        assert ended.stderr.count("\n") == 1


def test_a_package_can_be_loaded_as_a_build_can(packaged: Path) -> None:
    assert load(packaged).tasks == ("generate", "score")


def test_what_is_there_for_other_runtimes_goes_along(packaged: Path) -> None:
    shipped = open_artifact(packaged, "package").manifest["files"]
    assert {"standard.onnx", "genai_config.json"} <= set(shipped)
    assert {"model.onnx", "model.onnx.data", "score.onnx", "runtime.json"} <= set(shipped)


def test_pins_readme_and_lineage(build: Path, packaged: Path) -> None:
    artifact = open_artifact(packaged, "package")
    pins = (packaged / "requirements.txt").read_text().splitlines()
    assert [pin.split("==")[0] for pin in pins] == ["numpy", "onnxruntime", "tokenizers"]
    assert artifact.plan["requirements"] == dict(pin.split("==") for pin in pins)
    assert "build" in artifact.inputs
    readme = (packaged / "README.md").read_text()
    assert "| kl | 0.01234 | against its own fp32 graph |" in readme
    assert "| prefill_ratio | 0.5 |" in readme
    assert "score_ratio" not in readme
    assert "a model card" not in readme
    assert "On this machine and no other: system " in readme


def test_a_readme_without_figures_has_no_table(tmp_path: Path) -> None:
    build = write_build(tmp_path / "b", {}, tasks=("generate",))
    readme = (package(build, out=tmp_path / "p").path / "README.md").read_text()
    assert "|" not in readme
    assert "./run score" not in readme
    assert './run generate "' in readme
