"""The preview in a camera's raw file: a JPEG that the camera, or a converter, put there. Pure; runs in a worker.

CR2, NEF, ARW, PEF, DNG and others are TIFF files: a chain of directories of tags, some of which lead to directories of
their own. A file is raw when one of these says that its pixels lie under a filter of colours (or are linear ones of a
sensor), when it names a version of DNG, or has Canon's mark. Which of the JPEGs in it is the preview: the largest one
that any decoder can decode; the sensor's own data are often a JPEG as well, of the kind without loss.
"""

import io
import itertools
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

_MOST_DIRECTORIES = 64
_MOST_ENTRIES = 512  # of one directory
_MOST_VALUES = 64  # of one entry
_LONGEST_PREVIEW_BYTES = 64 << 20

_WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC = 0x100, 0x101, 0x103, 0x106
_STRIPS, _STRIP_SIZES = 0x111, 0x117
_SUBDIRECTORIES, _JPEG, _JPEG_SIZE, _DNG_VERSION = 0x14A, 0x201, 0x202, 0xC612
_WANTED = frozenset(
    (_WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC, _STRIPS, _STRIP_SIZES, _SUBDIRECTORIES, _JPEG, _JPEG_SIZE)
) | {_DNG_VERSION}
_OF_A_SENSOR = (32803, 34892)  # photometric: filtered colours, linear ones
_JPEG_COMPRESSIONS = (6, 7)
_FORMS = {1: "B", 3: "H", 4: "I", 13: "I"}  # of values: BYTE, SHORT, LONG, IFD

Directory = dict[int, tuple[int, ...]]  # of tags, and the values of each


class Preview(NamedTuple):
    jpeg: bytes  # b"" where the raw file has none that can be decoded
    width: int  # of the whole photograph as the sensor sees it, in pixels; at least the preview's
    height: int


def preview(file: BinaryIO) -> Preview | None:
    """The preview of a raw file, None for anything else. Raises OSError where it cannot be read, nothing where it is
    damaged."""
    if not file.seekable():
        return None
    file.seek(0)
    head = file.read(10)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(head[:4])
    if order is None:
        return None
    found = list(itertools.islice(_directories(file, order), _MOST_DIRECTORIES))
    is_raw = head[8:10] == b"CR" or any(
        _DNG_VERSION in each or each.get(_PHOTOMETRIC, (0,))[0] in _OF_A_SENSOR for each in found
    )
    if not is_raw:
        return None
    best, best_size = b"", (0, 0)
    for start, length in _jpegs(found):
        file.seek(start)
        data = file.read(length)
        size = _size_of(data)
        if size is not None and size[0] * size[1] > best_size[0] * best_size[1]:
            best, best_size = data, size
    sizes = [(each[_WIDTH][0], each[_HEIGHT][0]) for each in found if _WIDTH in each and _HEIGHT in each]
    width, height = max([*sizes, best_size], key=lambda size: size[0] * size[1])
    return Preview(best, width, height)


def _directories(file: BinaryIO, order: str) -> Iterator[Directory]:
    """All directories, those that the first chain leads to after it; each once, wherever pointers lead."""
    file.seek(4)
    waiting = list(_unpacked(order, "I", file.read(4)))
    seen: set[int] = set()
    while waiting:
        offset = waiting.pop(0)
        if not offset or offset in seen:
            continue
        seen.add(offset)
        file.seek(offset)
        for count in _unpacked(order, "H", file.read(2)):
            if count > _MOST_ENTRIES:
                continue
            entries = file.read(12 * count)
            following = _unpacked(order, "I", file.read(4))
            directory = _read(file, order, entries)
            yield directory
            waiting += [*following, *directory.get(_SUBDIRECTORIES, ())]


def _read(file: BinaryIO, order: str, entries: bytes) -> Directory:
    directory: Directory = {}
    for start in range(0, len(entries) - 11, 12):
        tag, kind, count = struct.unpack(order + "HHI", entries[start : start + 8])
        form = _FORMS.get(kind)
        if tag not in _WANTED or form is None or not 0 < count <= _MOST_VALUES:
            continue
        data, size = entries[start + 8 : start + 12], struct.calcsize(form) * count
        if size > 4:
            (offset,) = struct.unpack(order + "I", data)
            file.seek(offset)
            data = file.read(size)
        if values := _unpacked(order, f"{count}{form}", data[:size]):
            directory.setdefault(tag, values)
    return directory


def _unpacked(order: str, form: str, data: bytes) -> tuple[int, ...]:
    """() where the file ends too early."""
    with suppress(struct.error):
        return struct.unpack(order + form, data)
    return ()


def _jpegs(directories: list[Directory]) -> Iterator[tuple[int, int]]:
    """Where JPEGs should be that are no data of the sensor: first byte and length."""
    for each in directories:
        if _JPEG in each and _JPEG_SIZE in each:
            places = [(each[_JPEG][0], each[_JPEG_SIZE][0])]
        elif (
            each.get(_COMPRESSION, (0,))[0] in _JPEG_COMPRESSIONS
            and each.get(_PHOTOMETRIC, (0,))[0] not in _OF_A_SENSOR
        ):
            places = list(zip(each.get(_STRIPS, ()), each.get(_STRIP_SIZES, ()), strict=False))
            places = places if len(places) == 1 else []
        else:
            continue
        yield from (place for place in places if 0 < place[1] <= _LONGEST_PREVIEW_BYTES)


def _size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG of the kinds that everybody decodes, None for anything else."""
    reader = io.BytesIO(data)
    if reader.read(2) != b"\xff\xd8":
        return None
    while len(head := reader.read(4)) == 4 and head[0] == 0xFF:
        kind, length = head[1], int.from_bytes(head[2:], "big")
        if kind in (0xC0, 0xC1, 0xC2):
            frame = reader.read(5)
            return (int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big")) if len(frame) == 5 else None
        if (0xC3 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC)) or length < 2:
            return None
        reader.seek(length - 2, io.SEEK_CUR)
    return None
