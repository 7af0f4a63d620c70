"""Kernel passthrough: for an open file the kernel reads and writes a file of the backing filesystem without asking us.

Since Linux 6.9 (Documentation/filesystems/fuse-passthrough.rst). A *backing id* names a descriptor of ours; the reply
to an open carries it. Owned here: the ids, and which open gets one. Called by `fusefs` after each open, in its threads.

What the kernel asks for (fs/fuse/iomode.c): while one open of an inode is in passthrough, every other open of it must
carry the same id; and while one goes through us with the page cache, none may be in passthrough. So the first handle
decides for its inode until the last one goes, and the id belongs to the `OpenInode`.

An id may come to stand for bytes that are no longer the file's: readers hold the blob's, and a writer materialises the
file. Whoever opens it then gets the same id with FOPEN_DIRECT_IO, which wins for read and write and leads to us. It
does not win for mmap, which shows such a latecomer the blob, and lets him write to it where the immutable flag does not
keep him from it (XFS; ext4 answers with SIGBUS): there a blob is never passed through.
"""

import errno
import fcntl
import logging
import os
import struct
from typing import NamedTuple

from .backing import Backing
from .openfiles import BackingFile, Handle, OpenFiles

log = logging.getLogger(__name__)

# linux/fuse.h: FUSE_DEV_IOC_BACKING_OPEN, _IOW(229, 1, struct fuse_backing_map {int32 fd; uint32 flags; uint64 pad})
_BACKING_OPEN = 0x4010E501
_BACKING_MAP = struct.Struct("=iIQ")
# FUSE_DEV_IOC_BACKING_CLOSE, _IOW(229, 2, uint32)
_BACKING_CLOSE = 0x4004E502

_REASONS = {
    errno.ELOOP: "the source is itself on a stacked filesystem, which the kernel does not pass through to",
    errno.EPERM: "the kernel does not allow it to this process, which lacks CAP_SYS_ADMIN",
    errno.EOPNOTSUPP: "the filesystem of the source cannot be read by the kernel on behalf of another",
}


class Way(NamedTuple):
    """How the I/O of a handle goes: by this backing id (0: through us, with the page cache), or `direct` through us
    beside others that have the id."""

    backing_id: int
    direct: bool


_THROUGH_US = Way(0, direct=False)


class Passthrough:
    """The backing ids of one FUSE session."""

    def __init__(self, session_fd: int, backing: Backing, openfiles: OpenFiles) -> None:
        self._fd, self._backing = session_fd, backing
        self.refused = ""  # why the kernel took the last file that it did not take; "" if it took all
        self._ended = False
        openfiles.close_backing_file = self._close

    def end(self) -> None:
        """The session is over, and its ids with it: what is still open then must not close them by a number that is
        another descriptor's by now."""
        self._ended = True

    def attach(self, handle: Handle) -> Way:
        """Decide how the I/O of a new handle goes. Its open has not been answered. Raises OSError (ETXTBSY)."""
        inode = handle.inode
        with inode.lock:
            content = None if inode.reference is None else inode.reference.content
            backing_file = inode.backing_file
            if backing_file is None:
                if inode.through_us or handle.through_us or (content and not self._is_protected(handle.read_fd)):
                    inode.through_us = True
                    return _THROUGH_US
                try:
                    number = self._open(handle.read_fd)
                except OSError as error:
                    self._refuse(error)
                    inode.through_us = True
                    return _THROUGH_US
                backing_file = inode.backing_file = BackingFile(number, content)
            direct = handle.through_us or backing_file.content != content
            if not direct:
                inode.written_unseen(handle)
            elif handle.writes and backing_file.content and not self._is_protected(inode.content_fd):
                raise OSError(errno.ETXTBSY, "a reader of its blob came before the blob was sealed")
            return Way(backing_file.id, direct)

    def _is_protected(self, blob_fd: int) -> bool:
        return self._backing.immutable_binds_mappings and self._backing.is_immutable(blob_fd)

    def _open(self, fd: int) -> int:
        # With a buffer that may be written to, ioctl's own result is answered: the id.
        number: int = fcntl.ioctl(self._fd, _BACKING_OPEN, bytearray(_BACKING_MAP.pack(fd, 0, 0)))
        return number

    def _close(self, backing_file: BackingFile) -> None:
        if not self._ended:
            fcntl.ioctl(self._fd, _BACKING_CLOSE, struct.pack("=I", backing_file.id))

    def _refuse(self, error: OSError) -> None:
        reason = _REASONS.get(error.errno or 0, f"the kernel refuses: {os.strerror(error.errno or errno.EIO)}")
        if reason != self.refused:
            log.warning("a file is served without passthrough: %s", reason)
            self.refused = reason
