"""System calls that Python's `os` has no function for, or only with part of their arguments."""

import ctypes
import os

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_COLLAPSE_RANGE = 0x08
FALLOC_FL_ZERO_RANGE = 0x10
FALLOC_FL_INSERT_RANGE = 0x20

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
_libc.futimens.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.getxattr.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.getxattr.restype = ctypes.c_ssize_t


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def renameat2(old: bytes, new: bytes, flags: int) -> None:
    _check(_libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _check(_libc.fallocate(fd, mode, offset, length))


def _timespecs(atime_ns: int, mtime_ns: int) -> ctypes.Array[ctypes.c_long]:
    """UTIME_NOW and UTIME_OMIT stand for themselves; no file is that old to the nanosecond."""
    words: list[int] = []
    for ns in (atime_ns, mtime_ns):
        words += (0, ns) if ns in (UTIME_NOW, UTIME_OMIT) else divmod(ns, 10**9)
    return (ctypes.c_long * 4)(*words)


def utimens(path: bytes, atime_ns: int, mtime_ns: int, *, follow_symlinks: bool = True) -> None:
    flags = 0 if follow_symlinks else _AT_SYMLINK_NOFOLLOW
    times = _timespecs(atime_ns, mtime_ns)
    _check(_libc.utimensat(_AT_FDCWD, path, ctypes.addressof(times), flags))


def futimens(fd: int, atime_ns: int, mtime_ns: int) -> None:
    times = _timespecs(atime_ns, mtime_ns)
    _check(_libc.futimens(fd, ctypes.addressof(times)))


def getxattr(path: bytes, name: bytes, address: int, size: int) -> int:
    """getxattr(2) into a buffer of just this size."""
    result = int(_libc.getxattr(path, name, address, size))
    _check(result)
    return result
