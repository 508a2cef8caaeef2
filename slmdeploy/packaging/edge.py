"""The verb `package`: a build becomes a folder that runs with numpy, onnxruntime and tokenizers alone.

Copies the build's files but those for other runtimes, adds slmdeploy/runtime as it is (the device runs and verifies
with the same code), a `run` script, pinned requirements and a README with the figures that the build's manifest holds.
Refuses a build that did not pass its gate: nothing ships that is slower or worse than its profile allows. Knows nothing
of graphs or weights.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slmdeploy import runtime
from slmdeploy.artifacts import Artifact, open_artifact, writing
from slmdeploy.errors import GateError, InputError
from slmdeploy.progress import SILENT, Progress
from slmdeploy.runtime.bundle import FOR_OTHERS, RUNTIME, RuntimeConfig, read_manifest, read_runtime, require_listed
from slmdeploy.runtime.encoder_config import EncoderConfig, is_encoder, read_encoder
from slmdeploy.runtime.text import TOKENIZER
from slmdeploy.selection import read_rows

REQUIREMENTS = ("numpy", "onnxruntime", "tokenizers")
"""What every package needs; one of the engine openvino needs that too."""
_OURS = ("run", "README.md", "requirements.txt", "runtime")

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


def package(
    build: Path,
    *,
    out: Path,
    kind: str = "edge",
    session: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Write the package of `build` to the folder `out`; `kind` is "edge", the one that there is.

    `session` has options of a measurement's row (`threads`, `spinning`, `prefill_chunk`) that the package runs with in
    place of the build's own; None leaves one as it is. Raises InputError for another kind or an input that is no build,
    GateError for a build outside its gate, OutputExistsError, ResourceError and CorruptArtifactError.
    """
    if kind != "edge":
        raise InputError(f"--kind {kind} is not a kind of package: use edge")
    made = open_artifact(build, "build")
    _require_passed(build, made.result)
    config = read_encoder(build) if is_encoder(build) else read_runtime(build)
    if isinstance(config, RuntimeConfig) and config.numerics_only:
        raise InputError(f"{build} is a graph for a compiler, which no package runs: package another build")
    require_listed(build, read_manifest(build), [TOKENIZER])
    pins = {name: version(name) for name in requirements(config)}
    chosen = {name: value for name, value in (session or {}).items() if value is not None}
    plan = {"kind": kind, "requirements": pins} | ({"session": chosen} if chosen else {})
    with writing(out, kind="package", plan=plan, inputs={"build": build}, force=force) as draft:
        files = list(_files(build, made))
        bar = progress or SILENT
        bar.start("package", len(files), "files")
        for source, name in files:
            target = draft.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            bar.advance(note=name)
        bar.finish()
        if chosen:
            _apply(chosen, draft.path / RUNTIME)
        _write(draft.path / "run", RUN_SCRIPT, mode=0o755)
        _write(draft.path / "requirements.txt", "".join(f"{name}=={pin}\n" for name, pin in pins.items()))
        _write(draft.path / "README.md", readme(config, made.manifest, pins))
        draft.result |= {"tasks": list(config.tasks), "precision": config.precision, "requirements": pins}
    return open_artifact(out, "package")


def _apply(session: Mapping[str, Any], file: Path) -> None:
    """Put session options into a runtime.json."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["session"] |= {name: session[name] for name in ("threads", "spinning") if name in session}
    if "prefill_chunk" in session:
        settings["prefill"] = {"own_graph": False} | settings.get("prefill", {}) | {"chunk": session["prefill_chunk"]}
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def searched(measurement: Path, build: Path) -> dict[str, Any]:
    """The session options that `profile --search` found for a build, of the row with its content key.

    Raises InputError where the measurement has none.
    """
    key = open_artifact(build, "build").content_key
    for row in read_rows(measurement):
        if row.content_key == key and row.searched is not None:
            return dict(row.searched)
    raise InputError(f"{measurement} has no session options found for {build}: measure it with profile --search")


def requirements(config: RuntimeConfig | EncoderConfig) -> tuple[str, ...]:
    """The distributions that a package of this build needs on a device."""
    return tuple(dict.fromkeys([*REQUIREMENTS, config.engine]))


def _require_passed(build: Path, result: dict[str, Any]) -> None:
    if result.get("passed") is not False:
        return
    failed = ", ".join(name for name, gate in result.get("gates", {}).items() if not gate["passed"])
    raise GateError(f"{build} did not pass its gate ({failed}), so it is not shipped: choose another profile")


def _files(build: Path, made: Artifact) -> Iterator[tuple[Path, str]]:
    """Each file of the package that is copied and its name there: the build's, then the runtime's."""
    for name in made.manifest["files"]:
        if name.split("/")[0] not in (*_OURS, *FOR_OTHERS):
            yield build / name, name
    for source in sorted(Path(runtime.__file__).parent.glob("*.py")):
        yield source, f"runtime/{source.name}"


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def readme(config: RuntimeConfig | EncoderConfig, manifest: dict[str, Any], pins: dict[str, str]) -> str:
    """README.md of a package: what it is, how to run it, and what was measured of its build, with where and how."""
    kind = "An encoder" if isinstance(config, EncoderConfig) else f"A decoder of {config.layers} layers"
    lines = [
        "# A language model, ready to run",
        "",
        f"{kind} with {config.vocab_size} tokens and a context of {config.max_length}, "
        f"in {config.precision}, for {' and '.join(config.tasks)}. Packaged by slmdeploy {manifest['slmdeploy']}.",
        "",
        "```",
        "python3 -m pip install -r requirements.txt",
    ]
    if "generate" in config.tasks:
        lines.append('./run generate "Once upon a time"')
    if "score" in config.tasks:
        lines.append('./run score --prefix "what all items share" "item one" "item two"')
    lines += [f'./run {task} "a text" "another text"' for task in ("embed", "classify") if task in config.tasks]
    lines += [
        "./run verify",
        "```",
        "",
        f"Tested with {', '.join(f'{name} {pin}' for name, pin in pins.items())}.",
        "`./run VERB --help` lists the options; with `--json` it prints one JSON object.",
        "`manifest.json` has the size and sha256 of every file; `runtime/` is the code that runs it (Apache-2.0).",
        "",
    ]
    return "\n".join(lines + _measured(manifest))


def _measured(manifest: dict[str, Any]) -> list[str]:
    """A table of the figures in the build's result, none if it has none."""
    result, rows = manifest["result"], []
    meanings = {"quality": "against its own fp32 graph", "speed": "time over the fp32 graph's, below 1 is faster"}
    for group, meaning in meanings.items():
        for name, value in (result.get(group) or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                rows.append(f"| {name} | {value:.4g} | {meaning} |")
    if not rows:
        return []
    where = ", ".join(f"{name} {value}" for name, value in manifest["machine"].items())
    head = ["## Measured when it was built", "", f"On this machine and no other: {where}.", ""]
    return [*head, "| figure | value | |", "|---|---|---|", *rows, ""]
