"""The verb `verify`: every hash of an artifact, and how far what it holds was proved when it was made.

Knows every kind of artifact by its manifest alone and runs nothing of what it verifies.
"""

import tempfile
from pathlib import Path
from typing import Any

from slmdeploy.artifacts import Artifact, open_artifact


def verify(path: Path) -> dict[str, Any]:
    """Verify the artifact folder, or the package archive (.tar.gz), at ``path`` and return its facts.

    Raises InputError when nothing is there, CorruptArtifactError when anything in it is missing, changed or hostile.
    """
    if path.is_file():
        from slmdeploy.packaging.archive import unpack

        with tempfile.TemporaryDirectory() as place:
            return _facts(open_artifact(unpack(path, Path(place) / "package"))) | {"path": str(path)}
    return _facts(open_artifact(path))


def _facts(artifact: Artifact) -> dict[str, Any]:
    files = artifact.manifest["files"]
    facts = {
        "path": str(artifact.path),
        "kind": artifact.kind,
        "files": len(files),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "hashes": "all equal to the manifest",
        "content_key": artifact.content_key,
        "made": f"{artifact.manifest['created']} by slmdeploy {artifact.manifest['slmdeploy']}",
        "inputs": {name: entry["digest"] for name, entry in artifact.inputs.items()},
    }
    proofs = {
        name: artifact.result[name]
        for name in ("verification", "parity", "gates", "quality", "speed")
        if name in artifact.result
    }
    return facts | proofs
