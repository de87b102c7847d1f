"""The wire format."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netmodules import frame

FIELDS = st.dictionaries(st.text(), st.binary())


@given(FIELDS)
def test_what_is_encoded_is_decoded(fields: dict[str, bytes]) -> None:
    raw = frame.encode(fields)
    assert frame.payload_length(raw[: frame.HEADER]) == len(raw) - frame.HEADER
    assert frame.decode(raw[frame.HEADER :]) == fields


@given(st.binary())
def test_any_bytes_decode_or_are_refused(payload: bytes) -> None:
    with contextlib.suppress(ValueError):
        frame.decode(payload)


@pytest.mark.parametrize(
    "header", [b"", b"MRG1", b"MRG2\0\0\0\0", b"MRG1" + (frame.MAX_PAYLOAD + 1).to_bytes(4, "big")]
)
def test_what_is_no_header_is_refused(header: bytes) -> None:
    with pytest.raises(ValueError, match="not a moorage frame"):
        frame.payload_length(header)
