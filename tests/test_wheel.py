"""The wheel, built offline and installed into an environment of its own, brings targets/ and profiles/ and finds them.

The new environment has a pip-less venv, so nothing of this repository is on its path; the base dependencies come from
the environment that runs the tests, by a .pth line, because there is no network to install them from.
"""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SHIPPED = ("targets", "profiles")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command away from the repository and without its import path; return stdout, fail with stderr."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the working tree, built by the hatchling that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, REPOSITORY, cwd=folder)
    (built,) = folder.glob("slmdeploy-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment that holds the wheel and sees the base dependencies."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    python = home / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-cache-dir")
    run(sys.executable, "-m", "pip", "--python", python, *install, wheel, cwd=home.parent)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=home).strip())
    # A path in a .pth file is only appended: .pth files inside it, such as an editable slmdeploy's, stay unread.
    (site / "base_dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return home / "bin"


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {"slmdeploy"}
    assert "slmdeploy/py.typed" in names
    assert "slmdeploy/runtime/bundle.py" in names
    for kind in SHIPPED:
        inside = {name.rsplit("/", 1)[1] for name in names if name.startswith(f"slmdeploy/_data/{kind}/")}
        assert inside == {file.name for file in (REPOSITORY / kind).iterdir()}
        assert inside, f"{kind}/ is empty"


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    files = [file.relative_to(REPOSITORY) for file in (REPOSITORY / "slmdeploy").rglob("*") if file.is_file()]
    tree = {file.as_posix() for file in files if "__pycache__" not in file.parts}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and "/_data/" not in name}
    assert names == tree
    assert "slmdeploy/reporting/page.css" in names


def test_the_installed_package_is_the_one_that_runs(installed: Path) -> None:
    program = "import slmdeploy, slmdeploy.version as v; print(slmdeploy.__file__); print(v.__version__)"
    origin, version = run(installed / "python", "-c", program, cwd=installed).split()
    assert Path(origin).is_relative_to(installed.parent)
    assert f'__version__ = "{version}"' in (REPOSITORY / "slmdeploy" / "version.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", SHIPPED)
def test_the_installed_command_lists_the_shipped_files(installed: Path, verb: str) -> None:
    last = run(installed / "slmdeploy", verb, "--json", cwd=installed).splitlines()[-1]
    assert set(json.loads(last)) == {file.stem for file in (REPOSITORY / verb).glob("*.toml")}
