"""Small folders for the tests of this room: a package of plain files, a build that runs, and a pair of keys."""

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from slmdeploy.artifacts import writing
from tests.graphs import write_manifest, write_tiny_graph
from tests.runtime.encoder_graphs import write_encoder_graph


def package(folder: Path) -> Path:
    """A package whose files mean nothing."""
    (folder / "runtime").mkdir(parents=True)
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o775)
    (folder / "runtime" / "model.py").write_text("pass\n")
    (folder / "model.onnx").write_bytes(bytes(1000))
    write_manifest(folder, kind="package")
    return folder


def write_build(out: Path, result: dict[str, Any], **options: Any) -> Path:
    """A build of a tiny decoder with this result in its manifest."""
    with writing(out, kind="build", plan={}, inputs={}) as draft:
        write_tiny_graph(draft.path, **options)
        (draft.path / "manifest.json").unlink()
        (draft.path / "README.md").write_text("a model card")
        for name in ("standard.onnx", "genai_config.json"):
            (draft.path / name).write_text("for other runtimes")
        draft.result |= result
    return out


def write_encoder_build(out: Path, role: str) -> Path:
    """A build of a tiny encoder in this role."""
    source = write_encoder_graph(out.parent / f"{out.name}-graph", role)
    with writing(out, kind="build", plan={}, inputs={}) as draft:
        for file in source.iterdir():
            if file.name != "manifest.json":
                (draft.path / file.name).write_bytes(file.read_bytes())
    return out


def write_keys(folder: Path) -> tuple[Path, Path]:
    """An ed25519 private key and its public key, as PEM files."""
    folder.mkdir(parents=True, exist_ok=True)
    key, private, public = Ed25519PrivateKey.generate(), folder / "key.pem", folder / "key.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public
