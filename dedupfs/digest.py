"""Exact digests: XXH3-128 over bytes, a descriptor, or a stream of writes. Comparison of whole files.

A digest only ever proposes that two files are equal; `same_bytes` decides.
XXH3: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md (canonical, big-endian form).
"""

import os
from collections.abc import Callable
from typing import Protocol

import xxhash

from .model import Digest

# Large enough that the GIL is rarely taken, small enough to stay in the second-level cache while it is hashed.
CHUNK_BYTES = 1 << 20

Checkpoint = Callable[[], None]  # called once a chunk; raises to give up


class DescriptorHasher(Protocol):
    """Digest of everything behind a descriptor; tests put a hash of few bits in its place to make collisions."""

    def __call__(self, fd: int, checkpoint: Checkpoint = ...) -> Digest: ...


def proceed() -> None:
    """The checkpoint that never gives up."""


def hash_descriptor(fd: int, checkpoint: Checkpoint = proceed) -> Digest:
    """Digest of the bytes from offset 0 to the end of `fd`, whose own offset is left alone.

    Raises OSError, and whatever `checkpoint` raises.
    """
    state = xxhash.xxh3_128()
    # No larger than a small file: it is filled with zeros first.
    buffer = bytearray(min(CHUNK_BYTES, os.fstat(fd).st_size) or 1)
    view = memoryview(buffer)
    offset = 0
    while True:
        checkpoint()
        count = os.preadv(fd, [buffer], offset)
        if not count:
            return Digest(state.digest())
        state.update(view[:count])
        offset += count


def same_bytes(left: int, right: int, checkpoint: Checkpoint = proceed) -> bool:
    """Whether the two descriptors hold exactly the same bytes. Raises like `hash_descriptor`."""
    offset = 0
    while True:
        checkpoint()
        ours = os.pread(left, CHUNK_BYTES, offset)
        theirs = os.pread(right, CHUNK_BYTES, offset)
        if ours != theirs:
            return False
        if not ours:
            return True
        offset += len(ours)


class StreamDigest:
    """Digest of a file that is written from its start to its end; anything else makes it useless, and it says so."""

    __slots__ = ("_state", "length")

    def __init__(self) -> None:
        self._state: xxhash.xxh3_128 | None = xxhash.xxh3_128()
        self.length = 0

    def update(self, data: bytes | memoryview, offset: int) -> None:
        if self._state is None:
            return
        if offset != self.length:
            self._state = None
            return
        self._state.update(data)
        self.length += len(data)

    def spoil(self) -> None:
        """The content changed in a way that was not an append."""
        self._state = None

    def digest_of(self, size_bytes: int) -> Digest | None:
        """The digest, if exactly `size_bytes` bytes were seen in order."""
        if self._state is None or self.length != size_bytes:
            return None
        return Digest(self._state.digest())
