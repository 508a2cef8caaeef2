"""Protobuf as onnx itself writes and reads it; what is cut off is refused."""

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmdeploy.errors import CorruptArtifactError
from slmdeploy.profiling.wire import field, fields

PAIRS = st.tuples(st.integers(1, 2000), st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=300)))


@given(st.lists(PAIRS, max_size=8))
def test_what_is_written_is_read(pairs):
    message = b"".join(field(number, value) for number, value in pairs)
    found = [(number, value if isinstance(value, int) else bytes(value)) for number, value in fields(message, "f")]
    assert found == pairs


def test_a_message_of_onnx_is_read():
    message = onnx.helper.make_node("Add", ["a", "b"], ["c"]).SerializeToString()
    found = [(number, bytes(value).decode()) for number, value in fields(message, "f")]
    assert found == [(1, "a"), (1, "b"), (2, "c"), (4, "Add")]


def test_numbers_of_fixed_width_are_given_as_bytes():
    attribute = onnx.helper.make_attribute("alpha", 1.5).SerializeToString()
    assert [len(value) for number, value in fields(attribute, "f") if number == 2] == [4]


@pytest.mark.parametrize("message", [b"\x0a\x05ab", b"\x08", b"\x08" + b"\xff" * 11, b"\x0b", b"\x0d\x00", b"\x80"])
def test_what_is_cut_off_or_no_protobuf_is_refused(message):
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx is cut off or is no ONNX file"):
        list(fields(message, "model.onnx"))
