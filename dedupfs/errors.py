"""The exceptions dedupfs raises on purpose, and what each means to an app and to a shell.

    DedupfsError              exit  errno    (70, EIO where nothing more is known)
    ├── UsageError            64    EINVAL   a wrong option or argument
    ├── StoreError            65    EIO      what lies in .dedupfs is not what we wrote
    │   ├── IndexDamaged      65    EIO      the LMDB index cannot be used; it can be rebuilt
    │   └── DamagedContent    65    EIO      one file's content cannot be vouched for
    ├── SourceError           66    ENOENT   the source or the mount point is not usable
    ├── NotMounted            67    ENOTCONN a running mount was asked for, and there is none
    ├── Unavailable           69    ENOSYS   libfuse, /dev/fuse or a filesystem feature is missing
    ├── Busy                  75    EBUSY    somebody else owns the store or uses the mount; try again later
    └── UnknownFormat         76    EPROTO   the store was written by a version this one does not know

`OSError` is not wrapped: it carries the errno of the backing filesystem, which is what the app must see. The two
places where errors are translated are `fusefs` (to an errno) and `cli` (to one line and an exit code).
"""

import errno as _errno

EXIT_OK = 0
EXIT_INTERNAL = 70
EXIT_OS_ERROR = 71


class DedupfsError(Exception):
    """Something went wrong that is not a bug: `str()` is one line that says what happened and what to do."""

    exit_code = EXIT_INTERNAL
    errno = _errno.EIO


class UsageError(DedupfsError):
    exit_code = 64
    errno = _errno.EINVAL


class StoreError(DedupfsError):
    exit_code = 65


class IndexDamaged(StoreError):
    pass


class DamagedContent(StoreError):
    pass


class SourceError(DedupfsError):
    exit_code = 66
    errno = _errno.ENOENT


class NotMounted(DedupfsError):
    exit_code = 67
    errno = _errno.ENOTCONN


class Unavailable(DedupfsError):
    exit_code = 69
    errno = _errno.ENOSYS


class Busy(DedupfsError):
    exit_code = 75
    errno = _errno.EBUSY


class UnknownFormat(DedupfsError):
    exit_code = 76
    errno = _errno.EPROTO
