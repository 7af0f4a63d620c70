"""`.dedupfs/reserve`: room that nobody uses, so that a disk where nothing is free can be emptied by deleting.

A blob goes when the index has written that nothing refers to it any more. Writing takes room: wherever the index has to
grow, and always on a filesystem that does not write in place. So does taking the immutable flag off the blob, beyond a
quota of btrfs. What is deleted would then free nothing, for ever.
"""

import logging
import os
import time
from contextlib import suppress

from .backing import Backing
from .store import INDEX, RESERVE

log = logging.getLogger(__name__)

_DATA = INDEX + b"/data.mdb"
_LEAST_BYTES = 256 << 10
_MOST_BYTES = 64 << 20  # a transaction in which ten thousand names go
_SHARE = 256  # of the filesystem, at most
_LOOK_S = 10.0


class Reserve:
    """One for a store that is owned, and called by one thread at a time."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._look_at_s = 0.0
        self._complained = ""

    def keep(self) -> None:
        """Set the room aside, where the disk has plenty: as much as the index could write at once. Looks now and then,
        however often it is called."""
        if time.monotonic() < self._look_at_s:
            return
        self._look_at_s = time.monotonic() + _LOOK_S
        try:
            self._keep()
        except OSError as error:
            if str(error) != self._complained:  # once is enough
                log.info("no more room is kept for when the disk is full: %s", error)
            self._complained = str(error)

    def _keep(self) -> None:
        disk = self._backing.statvfs(b"")
        wanted_bytes = self._backing.lstat(_DATA).st_blocks * 512 + _LEAST_BYTES
        size_bytes = min(wanted_bytes, _MOST_BYTES, disk.f_blocks * disk.f_frsize // _SHARE)
        kept_bytes = self._kept_bytes()
        # Where there is little left, apps would meet a full disk for as long as it takes to fail.
        if kept_bytes >= size_bytes // 2 or disk.f_bavail * disk.f_frsize < 2 * size_bytes:
            return
        fd = self._backing.open(RESERVE, os.O_WRONLY | os.O_CREAT)
        try:
            self._backing.fallocate(fd, 0, 0, size_bytes)
        except OSError:
            if not kept_bytes:
                self._remove()
            raise
        finally:
            os.close(fd)

    def give(self) -> bool:
        """Free what is kept. False where nothing is."""
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
