"""The words of dedupfs: small immutable values that the other modules pass to each other. No I/O.

Paths are `bytes` relative to the source, without a leading slash; the source itself is `b""`.
"""

import enum
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NewType

Ino = NewType("Ino", int)
Digest = NewType("Digest", bytes)  # 16 bytes, XXH3-128, big-endian (its canonical form)

# Told now and then how far something long has come: its phase in a word or two, what is done, of how much (if known).
Progress = Callable[[str, int, int | None], None]

ROOT = b""
STORE_DIRECTORY = b".dedupfs"

# The path of a file that was closed under a name it does not have any more.
UNKNOWN_PATH = b"?/?"

# Below one block of the backing filesystem a reference would save nothing.
SMALLEST_SHARED_BYTES = 4096


def is_hidden(path: bytes) -> bool:
    """Whether a path leads into the store, which the mount does not show."""
    return path == STORE_DIRECTORY or path.startswith(STORE_DIRECTORY + b"/")


COLLISIONS = 256
COPIES = 256


class ContentKey(NamedTuple):
    """What one content is called: its digest, and a number.

    The number's lower byte tells apart contents of equal digest. The upper one tells apart copies of one content, of
    which there are several where some of its files may not share with others (see `rules`): each copy has its own
    files and its own blob. Numbers of equal lower byte are given only to bytes that were compared.
    """

    digest: Digest
    collision: int = 0

    @property
    def bytes_key(self) -> "ContentKey":
        """The same for all copies of these bytes."""
        return ContentKey(self.digest, self.collision % COLLISIONS)

    def copies(self) -> Iterator["ContentKey"]:
        """Everything that a copy of these bytes can be called, the first one first."""
        return (ContentKey(self.digest, self.bytes_key.collision + COLLISIONS * copy) for copy in range(COPIES))

    @property
    def name(self) -> str:
        return f"{self.digest.hex()}.{self.collision}"


class FileState(enum.IntEnum):
    """Where the bytes of a settled file are."""

    PLAIN = 1  # in its own inode, shared with nothing
    REFERENCE = 2  # in the blob that its reference names
    SHARED = 3  # in extents that the backing filesystem shares with other files

    @property
    def word(self) -> str:
        return self.name.lower()


class Stamp(NamedTuple):
    """What tells that an inode has not changed since it was looked at. The times are to compare: modulo 2^64 ns."""

    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, st: os.stat_result) -> "Stamp":
        return cls(st.st_size, _wrapped(st.st_mtime_ns), _wrapped(st.st_ctime_ns))


def _wrapped(time_ns: int) -> int:
    """As a signed 64-bit number, which holds the years 1678 to 2261; filesystems know later ones."""
    return (time_ns + (1 << 63)) % (1 << 64) - (1 << 63)


class FileRecord(NamedTuple):
    """What the index knows of a settled file, by inode."""

    stamp: Stamp
    state: FileState
    content: ContentKey


class Learned(NamedTuple):
    """That a file was settled, with a content that other files have, and that was not known of it before."""

    ino: Ino  # what is at the path since
    path: bytes  # when it was settled
    content: ContentKey


class Link(NamedTuple):
    """One name of an inode: a directory's inode and the entry in it."""

    parent: Ino
    name: bytes


class Verified(NamedTuple):
    """That a content was read again and found to be what its digest says: in which scrub, and when (Unix time)."""

    scrub: int
    time_s: int


class ScrubPass(NamedTuple):
    """One scrub of everything. It may take many runs; `finished_s` is 0 until its last one came to the end."""

    number: int
    begun_s: int
    finished_s: int = 0


class DamageKind(enum.IntEnum):
    BLOB = 1
    FILE = 2

    @property
    def word(self) -> str:
        return self.name.lower()


class Damage(NamedTuple):
    """What a scrub found to hold other bytes than `content`, or none that can be read: a blob or a file, by inode.

    Of a file it holds while that has this size and time: who writes a good copy into it changes them. Of a blob it
    holds until another inode has its name. `ino` is 0 for a blob that was missing.
    """

    content: ContentKey
    kind: DamageKind
    ino: Ino
    size_bytes: int
    mtime_ns: int
    found_s: int
    problem: str


@dataclass(frozen=True, slots=True)
class Reference:
    """What the reference xattr says: the content that this file stands for.

    `materialising` is set while the content is being copied into the file's own inode; until it is cleared the blob,
    not the file's own blocks, is the truth, and `mtime_ns` is the time to put back if the copy is abandoned.
    """

    content: ContentKey
    size_bytes: int
    materialising: bool = False
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the index. `stored_bytes` counts a shared content once; all sizes are lengths, not blocks."""

    files: int = 0
    logical_bytes: int = 0
    stored_bytes: int = 0
    references: int = 0
    shared_files: int = 0
    contents_shared: int = 0

    @property
    def saved_bytes(self) -> int:
        return self.logical_bytes - self.stored_bytes


class Caller(NamedTuple):
    """Who asks: the credentials FUSE reports for a request."""

    uid: int
    gid: int
    pid: int
    umask: int = 0


# -- pictures ---------------------------------------------------------------------------------------------------------

# Of how pictures are described: with a change that changes records, this is another number.
DESCRIBING_PATH = 2

THUMBNAIL_SIDE = 64
HASH_BYTES = 32


class Thumbnails(NamedTuple):
    """Grey views of a picture, each squeezed into a square of `THUMBNAIL_SIDE` pixels, a byte a pixel, row by row.

    `full` is the picture as it is shown; `trimmed` what is left without an even border, b"" where there is none.
    """

    full: bytes
    trimmed: bytes = b""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What is known of a picture, by content. Texts and marks are empty where the file does not tell."""

    version: int  # of the describing path: hashes of different versions are never compared
    format: str  # as Pillow calls it: JPEG, PNG, …
    width: int  # as shown, the orientation applied
    height: int
    orientation: int  # EXIF: 1 to 8
    phash: bytes  # of the full view, HASH_BYTES; bits in the order of imagehash.phash(hash_size=16)
    trimmed_phash: bytes  # of the trimmed view, b"" where nothing was trimmed
    scan: bytes  # digest of what decides a JPEG's pixels, whatever its metadata say
    pixels: bytes  # digest of the pixels, of formats without loss
    quality: int  # of a JPEG's quantisation, 1 to 100; 0 for other formats
    contrast: int  # standard deviation of the grey levels, in tenths
    bright_permille: int  # of the pixels that are nearly white: a document has many
    is_grey: bool  # stored without colours
    taken: str  # when the shutter was released by the camera's clock: 2026-01-31T23:59:59.25, as precise as it is
    zone: str  # of that clock: +02:00
    make: str
    camera: str
    serial: str
    software: str
    has_gps: bool

    @property
    def is_document(self) -> bool:
        return self.bright_permille > 600

    @property
    def is_flat(self) -> bool:
        """Too even to be told from others of its kind."""
        return self.contrast < 40


class ImageState(enum.IntEnum):
    """How far a content is with being described."""

    NO_PICTURE = 0  # its first bytes are those of no known format
    WAITING = 1
    UNDESCRIBABLE = 2
    DESCRIBED = 3


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """What the index says of a content as a picture: always one of the four states."""

    state: ImageState
    sequence: int = 0  # its place in the backlog, while it waits
    reason: str = ""  # why it cannot be described
    record: ImageRecord | None = None


@dataclass(frozen=True, slots=True)
class ImageTotals:
    described: int = 0
    waiting: int = 0
    undescribable: int = 0


class Relation(enum.StrEnum):
    """How one picture is related to another; what is further down is further from being the same."""

    IDENTICAL = "identical"  # the same bytes
    METADATA = "metadata"  # the same scan, other metadata
    PIXELS = "pixels"  # the same pixels in another container
    RECOMPRESSED = "recompressed"
    RESIZED = "resized"
    ROTATED = "rotated"  # turned or mirrored
    TONE = "tone"  # brightness, contrast, sharpness
    ANNOTATED = "annotated"  # something was laid over it, or around it
    CROPPED = "cropped"  # another cut of it, straightened too
    SEQUENCE = "sequence"  # another release of the shutter: no duplicate
    TEMPLATE = "template"  # another sheet of the same form: no duplicate

    @property
    def is_same_picture(self) -> bool:
        return self not in (Relation.SEQUENCE, Relation.TEMPLATE)


class Alike(NamedTuple):
    """That a picture resembles another: how, and by how many of the 256 bits their nearest views differ."""

    content: ContentKey
    relation: Relation
    distance: int
