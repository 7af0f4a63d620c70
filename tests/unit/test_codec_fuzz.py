"""Whatever bytes lie where a record should be: they are read as what writes the same bytes again, or refused."""

import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dedupfs import codec
from dedupfs.errors import StoreError
from dedupfs.model import Ino, Link
from tests.support.fuzz import examples

DECODERS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = {
    "reference": (codec.decode_reference, codec.encode_reference),
    "ino": (codec.decode_ino, codec.encode_ino),
    "file": (codec.decode_file, codec.encode_file),
    "link": (codec.decode_link, codec.encode_link),
    "content": (codec.decode_content, codec.encode_content),
    "counter": (codec.decode_counter, codec.encode_counter),
    "pending": (codec.decode_pending, lambda decoded: codec.encode_pending(decoded[1], decoded[0])),
    "verified": (codec.decode_verified, codec.encode_verified),
    "scrub_pass": (codec.decode_scrub_pass, codec.encode_scrub_pass),
    "damage": (lambda both: codec.decode_damage(both[:27], both[27:]), lambda it: b"".join(codec.encode_damage(it))),
    "image": (codec.decode_image, codec.encode_image),
    "image_entry": (codec.decode_image_entry, codec.encode_image_entry),
    "image_state": (codec.decode_image_state, lambda state: bytes([1, state])),
    "thumbnails": (codec.decode_thumbnails, codec.encode_thumbnails),
    "description": (codec.decode_description, lambda both: codec.encode_description(*both)),
    "sequence": (codec.decode_sequence, codec.encode_sequence),
    "alike": (codec.decode_alike, codec.encode_alike),
}
# Of these several bytes mean the same: what is compressed, words that were no UTF-8, what a state leaves out.
LOOSE = {"damage", "image_entry", "image_state", "thumbnails", "description"}


def test_every_decoder_is_here() -> None:
    assert {f"decode_{name}" for name in DECODERS} == {name for name in vars(codec) if name.startswith("decode_")}


def round_trip(name: str, value: bytes) -> None:
    decode, encode = DECODERS[name]
    try:
        decoded = decode(value)
    except StoreError:
        return
    written = encode(decoded)
    assert decode(written) == decoded
    assert written == value or name in LOOSE


@pytest.mark.parametrize("name", DECODERS)
@examples()
@given(value=st.binary(max_size=80))
def test_any_bytes(name: str, value: bytes) -> None:
    round_trip(name, value)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("reference", 44), ("file", 44), ("content", 18), ("ino", 8), ("counter", 8)),
        *(("verified", 13), ("scrub_pass", 21), ("alike", 21), ("sequence", 8)),
    ],
)
@examples()
@given(data=st.data())
def test_any_bytes_of_the_right_length(name: str, size: int, data: st.DataObject) -> None:
    round_trip(name, data.draw(st.binary(min_size=size, max_size=size)))


@examples()
@given(body=st.binary(min_size=40, max_size=40), version=st.sampled_from([1, 1, 1, 0, 2]), flags=st.integers(0, 3))
@example(body=bytes(36) + struct.pack(">I", 10**9), version=1, flags=1)
@example(body=bytes(36) + b"\xff" * 4, version=1, flags=0)
def test_any_reference_with_a_right_checksum(body: bytes, version: int, flags: int) -> None:
    """A checksum proves nothing: whoever can write the attribute can compute it."""
    body = bytes([version, flags]) + body[2:]
    round_trip("reference", body + struct.pack(">I", zlib.crc32(body)))


@examples()
@given(body=st.binary(min_size=42, max_size=42), version=st.sampled_from([1, 1, 1, 0, 2]), state=st.integers(0, 5))
def test_any_file_of_nearly_known_state(body: bytes, version: int, state: int) -> None:
    round_trip("file", bytes([version, state]) + body)


@examples()
@given(st.integers(0, 2**64 - 1), st.binary(min_size=1, max_size=300))
def test_names_of_any_bytes(number: int, name: bytes) -> None:
    link = Link(Ino(number), name)
    assert codec.decode_link(codec.encode_link(link)) == link
    round_trip("pending", codec.encode_pending(name, Ino(number)))
