"""Signs an artifact and checks who signed it: ed25519 over the bytes of manifest.json, which covers every other file.

The signature is the 64 raw bytes of RFC 8032 in manifest.json.sig, so that openssl checks it too. Keys are PEM files
(PKCS #8 and SubjectPublicKeyInfo), made with openssl; the arithmetic is the package cryptography's, of the extra
`package`. Knows nothing of what is signed. Hashes protect against damage; this protects against who is not the signer.
"""

import os
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from slmdeploy.errors import CorruptArtifactError, InputError
from slmdeploy.extras import require
from slmdeploy.runtime.bundle import MANIFEST
from slmdeploy.runtime.strictjson import MAX_JSON_BYTES, read_regular

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "manifest.json.sig"
_SIGNATURE_BYTES = 64
_MAX_KEY_BYTES = 1 << 16
_MAKE = "make one with openssl genpkey -algorithm ed25519 -out key.pem"
_PUBLISH = "make one with openssl pkey -in key.pem -pubout -out key.pub.pem"


def read_private_key(file: Path) -> "Ed25519PrivateKey":
    """The key that signs. Raises InputError for a file that is missing, encrypted or holds no ed25519 private key."""
    require("package", "cryptography")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read_key(file), password=None)
    except TypeError as error:
        raise InputError(f"{file} is encrypted: decrypt it for signing (openssl pkey -in {file} -out PLAIN)") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{file} is no private key in PEM: {_MAKE}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{file} holds a key of another kind than ed25519: {_MAKE}")
    return key


def read_public_key(file: Path) -> "Ed25519PublicKey":
    """The key that signatures are checked with. Raises InputError for a file that holds no ed25519 public key."""
    require("package", "cryptography")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read_key(file))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{file} is no public key in PEM: {_PUBLISH}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{file} holds a key of another kind than ed25519: {_PUBLISH}")
    return key


def _read_key(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise InputError(f"{file} cannot be read as a key: {error.strerror}") from error
    if len(data) > _MAX_KEY_BYTES:
        raise InputError(f"{file} is larger than any key: give a PEM file")
    return data


def sign(folder: Path, key: "Ed25519PrivateKey") -> Path:
    """Write the signature of the manifest of ``folder`` beside it, in one rename; returns its path."""
    signature = key.sign(_manifest(folder))
    target = folder / SIGNATURE
    temporary = folder / f".{SIGNATURE}.{os.getpid()}.tmp"
    temporary.write_bytes(signature)
    temporary.replace(target)
    return target


def check_signature(folder: Path, key: "Ed25519PublicKey") -> str:
    """The fingerprint of ``key``, having checked that it signed ``folder``.

    Raises CorruptArtifactError where there is no signature, or it is another's or of another manifest.
    """
    from cryptography.exceptions import InvalidSignature

    if not (folder / SIGNATURE).is_file():
        raise CorruptArtifactError(f"{folder} is not signed: ask its maker for a package with {SIGNATURE}")
    signature = read_regular(folder / SIGNATURE, _SIGNATURE_BYTES)
    try:
        key.verify(signature, _manifest(folder))
    except InvalidSignature as error:
        raise CorruptArtifactError(
            f"{folder / SIGNATURE} is not the signature of {MANIFEST} by this key ({fingerprint(key)}): trust neither"
        ) from error
    return fingerprint(key)


def fingerprint(key: "Ed25519PublicKey") -> str:
    """``ed25519 sha256:…`` over the 32 raw bytes of a public key: short enough to compare by eye."""
    return f"ed25519 sha256:{sha256(key.public_bytes_raw()).hexdigest()}"


def _manifest(folder: Path) -> bytes:
    return read_regular(folder / MANIFEST, MAX_JSON_BYTES)
