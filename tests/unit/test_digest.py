"""Digests are those of XXH3-128, of whatever is behind a descriptor, and comparing reads everything."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dedupfs.digest import CHUNK_BYTES, StreamDigest, hash_descriptor, same_bytes

SIZES = [0, 1, 239, 240, 241, 4096, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7]


def reference_digest(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


class Stop(Exception):
    pass


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def fill(fd: int, data: bytes) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


@pytest.mark.parametrize("size_bytes", SIZES)
def test_hash_descriptor(file: int, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    fill(file, data)
    os.lseek(file, 5, os.SEEK_SET)
    assert hash_descriptor(file) == reference_digest(data)
    assert len(hash_descriptor(file)) == 16
    assert os.lseek(file, 0, os.SEEK_CUR) == 5  # left alone


def test_a_known_value(file: int) -> None:
    """The canonical form, as xxhsum -H2 prints it: a change of library must not change the format."""
    assert hash_descriptor(file).hex() == "99aa06d3014798d86001c324468d497f"
    fill(file, b"abc")
    assert hash_descriptor(file).hex() == "06b05ab6733a618578af5f94892f3950"


@pytest.mark.parametrize("size_bytes", [0, CHUNK_BYTES, 3 * CHUNK_BYTES])
def test_the_checkpoint_is_asked_for_every_chunk(file: int, size_bytes: int) -> None:
    fill(file, bytes(size_bytes))
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    hash_descriptor(file, count)
    assert calls == size_bytes // CHUNK_BYTES + 1


def test_giving_up(file: int, other: int) -> None:
    for fd in (file, other):
        fill(fd, bytes(3 * CHUNK_BYTES))

    def stop_at(number: int) -> None:
        calls = 0

        def stop() -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                raise Stop

        with pytest.raises(Stop):
            hash_descriptor(file, stop)
        calls = 0
        with pytest.raises(Stop):
            same_bytes(file, other, stop)

    for number in (1, 3):
        stop_at(number)


@pytest.mark.parametrize("size_bytes", SIZES)
def test_same_bytes(file: int, other: int, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    fill(file, data)
    fill(other, data)
    assert same_bytes(file, other)
    assert same_bytes(file, file)
    fill(other, data + b"\0")
    assert not same_bytes(file, other)
    assert not same_bytes(other, file)
    for place in {0, size_bytes // 2, size_bytes - 1} if size_bytes else ():
        fill(other, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert not same_bytes(file, other)


def test_a_hole_is_zeros(file: int, other: int) -> None:
    os.ftruncate(file, CHUNK_BYTES + 1)
    fill(other, bytes(CHUNK_BYTES + 1))
    assert same_bytes(file, other)
    assert hash_descriptor(file) == hash_descriptor(other)


@given(st.lists(st.binary(max_size=50)))
def test_a_stream_of_appends(pieces: list[bytes]) -> None:
    stream = StreamDigest()
    offset = 0
    for piece in pieces:
        stream.update(memoryview(piece), offset)
        offset += len(piece)
    assert stream.length == offset
    assert stream.digest_of(offset) == reference_digest(b"".join(pieces))
    assert stream.digest_of(offset + 1) is None


@given(st.lists(st.tuples(st.integers(0, 30), st.binary(min_size=1, max_size=20)), min_size=1))
def test_a_stream_knows_what_it_does_not_know(writes: list[tuple[int, bytes]]) -> None:
    """It has an answer only if the writes came in order without a gap, and then it is the right one."""
    stream, data, in_order = StreamDigest(), bytearray(), True
    for offset, piece in writes:
        in_order = in_order and offset == len(data)
        data[offset:] = data[offset:].ljust(offset - len(data), b"\0")
        data[offset : offset + len(piece)] = piece
        stream.update(piece, offset)
    answer = stream.digest_of(len(data))
    assert answer == (reference_digest(bytes(data)) if in_order else None)


def test_a_spoiled_stream_stays_spoiled() -> None:
    stream = StreamDigest()
    stream.update(b"abc", 0)
    stream.spoil()
    assert stream.digest_of(3) is None
    stream.update(b"d", 3)
    assert stream.digest_of(4) is None
    assert stream.digest_of(3) is None


def test_asking_does_not_end_a_stream() -> None:
    stream = StreamDigest()
    stream.update(b"abc", 0)
    assert stream.digest_of(3) == reference_digest(b"abc")
    stream.update(b"def", 3)
    assert stream.digest_of(6) == reference_digest(b"abcdef")
