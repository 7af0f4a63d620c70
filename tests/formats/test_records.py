"""The bytes of version 1, as they were first released: whoever changes them makes a new version, and reads this one.

docs/format.md has the tables; the constants here were put down once and are not to be made anew from the code.
"""

import pytest

from dedupfs import codec
from dedupfs.errors import StoreError
from dedupfs.model import ContentKey, Digest, FileRecord, FileState, Ino, Link, Reference, Stamp

DIGEST = Digest(bytes.fromhex("000102030405060708090a0b0c0d0e0f"))

REFERENCES = {
    # version, flags, collision, size, digest, mtime in seconds and nanoseconds, CRC-32
    "01 00 0000 0000000000003039 000102030405060708090a0b0c0d0e0f 0000000000000000 00000000 be2b320e": Reference(
        ContentKey(DIGEST), 12345
    ),
    "01 01 0102 0102030405060708 000102030405060708090a0b0c0d0e0f 000000003b9aca00 00000007 ccfba7f2": Reference(
        ContentKey(DIGEST, 0x0102), 0x0102030405060708, materialising=True, mtime_ns=10**18 + 7
    ),
    "01 01 0001 0000000000001000 000102030405060708090a0b0c0d0e0f ffffffffffffffff 3b9ac9ff f21a037e": Reference(
        ContentKey(DIGEST, 1), 4096, materialising=True, mtime_ns=-1
    ),
}
FILES = {
    # version, state, size, mtime, ctime, digest, collision
    "01 01 0000000000003039 0de0b6b3a7640007 fffffffffffffffb 000102030405060708090a0b0c0d0e0f 0102": FileState.PLAIN,
    "01 02 0000000000003039 0de0b6b3a7640007 fffffffffffffffb 000102030405060708090a0b0c0d0e0f 0102": (
        FileState.REFERENCE
    ),
    "01 03 0000000000003039 0de0b6b3a7640007 fffffffffffffffb 000102030405060708090a0b0c0d0e0f 0102": FileState.SHARED,
}
LINK = bytes.fromhex("0000000000000002 636166e9")
CONTENT = bytes.fromhex("000102030405060708090a0b0c0d0e0f 0102")
PENDING = bytes.fromhex("0000000000000007 612f62")


@pytest.mark.parametrize("value", REFERENCES)
def test_reference(value: str) -> None:
    assert codec.encode_reference(REFERENCES[value]) == bytes.fromhex(value)
    assert codec.decode_reference(bytes.fromhex(value)) == REFERENCES[value]


@pytest.mark.parametrize("value", FILES)
def test_file(value: str) -> None:
    record = FileRecord(Stamp(12345, 10**18 + 7, -5), FILES[value], ContentKey(DIGEST, 0x0102))
    assert codec.encode_file(record) == bytes.fromhex(value)
    assert codec.decode_file(bytes.fromhex(value)) == record


def test_keys_and_small_values() -> None:
    assert codec.encode_ino(Ino(0x0102030405060708)) == bytes.fromhex("0102030405060708")
    assert codec.encode_link(Link(Ino(2), b"caf\xe9")) == LINK
    assert codec.encode_content(ContentKey(DIGEST, 0x0102)) == CONTENT
    assert codec.encode_counter(-2) == bytes.fromhex("fffffffffffffffe")
    assert codec.encode_pending(b"a/b", Ino(7)) == PENDING
    assert codec.decode_ino(bytes.fromhex("0102030405060708")) == 0x0102030405060708
    assert codec.decode_link(LINK) == Link(Ino(2), b"caf\xe9")
    assert codec.decode_content(CONTENT) == ContentKey(DIGEST, 0x0102)
    assert codec.decode_counter(bytes.fromhex("fffffffffffffffe")) == -2
    assert codec.decode_pending(PENDING) == (7, b"a/b")


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_is_not_guessed_at(version: int) -> None:
    for value in REFERENCES:
        with pytest.raises(StoreError):
            codec.decode_reference(bytes([version]) + bytes.fromhex(value)[1:])
    for value in FILES:
        with pytest.raises(StoreError):
            codec.decode_file(bytes([version]) + bytes.fromhex(value)[1:])
