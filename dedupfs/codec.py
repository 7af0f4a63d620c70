"""The bytes of every record dedupfs stores, and nothing else: encode and decode, no I/O.

All integers are big-endian, so that LMDB's byte order of keys is their numeric order. Every value that stands alone
begins with a version byte; a decoder that meets another version raises `StoreError`, it never guesses.

Reference xattr (44 bytes; docs/format.md has the table):

    0   1   version, 1
    1   1   flags: bit 0, materialising
    2   2   collision number
    4   8   size of the content in bytes
    12  16  digest of the content, XXH3-128 canonical
    28  8   mtime to put back should materialising be abandoned, else 0: seconds since 1970, signed
    36  4   … and nanoseconds
    40  4   CRC-32 of bytes 0..39 and nothing else: tells a damaged record, proves nothing
"""

import struct
import zlib

from .errors import StoreError
from .model import ContentKey, Digest, FileRecord, FileState, Ino, Link, Reference, Stamp

_REFERENCE = struct.Struct(">BBHQ16sqII")
_REFERENCE_VERSION = 1
_MATERIALISING = 0x01

_FILE = struct.Struct(">BBQqq16sH")
_FILE_VERSION = 1
_INO = struct.Struct(">Q")
_CONTENT = struct.Struct(">16sH")
_COUNTER = struct.Struct(">q")


def encode_reference(reference: Reference) -> bytes:
    body = _REFERENCE.pack(
        _REFERENCE_VERSION,
        _MATERIALISING if reference.materialising else 0,
        reference.content.collision,
        reference.size_bytes,
        reference.content.digest,
        *divmod(reference.mtime_ns, 10**9),
        0,
    )[:-4]
    return body + zlib.crc32(body).to_bytes(4, "big")


def decode_reference(value: bytes) -> Reference:
    """Raises StoreError when `value` is not a reference this version wrote."""
    if len(value) != _REFERENCE.size:
        raise StoreError(f"reference record of {len(value)} bytes, expected {_REFERENCE.size}")
    version, flags, collision, size_bytes, digest, mtime_s, mtime_ns, checksum = _REFERENCE.unpack(value)
    if version != _REFERENCE_VERSION or flags & ~_MATERIALISING:
        raise StoreError(f"reference record of version {version}, flags {flags:#x}: written by a newer dedupfs?")
    if zlib.crc32(value[:-4]) != checksum:
        raise StoreError("reference record with a wrong checksum")
    if mtime_ns >= 10**9:
        raise StoreError(f"reference record with {mtime_ns} nanoseconds")
    return Reference(
        ContentKey(Digest(digest), collision), size_bytes, bool(flags & _MATERIALISING), mtime_s * 10**9 + mtime_ns
    )


def encode_ino(ino: Ino) -> bytes:
    return _INO.pack(ino)


def decode_ino(value: bytes) -> Ino:
    if len(value) != _INO.size:
        raise StoreError(f"inode number of {len(value)} bytes in the index")
    return Ino(_INO.unpack(value)[0])


def encode_file(record: FileRecord) -> bytes:
    stamp, state, content = record
    return _FILE.pack(
        _FILE_VERSION, state, stamp.size_bytes, stamp.mtime_ns, stamp.ctime_ns, content.digest, content.collision
    )


def decode_file(value: bytes) -> FileRecord:
    if len(value) != _FILE.size or value[0] != _FILE_VERSION:
        raise StoreError(f"file record of {len(value)} bytes, version {value[:1].hex()}")
    _, state, size_bytes, mtime_ns, ctime_ns, digest, collision = _FILE.unpack(value)
    try:
        known = FileState(state)
    except ValueError:
        raise StoreError(f"file record of unknown state {state}") from None
    return FileRecord(Stamp(size_bytes, mtime_ns, ctime_ns), known, ContentKey(Digest(digest), collision))


def encode_link(link: Link) -> bytes:
    return _INO.pack(link.parent) + link.name


def decode_link(value: bytes) -> Link:
    if len(value) <= _INO.size:
        raise StoreError(f"link record of {len(value)} bytes")
    return Link(Ino(_INO.unpack_from(value)[0]), value[_INO.size :])


def encode_content(content: ContentKey) -> bytes:
    return _CONTENT.pack(*content)


def decode_content(value: bytes) -> ContentKey:
    if len(value) != _CONTENT.size:
        raise StoreError(f"content key of {len(value)} bytes")
    digest, collision = _CONTENT.unpack(value)
    return ContentKey(Digest(digest), collision)


def encode_counter(value: int) -> bytes:
    return _COUNTER.pack(value)


def decode_counter(value: bytes) -> int:
    if len(value) != _COUNTER.size:
        raise StoreError(f"counter of {len(value)} bytes")
    return int(_COUNTER.unpack(value)[0])


def encode_pending(path: bytes, ino: Ino) -> bytes:
    """Value of the queue table: the inode, and the path it was last seen at."""
    return _INO.pack(ino) + path


def decode_pending(value: bytes) -> tuple[Ino, bytes]:
    if len(value) <= _INO.size:
        raise StoreError(f"queue record of {len(value)} bytes")
    return Ino(_INO.unpack_from(value)[0]), value[_INO.size :]
