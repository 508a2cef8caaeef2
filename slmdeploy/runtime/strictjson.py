"""Reads a JSON file that may be hostile and hands out its fields checked by type, range and name.

Knows nothing of what the fields mean. Plain Python instead of pydantic, because this folder ships to the device with
numpy, onnxruntime and tokenizers alone. What is refused: a file over 16 MiB, bytes that are no UTF-8, a key given
twice, NaN and Infinity, nesting too deep for the parser, a bool where an integer is asked for, and any key that no
caller asked about. Every refusal is a CorruptArtifactError whose one sentence names the file, the key and the value.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .errors import CorruptArtifactError, ResourceError

MAX_JSON_BYTES = 16 << 20


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a regular file of at most `limit_bytes`; a symlink, device, pipe or folder in its place is refused.

    O_NONBLOCK keeps a named pipe from blocking the open before its kind can be looked at.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if path.is_symlink():
            raise CorruptArtifactError(f"{path} is a symbolic link, which an artifact may not contain.")
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise CorruptArtifactError(f"{path} is missing; make or unpack the artifact again.") from None
    except PermissionError:
        raise ResourceError(f"{path} cannot be read: check its permissions.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptArtifactError(f"{path} is not a regular file.")
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise CorruptArtifactError(f"{path} is larger than the {limit_bytes} bytes that such a file may have.")
    return data


def read_object(path: Path) -> "Fields":
    """The one JSON object that a file holds."""
    data = read_regular(path, MAX_JSON_BYTES)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(f"{path} is not valid JSON ({error or 'nested too deeply'}).") from None
    if not isinstance(value, dict):
        raise CorruptArtifactError(f"{path} must hold a JSON object, not {_shown(value)}.")
    return Fields(path, "", value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {_shown(twice)} is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """The fields of one JSON object; each getter checks and remembers the key, `finish` refuses the keys left over."""

    def __init__(self, path: Path, where: str, value: dict[str, Any]) -> None:
        self.path, self.where, self.value = path, where, value
        self._asked: set[str] = set()

    def get(self, key: str) -> Any:
        """The raw value of a key that must be there."""
        self._asked.add(key)
        if key not in self.value:
            raise CorruptArtifactError(f"{self.path}: the key {self.where}{key} is missing.")
        return self.value[key]

    def refuse(self, key: str, must: str) -> NoReturn:
        """Raise the sentence for a value that is not what it must be."""
        raise CorruptArtifactError(f"{self.path}: {self.where}{key} must be {must}, not {_shown(self.value.get(key))}.")

    def integer(self, key: str, low: int, high: int) -> int:
        """An int in [low, high]; a bool or a float is refused."""
        value = self.get(key)
        if type(value) is not int or not low <= value <= high:
            self.refuse(key, f"an integer from {low} to {high}")
        return value

    def boolean(self, key: str) -> bool:
        """A JSON true or false."""
        value = self.get(key)
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return value

    def string(self, key: str, limit: int = 4096) -> str:
        """A string of at most `limit` characters."""
        value = self.get(key)
        if not isinstance(value, str) or len(value) > limit:
            self.refuse(key, f"a string of at most {limit} characters")
        return value

    def object(self, key: str) -> "Fields":
        """A nested object, whose refusals name the whole path of keys."""
        value = self.get(key)
        if not isinstance(value, dict):
            self.refuse(key, "an object")
        return Fields(self.path, f"{self.where}{key}.", value)

    def items(self, key: str, must: str, accept: Callable[[Any], bool], low: int = 0, high: int = 1 << 16) -> list[Any]:
        """A list of `low` to `high` values for each of which `accept` is true; `must` says what they have to be."""
        value = self.get(key)
        if not isinstance(value, list) or not low <= len(value) <= high or not all(map(accept, value)):
            self.refuse(key, f"a list of {must}")
        return value

    def finish(self) -> None:
        """Refuse the keys that nobody asked for."""
        unknown = sorted(set(self.value) - self._asked)
        if unknown:
            raise CorruptArtifactError(f"{self.path}: the key {self.where}{unknown[0]} is not known to this version.")
