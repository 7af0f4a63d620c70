"""Raw files as cameras lay them out: TIFF directories around sensor data and JPEGs. Of made-up sensors."""

import io
import struct
from typing import NamedTuple

from PIL import Image

Entries = list[tuple[int, str, "tuple[int, ...] | bytes | Chunk | Tags"]]


class Chunk(NamedTuple):
    """Bytes that lie elsewhere in the file; the tag says where."""

    data: bytes


class Tags(NamedTuple):
    """A directory of its own."""

    entries: Entries


_KINDS = {"B": 1, "A": 2, "H": 3, "I": 4}


class Writer:
    def __init__(self, order: str, mark: bytes = b"") -> None:
        self._order = order
        self._data = bytearray({"<": b"II*\0", ">": b"MM\0*"}[order] + bytes(4) + mark)
        self._link = 4  # where the place of the next directory is to be written

    def add(self, entries: Entries) -> None:
        """One more directory of the chain."""
        start = self._directory(entries)
        self._put(self._link, start)
        self._link = start + 2 + 12 * len(entries)

    def getvalue(self) -> bytes:
        return bytes(self._data)

    def _put(self, place: int, value: int) -> None:
        self._data[place : place + 4] = struct.pack(self._order + "I", value)

    def _append(self, data: bytes) -> int:
        self._data += bytes(len(self._data) % 2)
        place = len(self._data)
        self._data += data
        return place

    def _directory(self, entries: Entries) -> int:
        packed = b""
        for tag, kind, value in sorted(entries, key=lambda entry: entry[0]):
            if isinstance(value, Tags):
                value = (self._directory(value.entries),)
            elif isinstance(value, Chunk):
                value = (self._append(value.data),)
            if isinstance(value, bytes):
                data, count = value + b"\0", len(value) + 1
            else:
                data, count = struct.pack(f"{self._order}{len(value)}{kind}", *value), len(value)
            if len(data) > 4:
                data = struct.pack(self._order + "I", self._append(data))
            packed += struct.pack(self._order + "HHI", tag, _KINDS[kind], count) + data.ljust(4, b"\0")
        return self._append(struct.pack(self._order + "H", len(entries)) + packed + bytes(4))


def _jpeg(image: Image.Image, side: int) -> bytes:
    small = image.copy()
    small.thumbnail((side, side))
    out = io.BytesIO()
    # Cameras write no orientation there, or one that is of no account.
    exif = Image.Exif()
    exif[0x0112] = 3
    small.save(out, "JPEG", quality=90, exif=exif)
    return out.getvalue()


def _lossless_jpeg(width: int, height: int) -> bytes:
    """The beginning of one, as sensor data are stored: larger than any preview."""
    frame = struct.pack(">BHHB", 14, height, width, 1) + b"\1\x11\0"
    return b"\xff\xd8\xff\xc3" + struct.pack(">H", len(frame) + 2) + frame + bytes(200_000)


def _of_camera(orientation: int) -> Entries:
    taken = Tags([(0x9003, "A", b"2026:01:02 03:04:05"), (0x9291, "A", b"25")])
    return [(0x10F, "A", b"Maker"), (0x110, "A", b"Model"), (0x112, "H", (orientation,)), (0x8769, "I", taken)]


def nef(image: Image.Image, *, orientation: int = 1) -> bytes:
    """A small picture without compression first; the preview and the sensor's data in directories of their own."""
    writer = Writer(">")
    thumbnail = image.resize((16, 12)).convert("RGB").tobytes()
    preview, sensor = _jpeg(image, 1000), bytes(50_000)
    ours = Tags(
        [(0x103, "H", (6,)), (0x201, "I", Chunk(preview)), (0x202, "I", (len(preview),))],
    )
    raw = Tags(
        [
            (0x100, "I", (6000,)),
            (0x101, "I", (4000,)),
            (0x103, "H", (34713,)),
            (0x106, "H", (32803,)),
            (0x111, "I", Chunk(sensor)),
            (0x117, "I", (len(sensor),)),
        ]
    )
    places = (writer._directory(ours.entries), writer._directory(raw.entries))
    writer.add(
        [
            (0x100, "I", (16,)),
            (0x101, "I", (12,)),
            (0x102, "H", (8, 8, 8)),
            (0x103, "H", (1,)),
            (0x106, "H", (2,)),
            (0x111, "I", Chunk(thumbnail)),
            (0x115, "H", (3,)),
            (0x117, "I", (len(thumbnail),)),
            (0x14A, "I", places),
            *_of_camera(orientation),
        ]
    )
    return writer.getvalue()


def cr2(image: Image.Image, *, orientation: int = 1) -> bytes:
    """The preview in the first directory, a thumbnail in the second, the sensor's data in the last."""
    writer = Writer("<", b"CR\2\0" + bytes(4))
    preview, thumbnail, sensor = _jpeg(image, 1000), _jpeg(image, 160), _lossless_jpeg(3000, 4000)
    writer.add(
        [
            (0x100, "H", (6000,)),
            (0x101, "H", (4000,)),
            (0x102, "H", (8, 8, 8)),
            (0x103, "H", (6,)),
            (0x111, "I", Chunk(preview)),
            (0x117, "I", (len(preview),)),
            *_of_camera(orientation),
        ]
    )
    writer.add([(0x201, "I", Chunk(thumbnail)), (0x202, "I", (len(thumbnail),))])
    writer.add([(0x103, "H", (6,)), (0x111, "I", Chunk(sensor)), (0x117, "I", (len(sensor),))])
    return writer.getvalue()


def dng(image: Image.Image, *, orientation: int = 1, with_preview: bool = True) -> bytes:
    """The sensor's data as a JPEG without loss, a preview compressed as strips are."""
    writer = Writer("<")
    preview, sensor = _jpeg(image, 1000), _lossless_jpeg(6000, 4000)
    raw = Tags(
        [
            (0x100, "I", (6000,)),
            (0x101, "I", (4000,)),
            (0x103, "H", (7,)),
            (0x106, "H", (32803,)),
            (0x111, "I", Chunk(sensor)),
            (0x117, "I", (len(sensor),)),
        ]
    )
    shown = Tags([(0x103, "H", (7,)), (0x106, "H", (6,)), (0x111, "I", Chunk(preview)), (0x117, "I", (len(preview),))])
    places = [writer._directory(raw.entries)] + ([writer._directory(shown.entries)] if with_preview else [])
    writer.add([(0xC612, "B", (1, 4, 0, 0)), (0x14A, "I", tuple(places)), *_of_camera(orientation)])
    return writer.getvalue()


ALL = {"nef": nef, "cr2": cr2, "dng": dng}
