"""Records are what was put in, and anything else is refused, never guessed at."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedupfs import codec
from dedupfs.errors import StoreError
from dedupfs.model import (
    ContentKey,
    Damage,
    DamageKind,
    Digest,
    FileRecord,
    FileState,
    Ino,
    Link,
    Reference,
    ScrubPass,
    Stamp,
    Verified,
)

unsigned = st.integers(0, 2**64 - 1)
signed = st.integers(-(2**63), 2**63 - 1)
inodes = unsigned.map(Ino)
names = st.binary(min_size=1, max_size=255)
contents = st.builds(ContentKey, st.binary(min_size=16, max_size=16).map(Digest), st.integers(0, 2**16 - 1))
dates = st.integers(-(2**63) * 10**9, (2**63 - 1) * 10**9)  # ns; a filesystem's seconds have 64 bits
references = st.builds(Reference, contents, unsigned, st.booleans(), dates)
stamps = st.builds(Stamp, unsigned, signed, signed)
records = st.builds(FileRecord, stamps, st.sampled_from(FileState), contents)
links = st.builds(Link, inodes, names)

REFERENCE = codec.encode_reference(Reference(ContentKey(Digest(bytes(range(16))), 3), 12345, True, 10**18))
RECORD = codec.encode_file(FileRecord(Stamp(1, 2, 3), FileState.REFERENCE, ContentKey(Digest(bytes(16)), 1)))


@given(references)
def test_reference(reference: Reference) -> None:
    value = codec.encode_reference(reference)
    assert len(value) == 44
    assert codec.decode_reference(value) == reference


@given(references, st.integers(0, 43), st.integers(1, 255))
def test_a_changed_byte_of_a_reference_is_noticed(reference: Reference, place: int, change: int) -> None:
    value = bytearray(codec.encode_reference(reference))
    value[place] ^= change
    with pytest.raises(StoreError):
        codec.decode_reference(bytes(value))


@pytest.mark.parametrize("length", [0, 1, 40, 43, 45, 88])
def test_a_reference_of_another_length(length: int) -> None:
    with pytest.raises(StoreError):
        codec.decode_reference((REFERENCE * 2)[:length])


@pytest.mark.parametrize(("place", "value"), [(0, 0), (0, 2), (0, 255), (1, 2), (1, 0x81)])
def test_a_reference_of_another_version_or_with_unknown_flags(place: int, value: int) -> None:
    """Even when its checksum is right: a newer dedupfs may mean anything by it."""
    body = bytearray(REFERENCE[:-4])
    body[place] = value
    with pytest.raises(StoreError) as caught:
        codec.decode_reference(bytes(body) + zlib.crc32(bytes(body)).to_bytes(4, "big"))
    assert "newer" in str(caught.value)


@given(records)
def test_file(record: FileRecord) -> None:
    assert codec.decode_file(codec.encode_file(record)) == record


@pytest.mark.parametrize("value", [b"", RECORD[:-1], RECORD + b"\0", b"\0" + RECORD[1:], b"\2" + RECORD[1:]])
def test_a_file_of_another_length_or_version(value: bytes) -> None:
    with pytest.raises(StoreError):
        codec.decode_file(value)


@pytest.mark.parametrize("state", [0, 4, 255])
def test_a_file_of_an_unknown_state(state: int) -> None:
    with pytest.raises(StoreError):
        codec.decode_file(RECORD[:1] + bytes([state]) + RECORD[2:])


@given(inodes)
def test_ino(ino: Ino) -> None:
    assert codec.decode_ino(codec.encode_ino(ino)) == ino


@given(st.lists(unsigned))
def test_keys_sort_like_their_numbers(numbers: list[int]) -> None:
    encoded = [codec.encode_ino(Ino(number)) for number in numbers]
    assert sorted(encoded) == [codec.encode_ino(Ino(number)) for number in sorted(numbers)]


@given(contents, contents)
def test_contents_sort_by_digest_and_number(left: ContentKey, right: ContentKey) -> None:
    assert (codec.encode_content(left) < codec.encode_content(right)) == (left < right)


@given(links)
def test_link(link: Link) -> None:
    assert codec.decode_link(codec.encode_link(link)) == link


@given(contents)
def test_content(content: ContentKey) -> None:
    assert codec.decode_content(codec.encode_content(content)) == content


@given(signed)
def test_counter(value: int) -> None:
    assert codec.decode_counter(codec.encode_counter(value)) == value


@given(st.binary(min_size=1, max_size=300), inodes)
def test_pending(path: bytes, ino: Ino) -> None:
    assert codec.decode_pending(codec.encode_pending(path, ino)) == (ino, path)


@pytest.mark.parametrize("length", [0, 7, 9, 16])
def test_numbers_of_another_length(length: int) -> None:
    with pytest.raises(StoreError):
        codec.decode_ino(bytes(length))
    with pytest.raises(StoreError):
        codec.decode_counter(bytes(length))


@pytest.mark.parametrize("length", [0, 16, 17, 19, 32])
def test_contents_of_another_length(length: int) -> None:
    with pytest.raises(StoreError):
        codec.decode_content(bytes(length))


@pytest.mark.parametrize("length", [0, 7, 8])
def test_links_and_pending_files_without_a_name(length: int) -> None:
    with pytest.raises(StoreError):
        codec.decode_link(bytes(length))
    with pytest.raises(StoreError):
        codec.decode_pending(bytes(length))


@pytest.mark.parametrize(
    "content", [ContentKey(Digest(bytes(16)), -1), ContentKey(Digest(bytes(16)), 1 << 16)], ids=["negative", "large"]
)
def test_what_does_not_fit_is_refused(content: ContentKey) -> None:
    with pytest.raises(struct.error):
        codec.encode_content(content)


@given(content=contents, scrub=st.integers(0, 2**32 - 1), time_s=st.integers(-(2**63), 2**63 - 1))
def test_records_of_scrubs(content: ContentKey, scrub: int, time_s: int) -> None:
    verified = Verified(scrub, time_s)
    assert codec.decode_verified(codec.encode_verified(verified)) == verified
    whole = ScrubPass(scrub, time_s, 0)
    assert codec.decode_scrub_pass(codec.encode_scrub_pass(whole)) == whole
    damage = Damage(content, DamageKind.FILE, Ino(scrub), 5, time_s, 7, "its bytes … differ")
    assert codec.decode_damage(*codec.encode_damage(damage)) == damage


def test_records_of_scrubs_of_another_version() -> None:
    key, value = codec.encode_damage(Damage(ContentKey(Digest(bytes(16))), DamageKind.BLOB, Ino(1), 2, 3, 4, "bad"))
    for other in (b"\x02" + value[1:], value[:5], b""):
        with pytest.raises(StoreError):
            codec.decode_damage(key, other)
    with pytest.raises(StoreError):
        codec.decode_damage(key[:18] + b"\x09" + key[19:], value)
    for decode in (codec.decode_verified, codec.decode_scrub_pass):
        with pytest.raises(StoreError):
            decode(b"\x02")


@pytest.mark.parametrize("value", [b"", b"\x01", b"\x02\x00", b"\x01\x09", b"\x01\x01short"])
def test_what_is_known_of_a_picture_in_another_form(value: bytes) -> None:
    with pytest.raises(StoreError):
        codec.decode_image_entry(value)
