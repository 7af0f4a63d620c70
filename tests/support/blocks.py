"""Where the bytes of a file are on the backing filesystem: what sharing promises, measured below the mount."""

import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from .tools import tool

_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP_HEADER = struct.Struct("=QQLLLL")
_FIEMAP_EXTENT = struct.Struct("=QQQQQLLLL")
_FIEMAP_FLAG_SYNC = 1
_FIEMAP_EXTENT_LAST = 1
_EXTENTS_AT_ONCE = 256

_REFERENCE_XATTRS = ("trusted.dedupfs.ref", "user.dedupfs.ref")


def is_reference(path: Path) -> bool:
    """Whether a file of the backing directory is a complete reference: marked, and without a byte of its own."""
    name = _REFERENCE_XATTRS[os.geteuid() != 0]
    if name not in os.listxattr(path, follow_symlinks=False):
        return False
    assert not extents(path), f"{path} is a reference that has bytes of its own"
    return True


def extents(path: Path) -> list[tuple[int, int]]:
    """Start and length in bytes, on the device, of everything the file has allocated."""
    found: list[tuple[int, int]] = []
    start = 0
    with open(path, "rb") as file:
        while True:
            request = bytearray(_FIEMAP_HEADER.size + _EXTENTS_AT_ONCE * _FIEMAP_EXTENT.size)
            _FIEMAP_HEADER.pack_into(
                request, 0, start, (1 << 64) - 1 - start, _FIEMAP_FLAG_SYNC, 0, _EXTENTS_AT_ONCE, 0
            )
            fcntl.ioctl(file, _FS_IOC_FIEMAP, request)
            count = _FIEMAP_HEADER.unpack_from(request)[3]
            for number in range(count):
                logical, physical, length, _, _, flags, *_ = _FIEMAP_EXTENT.unpack_from(
                    request, _FIEMAP_HEADER.size + number * _FIEMAP_EXTENT.size
                )
                found.append((physical, length))
                start = logical + length
                if flags & _FIEMAP_EXTENT_LAST:
                    return found
            if not count:
                return found


def share_blocks(*paths: Path) -> bool:
    """Whether these files of the backing directory are all stored in the very same blocks (reflink)."""
    first, *others = [extents(path) for path in paths]
    return bool(first) and all(other == first for other in others)


def stored_bytes(directory: Path) -> int:
    """What all files below a directory occupy, blocks that several of them share counted once."""
    used: set[int] = set()
    for path in files_below(directory):
        for start, length in extents(path):
            used.update(range(start // 4096, -(-(start + length) // 4096)))
    return 4096 * len(used)


def disk_usage(path: Path) -> int:
    """What du(1) says, in bytes."""
    return int(tool("du", "--summarize", "--block-size=1", path).split()[0])


def files_below(directory: Path) -> Iterator[Path]:
    """Every regular file below a directory."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if stat.S_ISREG(path.lstat().st_mode):
                yield path
