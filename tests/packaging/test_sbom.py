"""The bill of materials holds to the published CycloneDX schema, and says what is in the package and whence."""

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from slmdeploy.artifacts import open_artifact, writing
from slmdeploy.packaging.package import package
from slmdeploy.packaging.sbom import SBOM, _ancestor
from tests.graphs import write_tiny_graph


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sbom")
    (folder / "data").mkdir()
    (folder / "data" / "test.jsonl").write_text("{}\n")
    with writing(folder / "b", kind="build", plan={}, inputs={"data": folder / "data"}) as draft:
        write_tiny_graph(draft.path)
        (draft.path / "manifest.json").unlink()
    return package(folder / "b", out=folder / "p").path


def bill(packaged: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((packaged / SBOM).read_text())
    return value


def test_it_is_valid_by_the_published_schema(packaged: Path) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str((packaged / SBOM).read_text()) is None
    broken = bill(packaged) | {"serialNumber": "mine"}
    assert validator.validate_str(json.dumps(broken)) is not None


def test_it_lists_every_file_with_the_hash_of_the_manifest(packaged: Path) -> None:
    listed = open_artifact(packaged).manifest["files"]
    files = {one["name"]: one["hashes"][0]["content"] for one in bill(packaged)["components"] if one["type"] == "file"}
    assert files == {name: entry["sha256"] for name, entry in listed.items() if name != SBOM}


def test_it_names_the_distributions_that_were_tested_and_what_the_model_comes_from(packaged: Path) -> None:
    value, artifact = bill(packaged), open_artifact(packaged)
    purls = {one["purl"] for one in value["components"] if "purl" in one}
    assert purls == {f"pkg:pypi/{name}@{pin}" for name, pin in artifact.plan["requirements"].items()}
    ancestors = {one["name"]: one for one in value["metadata"]["component"]["pedigree"]["ancestors"]}
    assert set(ancestors) == {"build build", "input build/data"}
    assert ancestors["input build/data"]["type"] == "data"
    digests = {one["properties"][0]["value"] for one in ancestors.values()}
    assert digests == {artifact.inputs["build"]["digest"], artifact.inputs["build"]["inputs"]["data"]["digest"]}


def test_parts_of_a_mixture_are_data_too() -> None:
    entry = {"digest": "0" * 64}
    kinds = {path: _ancestor(path, entry)["type"] for path in ("build/data 1", "build/data", "build/graph/student")}
    assert kinds == {"build/data 1": "data", "build/data": "data", "build/graph/student": "machine-learning-model"}
