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

import json
import struct
import zlib
from typing import Any

from .errors import StoreError
from .model import (
    HASH_BYTES,
    THUMBNAIL_SIDE,
    Alike,
    ContentKey,
    Damage,
    DamageKind,
    Digest,
    FileRecord,
    FileState,
    ImageEntry,
    ImageRecord,
    ImageState,
    Ino,
    Link,
    Reference,
    Relation,
    ScrubPass,
    Stamp,
    Thumbnails,
    Verified,
)

_REFERENCE = struct.Struct(">BBHQ16sqII")
_REFERENCE_VERSION = 1
_MATERIALISING = 0x01

_FILE = struct.Struct(">BBQqq16sH")
_FILE_VERSION = 1
_INO = struct.Struct(">Q")
_CONTENT = struct.Struct(">16sH")
_COUNTER = struct.Struct(">q")
_VERIFIED = struct.Struct(">BIq")
_PASS = struct.Struct(">BIqq")
_DAMAGE_KEY = struct.Struct(">16sHBQ")
_DAMAGE = struct.Struct(">BQqq")
_SCRUB_VERSION = 1  # of these three


def json_object(raw: bytes) -> dict[str, Any]:
    """The object in a record that is text. Raises ValueError for anything else, also where it nests too deep."""
    try:
        found = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


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


def encode_verified(verified: Verified) -> bytes:
    return _VERIFIED.pack(_SCRUB_VERSION, *verified)


def decode_verified(value: bytes) -> Verified:
    _check_scrub_record(value, _VERIFIED.size)
    _, scrub, time_s = _VERIFIED.unpack(value)
    return Verified(scrub, time_s)


def encode_scrub_pass(scrub: ScrubPass) -> bytes:
    return _PASS.pack(_SCRUB_VERSION, *scrub)


def decode_scrub_pass(value: bytes) -> ScrubPass:
    _check_scrub_record(value, _PASS.size)
    _, number, begun_s, finished_s = _PASS.unpack(value)
    return ScrubPass(number, begun_s, finished_s)


def encode_damage(damage: Damage) -> tuple[bytes, bytes]:
    """Key and value of the table of damages; what is wrong, in words, ends the value."""
    key = _DAMAGE_KEY.pack(*damage.content, damage.kind, damage.ino)
    value = _DAMAGE.pack(_SCRUB_VERSION, damage.size_bytes, damage.mtime_ns, damage.found_s)
    return key, value + damage.problem.encode()


def decode_damage(key: bytes, value: bytes) -> Damage:
    if len(key) != _DAMAGE_KEY.size or len(value) < _DAMAGE.size:
        raise StoreError(f"damage record of {len(key)} and {len(value)} bytes")
    _check_scrub_record(value, len(value))
    digest, collision, kind, ino = _DAMAGE_KEY.unpack(key)
    _, size_bytes, mtime_ns, found_s = _DAMAGE.unpack_from(value)
    try:
        known = DamageKind(kind)
    except ValueError:
        raise StoreError(f"damage record of unknown kind {kind}") from None
    problem = value[_DAMAGE.size :].decode(errors="replace")
    return Damage(ContentKey(Digest(digest), collision), known, Ino(ino), size_bytes, mtime_ns, found_s, problem)


def _check_scrub_record(value: bytes, size_bytes: int) -> None:
    if len(value) != size_bytes or value[0] != _SCRUB_VERSION:
        raise StoreError(f"record of a scrub of {len(value)} bytes, version {value[:1].hex()}")


# -- pictures ---------------------------------------------------------------------------------------------------------
#
# Image record: version byte; the fixed part `_IMAGE`; then the texts `_IMAGE_TEXTS` and the marks of varying length,
# each with a byte for its length before it. Thumbnails: version byte; zlib of the full view, and of the trimmed one
# after it where there is one.

_IMAGE = struct.Struct(">BIIIBBHHBB32s")
_IMAGE_VERSION = 1
_IMAGE_TEXTS = ("format", "taken", "zone", "make", "camera", "serial", "software")
_IMAGE_MARKS = {"trimmed_phash": HASH_BYTES, "scan": 16, "pixels": 16}
_IS_GREY, _HAS_GPS = 1, 2

_ENTRY = struct.Struct(">BB")
_ENTRY_VERSION = 1
_SEQUENCE = struct.Struct(">Q")

_THUMBNAILS_VERSION = 1
_THUMBNAIL_BYTES = THUMBNAIL_SIDE * THUMBNAIL_SIDE

_DESCRIPTION = struct.Struct(">H")
_ALIKE = struct.Struct(">16sHBH")
_RELATIONS = tuple(Relation)


def encode_image(record: ImageRecord) -> bytes:
    flags = (_IS_GREY if record.is_grey else 0) | (_HAS_GPS if record.has_gps else 0)
    fixed = _IMAGE.pack(
        _IMAGE_VERSION,
        record.version,
        record.width,
        record.height,
        record.orientation,
        record.quality,
        record.contrast,
        record.bright_permille,
        flags,
        0,
        record.phash,
    )
    texts: list[bytes] = [getattr(record, name).encode() for name in _IMAGE_TEXTS]
    marks: list[bytes] = [getattr(record, name) for name in _IMAGE_MARKS]
    return fixed + b"".join(len(value).to_bytes(1, "big") + value for value in (*texts, *marks))


def decode_image(value: bytes) -> ImageRecord:
    """Raises StoreError for anything that `encode_image` would not have made: it may come from a worker gone bad."""
    if len(value) < _IMAGE.size or value[0] != _IMAGE_VERSION:
        raise StoreError(f"image record of {len(value)} bytes, version {value[:1].hex()}")
    _, version, width, height, orientation, quality, contrast, bright, flags, zero, phash = _IMAGE.unpack_from(value)
    fields: list[bytes] = []
    position = _IMAGE.size
    for _ in (*_IMAGE_TEXTS, *_IMAGE_MARKS):
        length = value[position] if position < len(value) else 0
        fields.append(value[position + 1 : position + 1 + length])
        position += 1 + length
    try:
        texts = [field.decode() for field in fields[: len(_IMAGE_TEXTS)]]
    except UnicodeDecodeError:
        raise StoreError("image record with a text that is not UTF-8") from None
    marks = fields[len(_IMAGE_TEXTS) :]
    if (
        position != len(value)
        or not (width and height and 1 <= orientation <= 8 and quality <= 100 and bright <= 1000)
        or flags & ~(_IS_GREY | _HAS_GPS)
        or zero
        or any(mark and len(mark) != length for mark, length in zip(marks, _IMAGE_MARKS.values(), strict=True))
        or not all(text.isprintable() for text in texts)
    ):
        raise StoreError("image record with values that are out of range")
    kind, taken, zone, make, camera, serial, software = texts
    trimmed_phash, scan, pixels = marks
    return ImageRecord(
        version=version,
        format=kind,
        width=width,
        height=height,
        orientation=orientation,
        phash=phash,
        trimmed_phash=trimmed_phash,
        scan=scan,
        pixels=pixels,
        quality=quality,
        contrast=contrast,
        bright_permille=bright,
        is_grey=bool(flags & _IS_GREY),
        taken=taken,
        zone=zone,
        make=make,
        camera=camera,
        serial=serial,
        software=software,
        has_gps=bool(flags & _HAS_GPS),
    )


def encode_thumbnails(thumbnails: Thumbnails) -> bytes:
    return bytes([_THUMBNAILS_VERSION]) + zlib.compress(thumbnails.full + thumbnails.trimmed, 1)


def decode_thumbnails(value: bytes) -> Thumbnails:
    """Raises StoreError for anything that is not one or two thumbnails."""
    if value[:1] != bytes([_THUMBNAILS_VERSION]):
        raise StoreError(f"thumbnails of version {value[:1].hex()}")
    stream = zlib.decompressobj()
    try:
        levels = stream.decompress(value[1:], 2 * _THUMBNAIL_BYTES + 1)
    except zlib.error as error:
        raise StoreError(f"damaged thumbnails ({error})") from None
    if len(levels) not in (_THUMBNAIL_BYTES, 2 * _THUMBNAIL_BYTES):
        raise StoreError(f"thumbnails of {len(levels)} pixels")
    return Thumbnails(levels[:_THUMBNAIL_BYTES], levels[_THUMBNAIL_BYTES:])


def encode_description(record: ImageRecord, thumbnails: Thumbnails) -> bytes:
    """What a worker answers: the length of the image record, the record, the thumbnails."""
    image = encode_image(record)
    return _DESCRIPTION.pack(len(image)) + image + encode_thumbnails(thumbnails)


def decode_description(value: bytes) -> tuple[ImageRecord, Thumbnails]:
    if len(value) < _DESCRIPTION.size:
        raise StoreError(f"description of {len(value)} bytes")
    end = _DESCRIPTION.size + _DESCRIPTION.unpack_from(value)[0]
    record, thumbnails = decode_image(value[_DESCRIPTION.size : end]), decode_thumbnails(value[end:])
    if bool(record.trimmed_phash) != bool(thumbnails.trimmed):
        raise StoreError("description with a hash of a view that it does not show")
    return record, thumbnails


def encode_image_entry(entry: ImageEntry) -> bytes:
    head = _ENTRY.pack(_ENTRY_VERSION, entry.state)
    match entry.state:
        case ImageState.WAITING:
            return head + _SEQUENCE.pack(entry.sequence)
        case ImageState.UNDESCRIBABLE:
            return head + entry.reason.encode()
        case ImageState.DESCRIBED if entry.record is not None:
            return head + encode_image(entry.record)
    return head


def decode_image_entry(value: bytes) -> ImageEntry:
    state = decode_image_state(value)
    rest = value[_ENTRY.size :]
    match state:
        case ImageState.WAITING:
            if len(rest) != _SEQUENCE.size:
                raise StoreError(f"place in the backlog of {len(rest)} bytes")
            return ImageEntry(state, sequence=_SEQUENCE.unpack(rest)[0])
        case ImageState.UNDESCRIBABLE:
            return ImageEntry(state, reason=rest.decode(errors="replace"))
        case ImageState.DESCRIBED:
            return ImageEntry(state, record=decode_image(rest))
    return ImageEntry(state)


def decode_image_state(value: bytes) -> ImageState:
    if len(value) < _ENTRY.size or value[0] != _ENTRY_VERSION:
        raise StoreError(f"image entry of {len(value)} bytes, version {value[:1].hex()}")
    try:
        return ImageState(value[1])
    except ValueError:
        raise StoreError(f"image entry of unknown state {value[1]}") from None


def encode_sequence(sequence: int) -> bytes:
    return _SEQUENCE.pack(sequence)


def decode_sequence(value: bytes) -> int:
    if len(value) != _SEQUENCE.size:
        raise StoreError(f"place in the backlog of {len(value)} bytes")
    return int(_SEQUENCE.unpack(value)[0])


def encode_alike(alike: Alike) -> bytes:
    return _ALIKE.pack(*alike.content, _RELATIONS.index(alike.relation), alike.distance)


def decode_alike(value: bytes) -> Alike:
    if len(value) != _ALIKE.size:
        raise StoreError(f"likeness record of {len(value)} bytes")
    digest, collision, relation, distance = _ALIKE.unpack(value)
    if relation >= len(_RELATIONS):
        raise StoreError(f"likeness record of unknown relation {relation}")
    return Alike(ContentKey(Digest(digest), collision), _RELATIONS[relation], distance)
