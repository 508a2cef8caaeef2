"""sbom.cdx.json: what is in a package and where it comes from, as a CycloneDX 1.6 bill of materials.

The model with the lineage of its manifest as its pedigree, each file with its sha256, and the distributions that it was
tested with. Written as plain JSON, which the format is: base dependencies are enough to package, and tests hold it to
the published schema. Serial number and time come from the package's content, so the same build gives the same bytes.
"""

import importlib.metadata
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slmdeploy.runtime.bundle import sha256_file
from slmdeploy.version import __version__

SBOM = "sbom.cdx.json"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/schema/bom-1.6.schema.json")
_MODEL = "model"
_RUNTIME = "slmdeploy"


def write_bill(
    folder: Path, build: Mapping[str, Any], inputs: Mapping[str, Any], pins: Mapping[str, str], content_key: str
) -> None:
    """Write the bill of the package in ``folder``, made of a build with the manifest ``build``.

    ``inputs`` are what it is made of, as `artifacts.origin` tells of each; ``pins`` are distributions by name.
    """
    bill = _bill(folder, build, inputs, pins, content_key)
    (folder / SBOM).write_text(json.dumps(bill, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _bill(
    folder: Path, build: Mapping[str, Any], inputs: Mapping[str, Any], pins: Mapping[str, str], content_key: str
) -> dict[str, Any]:
    model_type = _model_type(folder)
    libraries = [_library(name, version) for name, version in sorted(pins.items())]
    files = [_file(folder, file) for file in sorted(folder.rglob("*")) if file.is_file() and file.name != SBOM]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, content_key)}",
        "version": 1,
        "metadata": {
            **({"timestamp": build["created"]} if "created" in build else {}),
            "tools": {"components": [{"type": "application", "name": "slmdeploy", "version": __version__}]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": _MODEL,
                "name": model_type,
                "version": content_key[:12],
                "pedigree": {"ancestors": [_ancestor(path, found) for path, found in lineage(inputs)]},
            },
        },
        "components": [_runtime(), *libraries, *files],
        "dependencies": [
            {"ref": _MODEL, "dependsOn": [_RUNTIME]},
            {"ref": _RUNTIME, "dependsOn": [library["bom-ref"] for library in libraries]},
        ],
    }


def lineage(inputs: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each input of a manifest, and theirs, as (path such as "build/graph/checkpoint", its entry)."""
    for name, entry in sorted(inputs.items()):
        path = f"{above}{name}"
        yield path, entry
        yield from lineage(entry.get("inputs", {}), f"{path}/")


def _ancestor(path: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(entry.get("kind", "input"))
    told = {key: entry[key] for key in ("digest", "content_key", "slmdeploy") if key in entry}
    return {
        "type": "data" if kind in ("data", "measurement") or _is_data(path) else "machine-learning-model",
        "bom-ref": f"lineage/{path}",
        "name": f"{kind} {path}",
        "version": str(entry["digest"])[:12],
        "properties": [{"name": f"slmdeploy:{key}", "value": str(value)} for key, value in told.items()],
    }


def _is_data(path: str) -> bool:
    """Whether a lineage's last name is that of data: "data", or of a mixture's part "data 1"."""
    return path.rpartition("/")[2].split(" ")[0] == "data"


def _library(name: str, version: str) -> dict[str, Any]:
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
    licence = importlib.metadata.metadata(name).json.get("license_expression")
    component = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    return component | ({"licenses": [{"expression": licence}]} if licence else {})


def _runtime() -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": _RUNTIME,
        "name": "slmdeploy",
        "version": __version__,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }


def _file(folder: Path, file: Path) -> dict[str, Any]:
    name = file.relative_to(folder).as_posix()
    hashes = [{"alg": "SHA-256", "content": sha256_file(file)}]
    return {"type": "file", "bom-ref": f"file/{name}", "name": name, "hashes": hashes}


def _model_type(folder: Path) -> str:
    """What config.json calls the model, else just that."""
    config = folder / "config.json"
    value = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return str(value.get("model_type", "model"))
