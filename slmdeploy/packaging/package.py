"""The verb `package`: a build becomes a folder that runs where it lands, and says where it comes from.

Puts together what the files of this room write: the build and its runtime (edge.py), figures of a fresh start
(trial.py) and under load (figures.py), what a server needs (server.py), hashes of requirements (lock.py), a bill of
materials (sbom.py), a README (readme.py) and a signature (signature.py). Refuses a build that did not pass its gate,
and a package over its budget. Time and machine of the manifest are the build's, so the same build gives the same bytes.
"""

from pathlib import Path

from slmdeploy.artifacts import Artifact, content_key, open_artifact, origin, writing
from slmdeploy.errors import CorruptArtifactError, GateError, InputError
from slmdeploy.packaging import edge, server
from slmdeploy.packaging.figures import peak_bytes, rows_of, session_options, to_json
from slmdeploy.packaging.lock import LOCK, lock_requirements
from slmdeploy.packaging.readme import readme
from slmdeploy.packaging.sbom import write_bill
from slmdeploy.packaging.signature import read_private_key, sign
from slmdeploy.packaging.trial import measure_start
from slmdeploy.progress import SILENT, Progress
from slmdeploy.runtime.bundle import MANIFEST, RuntimeConfig, read_manifest, read_runtime, require_listed
from slmdeploy.runtime.encoder_config import EncoderConfig, is_encoder, read_encoder
from slmdeploy.runtime.text import TOKENIZER

KINDS = ("edge", "server")
_STAMP = {"slmdeploy": str, "created": str, "machine": dict}
"""What a build's manifest says that its package takes over."""


def package(
    build: Path,
    *,
    out: Path,
    kind: str = "edge",
    measurement: Path | None = None,
    trial: bool = False,
    lock: bool = False,
    max_bytes: int | None = None,
    key: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Write the package of `build` to the folder `out`; `kind` is "edge" or "server".

    `measurement` is one that has figures of the build: they go into manifest and README, and it runs with the session
    options that a search found there. `trial` starts it three times as a device would and records seconds and memory; a
    server is always tried, because its memory limits come of it. `lock` asks pip for the hash of every
    requirement. `max_bytes` is the most that all files together may have. `key` is a PEM file to sign with. Raises
    InputError for another kind, an input that is no build, or a package over its budget, GateError for a build outside
    its gate or a package that does not start, MissingExtraError, OutputExistsError, ResourceError and
    CorruptArtifactError.
    """
    if kind not in KINDS:
        raise InputError(f"--kind {kind} is not a kind of package: use {' or '.join(KINDS)}")
    made = open_artifact(build, "build")
    config = _packable(build, made)
    signer = read_private_key(key) if key else None
    pins = edge.pins(config)
    serving = server.pins(config) if kind == "server" else {}
    rows = rows_of(measurement, build) if measurement else ()
    chosen = session_options(rows)
    extras = {"session": chosen, "trial": trial, "lock": lock, "max_bytes": max_bytes}
    plan = {"kind": kind, "requirements": pins | serving} | {name: value for name, value in extras.items() if value}
    inputs = {"build": build} | ({"measurement": measurement} if measurement else {})
    own_key = content_key("package", plan, inputs)
    with writing(out, kind="package", plan=plan, inputs=inputs, force=force, made=made.manifest) as draft:
        edge.write(draft.path, build, made, chosen, pins, progress or SILENT)
        if lock:
            lock_requirements(pins, draft.path / LOCK)
        config = _config(draft.path)
        start = measure_start(draft.path, config) if trial or serving else None
        draft.result |= {"tasks": list(config.tasks), "precision": config.precision, "requirements": pins}
        if rows:
            draft.result["measured"] = to_json(rows)
        if start:
            draft.result["start"] = start.to_dict()
        if start and serving:
            peak = max(start.peak_bytes, peak_bytes(rows))
            draft.result["server"] = server.write(draft.path, config, serving, peak, own_key, lock=lock)
        text = readme(config, made.manifest, pins, start=start, rows=rows, locked=lock, server=bool(serving))
        edge.write_text(draft.path / "README.md", text)
        origins = {name: origin(path) for name, path in inputs.items()}
        write_bill(draft.path, made.manifest, origins, pins | serving, own_key)
        _hold_budget(draft.path, max_bytes)
    if signer:
        sign(out, signer)
    return open_artifact(out, "package")


def _packable(build: Path, made: Artifact) -> RuntimeConfig | EncoderConfig:
    """The runtime.json of a build that may be shipped."""
    if made.result.get("passed") is False:
        failed = ", ".join(name for name, gate in made.result.get("gates", {}).items() if not gate["passed"])
        raise GateError(f"{build} did not pass its gate ({failed}), so it is not shipped: choose another profile")
    wrong = next((key for key, kind in _STAMP.items() if not isinstance(made.manifest.get(key), kind)), None)
    if wrong is not None:
        raise CorruptArtifactError(f"{build / MANIFEST} does not say {wrong!r}, as every build does: build it again")
    config = _config(build)
    if config.numerics_only:
        raise InputError(f"{build} is a graph for a compiler, which no package runs: package another build")
    require_listed(build, read_manifest(build), [TOKENIZER])
    return config


def _config(folder: Path) -> RuntimeConfig | EncoderConfig:
    return read_encoder(folder) if is_encoder(folder) else read_runtime(folder)


def _hold_budget(folder: Path, max_bytes: int | None) -> None:
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    total = sum(sizes.values())
    if max_bytes is None or total <= max_bytes:
        return
    largest = max(sizes, key=lambda file: sizes[file])
    raise InputError(
        f"the package has {total} bytes, {total - max_bytes} over its budget of {max_bytes} ({largest.name} alone has "
        f"{sizes[largest]}): choose a smaller build or raise the budget"
    )
