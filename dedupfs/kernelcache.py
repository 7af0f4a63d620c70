"""Which pages of a file the kernel may keep from one open to the next.

The kernel would drop a file's pages whenever it hears of another modification time (FUSE_AUTO_INVAL_DATA), and that
loses writes. What an app writes to a page that the kernel has is put into the page and then sent to us, the page free
meanwhile (fuse_perform_write in Linux's fs/fuse/file.c). Dropped in between, and read again for somebody else, it comes
back with what was there before the write, and stays; a change of it through mmap then brings the old bytes to the disk.
So `fusefs` turns that off, and no page of a file is dropped while it is written by the same name: neither at an open,
which is decided here, nor because another inode came to its path.
"""

import os
import threading

from .hardlinks import path_after
from .openfiles import Handle, OpenFiles

# Of so many files it is known that the pages are right; of others they are read again at the next open.
_MOST_FILES = 1 << 16


class KernelPages:
    """By path, the size and the modification time (ns) of each file when the kernel's pages of it were last right. Any
    thread."""

    def __init__(self, openfiles: OpenFiles) -> None:
        self._openfiles = openfiles
        self._lock = threading.Lock()
        self._versions: dict[bytes, tuple[int, int]] = {}  # what was entered last is last

    def may_stay(self, handle: Handle) -> bool:
        """Whether the open of `handle` leaves the pages alone: the file was not changed in another way than by this
        name (by another one, past the mount), or else is being written by it."""
        return self._enter(handle) or any(
            other.writes and other is not handle and other.known_as == handle.known_as
            for other in self._openfiles.handles_of(handle.inode.key)
        )

    def written(self, handle: Handle) -> None:
        """All that was written through `handle` is in the file."""
        self._enter(handle)

    def forget(self, path: bytes) -> None:
        """Another file is to be at the path, or none; or what is read and written there goes past the pages."""
        with self._lock:
            self._versions.pop(path, None)

    def moved(self, moves: dict[bytes, bytes], *, is_directory: bool) -> None:
        """A file was renamed, or a directory and whatever is in it, and the pages with it: from old path to new; two
        that changed places are both in it."""
        with self._lock:
            for replaced in set(moves.values()) - moves.keys():
                self._versions.pop(replaced, None)
            paths = moves.keys() & self._versions.keys()
            if is_directory:
                inside = tuple(old + b"/" for old in moves)
                paths |= {path for path in self._versions if path.startswith(inside)}
            versions = {path: self._versions.pop(path) for path in paths}
            self._versions.update((path_after(path, moves), version) for path, version in versions.items())

    def _enter(self, handle: Handle) -> bool:
        """Whether it was known like that before."""
        st, path = os.fstat(handle.own_fd), handle.known_as
        version = st.st_size, st.st_mtime_ns
        with self._lock:
            before = self._versions.pop(path, None)
            self._versions[path] = version
            if len(self._versions) > _MOST_FILES:
                del self._versions[next(iter(self._versions))]
        return before == version
