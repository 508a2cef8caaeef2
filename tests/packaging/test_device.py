"""A package in an environment of its own that holds numpy, onnxruntime and tokenizers and nothing besides.

The environment is made without a network and without pip: those three distributions are linked from the environment
that runs the tests. What of them is missing there (what onnxruntime and tokenizers declare and a package never uses)
must not be needed.
"""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from slmdeploy.packaging.archive import pack
from slmdeploy.packaging.edge import REQUIREMENTS
from slmdeploy.packaging.package import package
from slmdeploy.packaging.unpacking import unpack
from slmdeploy.runtime.model import load
from tests.packaging.packages import write_build

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment."""
    home = tmp_path_factory.mktemp("device") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    interpreter = home / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    site = Path(done.stdout.strip())
    for name in REQUIREMENTS:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return interpreter


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst", ".zip"])
def test_every_archive_runs_there_from_arguments_and_from_stdin(python: Path, tmp_path: Path, suffix: str) -> None:
    build = write_build(tmp_path / "b", {})
    archive = pack(package(build, out=tmp_path / "p").path, tmp_path / f"p{suffix}")
    elsewhere = unpack(archive, tmp_path / "elsewhere")
    model = load(build)

    def run(*arguments: str, stdin: str = "") -> str:
        done = subprocess.run(
            [python, "-I", elsewhere / "run", *arguments],
            input=stdin,
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    expected = model.generate("def main(", max_new_tokens=8).text
    for arguments, stdin in ((["def main("], ""), ([], "def main(")):
        reply = run("generate", *arguments, "--max-new-tokens", "8", "--json", stdin=stdin)
        assert json.loads(reply)["text"] == expected
    scores = json.loads(run("score", "--prefix", "p", "--json", stdin="one\ntwo\n"))["scores"]
    assert scores == pytest.approx(model.score("p", ["one", "two"]), abs=1e-6)
    assert "ok" in run("verify", "--json")


def test_the_environment_has_nothing_else(python: Path) -> None:
    code = "import importlib.metadata as m; print(sorted(d.name for d in m.distributions()))"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(REQUIREMENTS))
