"""What stands in every package: the build's files, slmdeploy/runtime as it is, a `run` script and pinned requirements.

A device runs and verifies with the same code that wrote the manifest. Files for other runtimes (genai_config.json and
standard.onnx, where the build has them) go along: C++, C#, Java and mobile read those. Knows nothing of graphs or
weights, nor of what a server adds.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slmdeploy import runtime
from slmdeploy.artifacts import Artifact
from slmdeploy.progress import Progress
from slmdeploy.runtime.bundle import RUNTIME, RuntimeConfig
from slmdeploy.runtime.encoder_config import EncoderConfig

REQUIREMENTS = ("numpy", "onnxruntime", "tokenizers")
"""What every package needs; one of the engine openvino needs that too."""
PINS = "requirements.txt"
_OURS = ("run", "README.md", PINS, "requirements.lock", "runtime", "server", "sbom.cdx.json")
"""Names at the top of a package that no file of a build may take."""

RUN_SCRIPT = '''#!/usr/bin/env python3
"""Runs the model in this folder; `./run --help` says how. Needs the packages in requirements.txt and nothing else."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# The folder stays as the manifest lists it, and may be read-only.
sys.dont_write_bytecode = True
sys.path.insert(0, str(FOLDER))

try:
    from runtime.__main__ import main
except ModuleNotFoundError as error:
    sys.stderr.write(f"run: {error.name} is not installed: python3 -m pip install -r {FOLDER / 'requirements.txt'}\\n")
    sys.exit(2)

sys.exit(main(folder=FOLDER, program="run"))
'''


def requirements(config: RuntimeConfig | EncoderConfig) -> tuple[str, ...]:
    """The distributions that a package of this build needs on a device."""
    return tuple(dict.fromkeys([*REQUIREMENTS, config.engine]))


def pins(config: RuntimeConfig | EncoderConfig) -> dict[str, str]:
    """Those distributions with the versions that are installed here, which are those that were tested."""
    return {name: version(name) for name in requirements(config)}


def write(
    folder: Path, build: Path, made: Artifact, session: Mapping[str, Any], pins: Mapping[str, str], progress: Progress
) -> None:
    """Write the files of ``build``, the runtime, `run` and requirements.txt into ``folder``."""
    files = list(_files(build, made))
    progress.start("package", len(files), "files")
    for source, name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        progress.advance(note=name)
    progress.finish()
    if session:
        _apply(session, folder / RUNTIME)
    write_text(folder / "run", RUN_SCRIPT, mode=0o755)
    write_text(folder / PINS, pin_lines(pins))


def pin_lines(pins: Mapping[str, str]) -> str:
    """The text of a requirements file, one pin a line."""
    return "".join(f"{name}=={pin}\n" for name, pin in pins.items())


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a text file with one of the two modes that a package has."""
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def _files(build: Path, made: Artifact) -> Iterator[tuple[Path, str]]:
    """Each file of the package that is copied and its name there: the build's, then the runtime's."""
    for name in made.manifest["files"]:
        if name.split("/")[0] not in _OURS:
            yield build / name, name
    for source in sorted(Path(runtime.__file__).parent.glob("*.py")):
        yield source, f"runtime/{source.name}"


def _apply(session: Mapping[str, Any], file: Path) -> None:
    """Put session options into a runtime.json."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["session"] |= {name: session[name] for name in ("threads", "spinning") if name in session}
    if "prefill_chunk" in session:
        settings["prefill"] = {"own_graph": False} | settings.get("prefill", {}) | {"chunk": session["prefill_chunk"]}
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
