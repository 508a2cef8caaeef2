"""Protobuf's wire format, as much of it as reading and writing small ONNX files takes; no schema and no onnx package.

The package onnx belongs to the extra `build`; what looks at a machine or a build runs on devices without it. Field
numbers are those of onnx.proto3 and stand beside the code that uses them (graph_facts.py, microbench.py). Format:
protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator

from slmdeploy.errors import CorruptArtifactError

Value = int | memoryview
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10


def field(number: int, value: int | str | bytes) -> bytes:
    """One field: a non-negative int as a varint, anything else with its length in front (text as UTF-8).

    >>> field(1, 300)
    b'\\x08\\xac\\x02'
    """
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    body = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | _BYTES) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def fields(message: bytes | memoryview, name: str) -> Iterator[tuple[int, Value]]:
    """Number and value of each field in its order; ``name`` is the file, for the error.

    An int is a varint (unsigned, 64 bits); everything else is the field's bytes, not copied. Raises
    CorruptArtifactError where the message is cut off or is no protobuf.
    """
    view, at = memoryview(message), 0
    while at < len(view):
        tag, at = _read_varint(view, at, name)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _read_varint(view, at, name)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _read_varint(view, at, name)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise _broken(name)
        if at + size > len(view):
            raise _broken(name)
        yield number, view[at : at + size]
        at += size


def _read_varint(view: memoryview, at: int, name: str) -> tuple[int, int]:
    value = 0
    for shift, byte in enumerate(view[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at + shift + 1
    raise _broken(name)


def _broken(name: str) -> CorruptArtifactError:
    return CorruptArtifactError(f"{name} is cut off or is no ONNX file: make or unpack the artifact again")
