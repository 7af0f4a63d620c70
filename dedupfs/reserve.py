"""`.dedupfs/reserve`: room that nobody uses, so that a disk where nothing is free can be emptied by deleting.

A blob goes when the index has written that nothing refers to it any more. Writing takes room: wherever the index has to
grow, and always on a filesystem that does not write in place. What is deleted would then free nothing, for ever.
"""

import logging
import os
import time
from contextlib import suppress

from .backing import Backing
from .store import RESERVE

log = logging.getLogger(__name__)

_MOST_BYTES = 64 << 20  # a transaction in which ten thousand names go
_SHARE = 256  # of the filesystem, at most
_RETRY_S = 10.0


class Reserve:
    """One for a store that is owned, and called by one thread at a time."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._is_kept = False
        self._try_at_s = 0.0

    def keep(self) -> None:
        """Set the room aside, where it is not yet, and the disk has plenty. Costs nothing where it is."""
        if self._is_kept or time.monotonic() < self._try_at_s:
            return
        self._try_at_s = time.monotonic() + _RETRY_S
        try:
            self._is_kept = self._keep()
        except OSError as error:
            log.info("no room is kept for when the disk is full: %s", error)
            self._remove()

    def _keep(self) -> bool:
        disk = self._backing.statvfs(b"")
        size_bytes = min(_MOST_BYTES, disk.f_blocks * disk.f_frsize // _SHARE)
        if self._kept_bytes() >= size_bytes:
            return True
        if disk.f_bavail * disk.f_frsize < 2 * size_bytes:
            return False  # or an app would meet a disk that is full, for as long as this takes to fail
        fd = self._backing.open(RESERVE, os.O_WRONLY | os.O_CREAT)
        try:
            self._backing.fallocate(fd, 0, 0, size_bytes)
        finally:
            os.close(fd)
        return True

    def give(self) -> bool:
        """Free what is kept. False where nothing is."""
        self._is_kept = False
        if not self._kept_bytes():
            return False
        # Not truncated: beyond its quota, btrfs lets go of a whole file only.
        self._remove()
        with suppress(OSError):
            self._backing.sync()  # what was removed is free after the filesystem's next commit
        return True

    def _kept_bytes(self) -> int:
        try:
            return self._backing.lstat(RESERVE).st_blocks * 512
        except OSError:
            return 0

    def _remove(self) -> None:
        with suppress(OSError):
            self._backing.unlink(RESERVE)
