"""The names of hard-linked files that the kernel may have cached something under.

libfuse's high-level API, and with it the kernel, takes each name of an inode for another file. Whoever changes an inode
through one name (`fusefs`) asks here for the others, and invalidates them.
"""

import os
import stat
import threading

from .openfiles import Handle, Key, OpenFiles


class OtherNames:
    """Names by inode, and of each open file the one by which the kernel knows it (`Handle.known_as`). Any thread."""

    def __init__(self, openfiles: OpenFiles) -> None:
        self._lock = threading.Lock()
        self._openfiles = openfiles
        self._names: dict[Key, set[bytes]] = {}

    def __bool__(self) -> bool:
        return bool(self._names)

    def seen(self, st: os.stat_result, path: bytes) -> None:
        with self._lock:
            self._names.setdefault(Key.of(st), set()).add(path)

    def of(self, key: Key, path: bytes | None) -> list[bytes]:
        with self._lock:
            return [name for name in self._names.get(key, ()) if name != path]

    def of_written(self, handle: Handle) -> list[bytes]:
        with self._lock:
            return [name for name in self._names.get(handle.inode.key, ()) if name != handle.known_as]

    def gone(self, st: os.stat_result, path: bytes) -> list[bytes]:
        """An inode lost a name; `st` is from afterwards. Answers its other names."""
        with self._lock:
            names = self._names.get(Key.of(st), set())
            names.discard(path)
            if st.st_nlink <= 1:  # the last name has no others, and a number that is used again inherits none
                self._names.pop(Key.of(st), None)
            return list(names)

    def moved(self, st: os.stat_result, old: bytes, new: bytes) -> None:
        """A file or directory was renamed."""
        with self._lock:
            self._move(st, {old: new})

    def exchanged(self, st: os.stat_result, other: os.stat_result, old: bytes, new: bytes) -> None:
        """`st` is at `new` now, and `other` at `old`."""
        with self._lock:
            whole = other if stat.S_ISDIR(other.st_mode) else st
            self._move(whole, {old: new, new: old})
            if not stat.S_ISDIR(whole.st_mode):
                self._move(other, {new: old})

    def _move(self, st: os.stat_result, moves: dict[bytes, bytes]) -> None:
        if stat.S_ISDIR(st.st_mode):
            changed, handles = list(self._names.values()), self._openfiles.handles()
        else:
            changed, handles = [self._names.get(Key.of(st), set())], self._openfiles.handles_of(Key.of(st))
        for names in changed:
            moved = {path_after(name, moves) for name in names}
            names.clear()
            names.update(moved)
        for handle in handles:
            handle.known_as = path_after(handle.known_as, moves)


def path_after(path: bytes, moves: dict[bytes, bytes]) -> bytes:
    """Where a path leads after these renames of it or of a directory that it is in."""
    for old, new in moves.items():
        if path == old or path.startswith(old + b"/"):
            return new + path[len(old) :]
    return path
