"""Signatures: made and checked by one key, refused for another key, another manifest, no signature or no key."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from slmdeploy.errors import CorruptArtifactError, InputError, MissingExtraError
from slmdeploy.packaging.archive import pack
from slmdeploy.packaging.signature import SIGNATURE, check_signature, read_private_key, read_public_key, sign
from slmdeploy.packaging.unpacking import unpack
from slmdeploy.verification import verify
from tests.packaging.packages import package, write_build, write_keys


def signed(folder: Path, private: Path) -> Path:
    sign(package(folder), read_private_key(private))
    return folder


def test_what_a_key_signed_its_public_key_accepts(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    folder = signed(tmp_path / "p", private)
    assert (folder / SIGNATURE).stat().st_size == 64
    assert check_signature(folder, read_public_key(public)).startswith("ed25519 sha256:")
    out = unpack(pack(folder, tmp_path / "p.tar.gz"), tmp_path / "out", key=public)
    assert (out / SIGNATURE).read_bytes() == (folder / SIGNATURE).read_bytes()


def test_another_key_another_manifest_and_no_signature_are_refused(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    _, stranger = write_keys(tmp_path / "stranger")
    folder = signed(tmp_path / "p", private)
    archive = pack(folder, tmp_path / "p.zip")
    with pytest.raises(CorruptArtifactError, match=r"not the signature of manifest\.json by this key"):
        unpack(archive, tmp_path / "out", key=stranger)
    assert not (tmp_path / "out").exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"content_key": "another"}))
    with pytest.raises(CorruptArtifactError, match="not the signature"):
        check_signature(folder, read_public_key(public))
    (folder / SIGNATURE).write_bytes(bytes(65))
    with pytest.raises(CorruptArtifactError, match="larger than the 64 bytes"):
        check_signature(folder, read_public_key(public))
    (folder / SIGNATURE).unlink()
    with pytest.raises(CorruptArtifactError, match="p is not signed"):
        check_signature(folder, read_public_key(public))


def test_verify_says_who_signed_and_refuses_what_nobody_did(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path / "keys")
    build = write_build(tmp_path / "b", {})
    assert verify(build)["signature"] == "none"
    sign(build, read_private_key(private))
    assert verify(build)["signature"] == "there, not checked: give --key"
    assert verify(build, key=public)["signature"].startswith("valid, by ed25519 sha256:")
    (build / SIGNATURE).unlink()
    with pytest.raises(CorruptArtifactError, match="is not signed"):
        verify(build, key=public)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_keys_are_made_and_signatures_checked_by_openssl_too(tmp_path: Path) -> None:
    def openssl(*arguments: str) -> str:
        command = ["openssl", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    openssl("genpkey", "-algorithm", "ed25519", "-out", "key.pem")
    openssl("pkey", "-in", "key.pem", "-pubout", "-out", "key.pub.pem")
    signed(tmp_path / "p", tmp_path / "key.pem")
    options = ["-pubin", "-inkey", "key.pub.pem", "-rawin", "-in", "p/manifest.json", "-sigfile", f"p/{SIGNATURE}"]
    assert "Verified Successfully" in openssl("pkeyutl", "-verify", *options)


def test_files_that_are_no_keys_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = write_keys(tmp_path / "keys")
    key = load_pem_private_key(private.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")))
    curve = generate_private_key(SECP256R1())
    (tmp_path / "ec.pem").write_bytes(curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    spki = PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "ec.pub.pem").write_bytes(curve.public_key().public_bytes(Encoding.PEM, spki))
    (tmp_path / "long.pem").write_bytes(bytes(1 << 17))
    with pytest.raises(InputError, match="cannot be read as a key"):
        read_private_key(tmp_path / "none.pem")
    with pytest.raises(InputError, match="larger than any key"):
        read_public_key(tmp_path / "long.pem")
    with pytest.raises(InputError, match="is no private key in PEM: make one with openssl genpkey"):
        read_private_key(public)
    with pytest.raises(InputError, match="is no public key in PEM"):
        read_public_key(private)
    with pytest.raises(InputError, match="is encrypted"):
        read_private_key(locked)
    with pytest.raises(InputError, match="another kind than ed25519"):
        read_private_key(tmp_path / "ec.pem")
    with pytest.raises(InputError, match="another kind than ed25519"):
        read_public_key(tmp_path / "ec.pub.pem")
    monkeypatch.setattr("slmdeploy.extras.find_spec", lambda module: None)
    with pytest.raises(MissingExtraError, match=r"slmdeploy\[package\]"):
        read_private_key(private)
