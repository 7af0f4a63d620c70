"""Files that were unlinked while an app had them open: `.dedupfs/orphans/`, until the last handle goes.

libfuse does not unlink an open file: it renames it to a name of its own making and unlinks that after the release. We
move it here instead, so that the tree does not show it. And we remove it ourselves with its last handle: libfuse cannot
name it any more when its directory went as well, and when the unlink comes between our release and libfuse's count of
it, nobody would. What libfuse still asks about such a name then is answered as for a file that is gone.
"""

import logging
import os
import threading

from .backing import Backing
from .journal import Unnamed
from .model import Ino, Link
from .openfiles import Key, OpenFiles
from .settle import Settler
from .store import ORPHANS, set_aside

log = logging.getLogger(__name__)


class Orphans:
    """By the name libfuse gave them, which is unique in a mount. Any thread."""

    def __init__(self, backing: Backing, openfiles: OpenFiles, settler: Settler) -> None:
        self._backing, self._openfiles, self._settler = backing, openfiles, settler
        self._lock = threading.Lock()
        self._keys: dict[bytes, Key] = {}
        self._parents: dict[bytes, Key] = {}  # the directories they were in
        self._put_back: dict[bytes, Key] = {}  # likewise, of those that libfuse goes on calling by the name

    def sweep(self) -> None:
        """Remove what a crash left, or what could not be removed: only while nothing is served, and nothing open."""
        for entry in list(self._backing.scandir(ORPHANS)):
            path = ORPHANS + b"/" + os.fsencode(entry.name)
            if entry.name.startswith(".fuse_hidden") and not entry.is_dir(follow_symlinks=False):
                self._unlink(path, Key(self._backing.device, Ino(entry.inode())))
            else:
                set_aside(self._backing, path)

    def path(self, path: bytes) -> bytes | None:
        """Where the orphan is that libfuse calls by this path, None when there is none. In another directory the name
        is somebody else's."""
        if not self._parents:
            return None
        name = path.rpartition(b"/")[2]
        return ORPHANS + b"/" + name if self._is_in(path, self._parents.get(name)) else None

    def named(self, name: bytes) -> bytes | None:
        """The same by libfuse's name alone."""
        return ORPHANS + b"/" + name if name in self._keys else None

    def _is_in(self, path: bytes, parent: Key | None) -> bool:
        if parent is None:
            return False
        try:
            return Key.of(self._backing.lstat(path.rpartition(b"/")[0])) == parent
        except FileNotFoundError:
            return True  # the directory went as well: nobody else has a name in it

    def put_back(self, name: bytes, parent: Key) -> None:
        """It has a path again, in that directory, by which the kernel knows it; libfuse still by this name."""
        self._put_back[name] = parent

    def was_put_back(self, path: bytes) -> bool:
        """Whether libfuse calls a file so that has its path again."""
        return bool(self._put_back) and self._is_in(path, self._put_back.get(path.rpartition(b"/")[2]))

    def is_stale(self, path: bytes) -> bool:
        """Likewise, of one that is not open any more: the kernel is to look its name up anew."""
        return self.was_put_back(path) and path.rpartition(b"/")[2] not in self._keys

    def count(self, key: Key) -> int:
        """How many orphans have this inode: names of it that nobody sees."""
        with self._lock:
            return sum(of == key for of in self._keys.values()) if self._keys else 0

    def take_in(self, path: bytes, name: bytes, st: os.stat_result) -> None:
        """Move an unlinked file here. The caller is inside the gate."""
        parent = Key.of(self._backing.lstat(path.rpartition(b"/")[0]))
        self._backing.rename(path, ORPHANS + b"/" + name)
        with self._lock:
            self._parents[name] = parent
            self._keys[name] = Key.of(st)

    def unlinked(self, name: bytes) -> None:
        """An orphan was removed by its name."""
        with self._lock:
            self._keys.pop(name, None)
            self._parents.pop(name, None)

    def let_go(self, key: Key) -> None:
        """Remove the orphans with this inode, unless it is open. Called after every release that may have been the
        last, and after `take_in`: whichever of the two comes second finds the other done."""
        if not self._keys or self._openfiles.get(key) is not None:
            return
        with self._lock:
            names = [name for name, of in self._keys.items() if of == key]
            for name in names:
                try:
                    self._unlink(ORPHANS + b"/" + name, key)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    log.warning("an unlinked file cannot be removed; the next stop tries again: %s", error)
                    continue
                del self._keys[name]
                self._parents.pop(name, None)

    def _unlink(self, path: bytes, key: Key) -> None:
        fd = self._backing.open(path, os.O_PATH)
        try:
            self._backing.unlink(path)
            self._settler.note(Unnamed(key.ino, Link(Ino(0), b"?"), gone=os.fstat(fd).st_nlink == 0))
        finally:
            os.close(fd)
