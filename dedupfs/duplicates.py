"""What scripts and people may ask about duplicates: the xattrs of a file, and groups for the command line.

Answers come from the index and are checked against the tree before they are given: a path is named only if it leads to
the inode that the index means, unchanged. Who asks through the mount learns only of files that they could have listed
and read themselves.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from .asking import AsCaller
from .backing import Backing
from .index import Index
from .model import Caller, ContentKey, FileRecord, Ino, Learned, Stamp
from .openfiles import Key
from .settle import Settler

# XATTR_SIZE_MAX: the kernel takes no longer value.
LONGEST_ANSWER_BYTES = 65536

# How long an app that asks about a pending file is kept waiting before it is told that there is no answer.
_PATIENCE_S = 60.0
_FEW = 256  # files that it also waits for, and pictures
# Who waits for others keeps one of the threads that serve requests: half of these at most, whatever asks.
_MOST_PATIENT = 32


def _nothing_more(most: int, timeout_s: float) -> None:
    """There is nothing more to wait for."""


@dataclass(frozen=True, slots=True)
class Group:
    """One content and every path that has it."""

    content: ContentKey
    size_bytes: int
    paths: list[bytes]


class Answers:
    """Looks things up; any thread."""

    def __init__(self, backing: Backing, index: Index, settler: Settler, as_caller: AsCaller) -> None:
        self._backing, self._index = backing, index
        self._settler, self._as_caller = settler, as_caller
        self._patient = threading.Semaphore(_MOST_PATIENT)

    def xattr(self, path: bytes, name: bytes, caller: Caller) -> bytes:
        """The value of `user.dedupfs.<name>`. Raises ENODATA where there is no answer."""
        if name not in (b"digest", b"state", b"refs", b"duplicates"):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        _ino, record = self.settled(path)
        if name == b"digest":
            return record.content.digest.hex().encode()
        if name == b"state":
            return record.state.word.encode()
        self.wait_for_others()
        if name == b"refs":
            return b"%d" % self.count(record.content)
        others = sorted(found for found in self.everywhere(record.content) if found != path)
        answer = bytearray()
        for found in self._as_caller.readable(others, caller):
            if len(answer) + len(found) + 1 > LONGEST_ANSWER_BYTES:
                break
            answer += found + b"\0"
        return bytes(answer)

    def settled(self, path: bytes) -> tuple[Ino, FileRecord]:
        """What is known of a file, once it is settled. Raises ENODATA when nothing can be said about it."""
        was_open = False
        for _ in range(3):
            st = self._backing.lstat(path)
            key = Key.of(st)
            if not stat.S_ISREG(st.st_mode) or st.st_dev != self._backing.device:
                break
            self._settler.wait_settled(key, _PATIENCE_S)
            st = self._backing.lstat(path)
            if Key.of(st) != key:
                continue  # it became a reference, or was replaced
            record = self._index.file(key.ino)
            if record is not None and record.stamp == Stamp.of(st):
                return key.ino, record
            if self._settler.is_pending(key.ino):
                # An app has it open for writing; or its release is on the way, and now we shall hear of that.
                if was_open:
                    break
                was_open = True
                continue
            self._settler.offer(key.ino, path)  # changed behind our back, or not scanned yet
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    def wait_for_others(self, also: Callable[[int, float], None] = _nothing_more) -> None:
        """Wait until other files that were closed by now are settled, and for `also` in what time is left: who asks
        what there is beside a file means those as well. But nobody waits for an archive. No lock may be held."""
        if not self._patient.acquire(blocking=False):
            return
        try:
            deadline = time.monotonic() + _PATIENCE_S
            self._settler.wait_for_few(_FEW, _PATIENCE_S)
            also(_FEW, deadline - time.monotonic())
        finally:
            self._patient.release()

    def paths(self, content: ContentKey) -> list[bytes]:
        """Every path of the tree with this content, not with other copies of the same bytes."""
        return list(self.iter_paths(content))

    def iter_paths(self, content: ContentKey) -> Iterator[bytes]:
        """The same, one after the other: for who needs the first few of perhaps a hundred thousand."""
        return self._paths(self._index.iter_holders(content))

    def everywhere(self, content: ContentKey) -> Iterator[bytes]:
        """Every path with these bytes, one after the other."""
        return (path for copy in self._index.copies(content) for path in self.iter_paths(copy))

    def _paths(self, inodes: Iterable[Ino]) -> Iterator[bytes]:
        for ino in inodes:
            record = self._index.file(ino)
            for path in self._index.paths(ino, self._backing.root_ino) if record is not None else []:
                try:
                    st = self._backing.lstat(path)
                except OSError:
                    continue
                if st.st_ino == ino and record is not None and Stamp.of(st) == record.stamp:
                    yield path

    def path_of(self, learned: Learned, timeout_s: float) -> bytes | None:
        """Where a file that was settled is now; None when it is gone, or has another content since."""
        paths = [learned.path]
        for attempt in range(2):
            for path in paths:
                with suppress(OSError):
                    st = self._backing.lstat(path)
                    record = self._index.file(learned.ino)
                    if st.st_ino == learned.ino and record is not None and record.content == learned.content:
                        return path
            if not attempt and self._settler.wait_noted(timeout_s):
                paths = self._index.paths(learned.ino, self._backing.root_ino)
        return None

    def count(self, content: ContentKey) -> int:
        """How many files (inodes) are known to have this content."""
        return sum(self._index.count_holders(copy) for copy in self._index.copies(content))

    def group(self, path: bytes) -> Group:
        _, record = self.settled(path)
        self.wait_for_others()
        return Group(record.content, record.stamp.size_bytes, sorted(self.everywhere(record.content)))

    def groups(self) -> Iterator[Group]:
        """Every content that more than one path has, in short transactions."""
        self.wait_for_others()
        position = b""
        while True:
            found, position = self._index.all_duplicates(position, 200)
            for content, inodes in found:
                record = self._index.file(inodes[0])
                paths = sorted(self._paths(inodes))
                if record is not None and len(paths) > 1:
                    yield Group(content, record.stamp.size_bytes, paths)
            if not position:
                return
