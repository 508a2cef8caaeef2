"""The verb `verify`: every hash of an artifact, who signed it, and how far what it holds was proved when it was made.

Knows every kind of artifact by its manifest alone and runs nothing of what it verifies.
"""

import tempfile
from pathlib import Path
from typing import Any

from slmdeploy.artifacts import Artifact, open_artifact
from slmdeploy.errors import CorruptArtifactError
from slmdeploy.packaging.sbom import lineage
from slmdeploy.packaging.signature import SIGNATURE, check_signature, read_public_key
from slmdeploy.runtime.bundle import MANIFEST


def verify(path: Path, *, key: Path | None = None) -> dict[str, Any]:
    """Verify the artifact folder, or the archive of a package, at ``path`` and return its facts.

    With ``key``, the PEM file of a public key, it has to be signed by that key. Raises InputError when nothing is there
    or the key is none, CorruptArtifactError when anything is missing, changed, hostile, or signed by nobody or another.
    """
    if path.is_file():
        from slmdeploy.packaging.unpacking import unpack

        with tempfile.TemporaryDirectory() as place:
            return _facts(unpack(path, Path(place) / "package", key=key), key) | {"path": str(path)}
    return _facts(path, key)


def _facts(path: Path, key: Path | None) -> dict[str, Any]:
    artifact = open_artifact(path)
    if artifact.kind == "package":
        _refuse_strays(artifact)
    files = artifact.manifest["files"]
    facts = {
        "path": str(artifact.path),
        "kind": artifact.kind,
        "files": len(files),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "hashes": "all equal to the manifest",
        "signature": _signature(artifact.path, key),
        "content_key": artifact.content_key,
        "made": f"{artifact.manifest['created']} by slmdeploy {artifact.manifest['slmdeploy']}",
        "inputs": {name: entry["digest"] for name, entry in lineage(artifact.inputs)},
    }
    proofs = {
        name: artifact.result[name]
        for name in ("verification", "parity", "gates", "quality", "speed", "start")
        if name in artifact.result
    }
    return facts | proofs


def _signature(folder: Path, key: Path | None) -> str:
    if key is not None:
        return f"valid, by {check_signature(folder, read_public_key(key))}"
    return "there, not checked: give --key" if (folder / SIGNATURE).is_file() else "none"


def _refuse_strays(package: Artifact) -> None:
    """A file beside those of the manifest could be imported before anything is verified."""
    known = {*package.manifest["files"], MANIFEST, SIGNATURE}
    found = (file.relative_to(package.path).as_posix() for file in package.path.rglob("*") if not file.is_dir())
    stray = sorted(set(found) - known)
    if stray:
        raise CorruptArtifactError(f"{package.path / stray[0]} is not listed in {MANIFEST}: remove it or package again")
