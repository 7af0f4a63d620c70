"""Which files apps have open, by inode, and the two locks that keep a change of state apart from them.

`Gate` orders the tree: whoever changes a name or an attribute, or opens a file, passes it *shared*; whoever puts
another inode behind a path passes it *exclusively*, for microseconds. Inside, what was looked up stays true.

`OpenFiles` orders one file: the settler `watch`es a file while it hashes, compares and shares it; who wants to write
announces that first, which tells the watcher to give up, and waits until it has. Nobody waits for a watch inside the
gate, and nobody enters the gate while holding an `OpenInode.lock`.

Descriptors: a handle's `own_fd` is the inode at the path (attributes, writes, fsync); `read_fd` is where its bytes are:
the same descriptor for a plain file, the blob's for a reference. It is one attribute, so that a reader who takes it
once reads one or the other, never a mixture. Descriptors that went out of use are closed with the inode's last handle,
since a reader may hold their number.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from .digest import StreamDigest
from .errors import DedupfsError
from .model import ContentKey, Ino, Reference, Stamp

_TICK_NS = 10**9
_UNANNOUNCED_S = 0.3
RELEASE_S = 2.0  # how long a close() may take to reach us


class Key(NamedTuple):
    """An inode of the source tree."""

    device: int
    ino: Ino

    @classmethod
    def of(cls, st: os.stat_result) -> "Key":
        return cls(st.st_dev, Ino(st.st_ino))


class InUse(DedupfsError):
    """An app has the file open in a way that forbids what was asked; it is done when the file is closed."""


class GivenUp(DedupfsError):
    """The watcher was told to let go of the file: somebody wants to write to it."""


class _SharedPass:
    """What `with gate.shared():` enters; one serves all, since it holds nothing of its own."""

    __slots__ = ("_gate",)

    def __init__(self, gate: "Gate") -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._gate.enter_shared()

    def __exit__(self, *_: object) -> None:
        self._gate.leave_shared()


class Gate:
    """Many may pass shared, or one exclusively; who waits for the latter is not overtaken. Not re-entrant."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._shared = 0
        self._exclusive = False
        self._waiting = 0
        self._shared_pass = _SharedPass(self)

    def shared(self) -> _SharedPass:
        return self._shared_pass

    def enter_shared(self) -> None:
        with self._lock:
            while self._exclusive or self._waiting:
                self._condition.wait()
            self._shared += 1

    def leave_shared(self) -> None:
        with self._lock:
            self._shared -= 1
            if not self._shared and self._waiting:
                self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._lock:
            self._waiting += 1
            while self._exclusive or self._shared:
                self._condition.wait()
            self._waiting -= 1
            self._exclusive = True
        try:
            yield
        finally:
            with self._lock:
                self._exclusive = False
                self._condition.notify_all()


@dataclass(slots=True)
class BackingFile:
    """The file that the kernel reads and writes for an open inode (see `passthrough`): its id, and whose bytes it has,
    a blob's or (None) the inode's own."""

    id: int
    content: ContentKey | None


@dataclass(slots=True, eq=False)
class OpenInode:
    """An inode with at least one handle. `lock` is held while its content or its state changes."""

    key: Key
    handles: "set[Handle]" = field(default_factory=set)
    writers: int = 0
    dirty: bool = False  # content may differ from what the index says
    resettle: bool = False  # settling wanted to share it, and could not while it was open
    loaded: bool = False  # it is known whether this is a reference
    reference: Reference | None = None
    content_fd: int = -1  # the blob's descriptor while `reference` is set
    stream: StreamDigest | None = None  # digest of what is being written from start to end
    privileges_checked: bool = False  # the set-id bits and capabilities that a write must clear are gone
    backing_file: BackingFile | None = None
    through_us: bool = False  # a handle goes through us with the kernel's page cache: all must
    before: Stamp | None = None  # as it was when the first came who writes unseen, and nothing else made it dirty
    retired_fds: list[int] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def become_reference(self, reference: Reference, content_fd: int) -> None:
        """All bytes are in the blob from now on. Caller holds `lock`."""
        if self.content_fd >= 0:
            self.retired_fds.append(self.content_fd)
        self.loaded, self.reference, self.content_fd = True, reference, content_fd
        self._redirect()

    def become_plain(self) -> None:
        """All bytes are in the inode itself from now on. Caller holds `lock`."""
        self.loaded, self.reference = True, None
        self._redirect()

    def written_unseen(self, handle: "Handle") -> None:
        """What this handle reads and writes we do not see. Caller holds `lock`, before the open is answered."""
        if handle.writes:
            self.stream = None
            if not self.dirty:
                st = os.fstat(handle.own_fd)
                # A time stamp of just now may be that of a later write as well: filesystems tick in milliseconds.
                self.before = Stamp.of(st) if st.st_ctime_ns < time.time_ns() - _TICK_NS else None
                self.dirty = True

    def forget_if_unchanged(self, own_fd: int) -> None:
        """Before the release of a writer: a file that was opened for writing and not written to needs no settling."""
        with self.lock:
            if self.before is not None and self.writers == 1 and Stamp.of(os.fstat(own_fd)) == self.before:
                self.dirty, self.before = False, None

    def begin_stream(self) -> None:
        """The file is empty: what is written from now on can be hashed on the way, if all of it comes to us."""
        self.stream = StreamDigest() if self.backing_file is None else None

    def _redirect(self) -> None:
        # A copy: handles come and go meanwhile, and who comes directs itself, once it has the lock.
        for handle in list(self.handles):
            self.direct(handle)

    def direct(self, handle: "Handle") -> None:
        """Let a handle read where the bytes are. Caller holds `lock`."""
        handle.read_fd = handle.own_fd if self.reference is None else self.content_fd


@dataclass(slots=True, eq=False)
class Handle:
    """One open() of an app."""

    inode: OpenInode
    own_fd: int
    read_fd: int
    writes: bool
    appends: bool
    alone: bool  # when it was opened, the inode had no other name
    pid: int = 0
    known_as: bytes = b""  # the name that the kernel has for the file, where it may have several
    may_be_mapped: bool = False  # to write to: it was opened to read and write
    through_us: bool = False  # its I/O must not go past us
    was_read: bool = False
    silent: bool = False  # we hear of its release only, not of the close() before it
    flushed: bool = False  # a writer's close() was seen: its release is on the way, if that was no duplicate
    outlasted: bool = False  # somebody waited for its release in vain, since the last close() that was seen


@dataclass(slots=True, eq=False)
class Watch:
    """The settler's hold on a file that it looks at. `given_up` becomes true, once, when somebody wants to write."""

    key: Key
    given_up: bool = False

    def checkpoint(self) -> None:
        if self.given_up:
            raise GivenUp("a writer came")


class OpenFiles:
    """The table of open inodes."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._inodes: dict[Key, OpenInode] = {}
        self._watches: dict[Key, Watch] = {}
        self._intents: dict[Key, int] = {}
        # What each process opened last, while that is a reader.
        self._last_read: dict[int, Handle] = {}
        # Called for what the kernel need not have any more; set by who gave it to the kernel.
        self.close_backing_file: Callable[[BackingFile], None] = _nothing

    # -- apps ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def writing_intent(self, key: Key) -> Iterator[None]:
        """Announce a writer: on entry nobody watches the file, and until exit nobody begins to."""
        with self._condition:
            self._intents[key] = self._intents.get(key, 0) + 1
            while (watch := self._watches.get(key)) is not None:
                watch.given_up = True
                self._condition.wait()
        try:
            yield
        finally:
            with self._condition:
                self._intents[key] -= 1
                if not self._intents[key]:
                    del self._intents[key]

    def register(
        self,
        key: Key,
        own_fd: int,
        *,
        writes: bool,
        appends: bool = False,
        alone: bool = True,
        pid: int = 0,
        empty: bool = False,
    ) -> Handle:
        """Enter a handle; the caller is inside the gate, so that `own_fd` is what the path leads to, and directs the
        handle to its bytes before it is used. `alone`: the inode has no other name; `empty`: it is new, or is about to
        be truncated."""
        with self._condition:
            inode = self._inodes.get(key)
            if inode is None:
                inode = self._inodes[key] = OpenInode(key)
            handle = Handle(inode, own_fd, own_fd, writes, appends, alone, pid)
            inode.handles.add(handle)
            inode.writers += writes
            if writes:
                # Who opens one file to read and then a new one to write is about to copy: if that goes through us, no
                # byte need be moved (copy_file_range).
                handle.through_us = self._last_read.pop(pid, None) is not None and empty
            else:
                self._last_read[pid] = handle
            return handle

    def release(self, handle: Handle, settle: Callable[[], None]) -> None:
        """Leave a handle and close its descriptor.

        Calls `settle` if the file is to be settled now: its last writer left, or its last reader whom sharing waited
        for. It is called under the lock of the table, so that nobody finds the file neither open nor pending.
        """
        inode = handle.inode
        with self._condition:
            unused = [handle.own_fd]
            inode.handles.discard(handle)
            inode.writers -= handle.writes
            wanted = False
            # Also after a writer who wrote nothing, if settling came meanwhile and could not: readers may stay long.
            if not inode.writers and (inode.dirty or (inode.resettle and handle.writes)):
                inode.dirty, inode.before, wanted = False, None, True
            if not inode.handles:
                wanted = wanted or inode.resettle
                if self._inodes.get(inode.key) is inode:
                    del self._inodes[inode.key]
                unused += inode.retired_fds + ([inode.content_fd] if inode.content_fd >= 0 else [])
                if inode.backing_file is not None:
                    self.close_backing_file(inode.backing_file)
            if self._last_read.get(handle.pid) is handle:
                del self._last_read[handle.pid]
            try:
                if wanted:
                    settle()
            finally:
                self._condition.notify_all()
                for fd in unused:
                    os.close(fd)

    # -- settling -----------------------------------------------------------------------------------------------------

    @contextmanager
    def watch(self, key: Key) -> Iterator[Watch]:
        """Look at a closed file, or one open for reading. Raises InUse when somebody writes to it or is about to."""
        with self._condition:
            inode = self._inodes.get(key)
            if key in self._watches or key in self._intents or (inode is not None and (inode.writers or inode.dirty)):
                raise InUse("open for writing")
            watch = self._watches[key] = Watch(key)
        try:
            yield watch
        finally:
            with self._condition:
                del self._watches[key]
                self._condition.notify_all()

    def give_up_all(self) -> None:
        """Tell every watcher to let go: the settler is to stop."""
        with self._condition:
            for watch in self._watches.values():
                watch.given_up = True

    def get(self, key: Key) -> OpenInode | None:
        with self._condition:
            return self._inodes.get(key)

    def settle_when_closed(self, key: Key) -> bool:
        """Ask for another settling at the last release. False when the file is not open any more."""
        with self._condition:
            inode = self._inodes.get(key)
            if inode is None:
                return False
            inode.resettle = True
            return True

    def is_passed_through(self, key: Key) -> bool:
        with self._condition:
            inode = self._inodes.get(key)
            return inode is not None and inode.backing_file is not None

    def follow(self, key: Key, to: Key, reference: Reference, own_fds: list[int]) -> None:
        """A file that is open for reading became a blob, and its path leads to a reference, `to`.

        Readers go on reading the inode they have; what else they do is done to the reference, through `own_fds`: the
        first is open on the blob, the others on the reference, at least as many as there are handles. Raises nothing:
        an inode at a reference that does not know that it is one would read zeros, and be written to. Caller passes the
        gate exclusively.
        """
        inode = self.get(key)
        if inode is not None:
            with inode.lock, self._condition:
                if self._inodes.pop(key, None) is inode:
                    inode.key = to
                    self._inodes[to] = inode
                    for handle in inode.handles:
                        inode.retired_fds.append(handle.own_fd)
                        handle.own_fd = own_fds.pop()
                    inode.become_reference(reference, own_fds.pop(0))
                    if inode.backing_file is not None:
                        inode.backing_file.content = reference.content  # it is the inode that became the blob
        for fd in own_fds:
            os.close(fd)

    def uses(self, content: ContentKey) -> bool:
        """Whether an open file reads from this blob, or may be about to: it is not known yet what it is."""
        with self._condition:
            return any(
                not inode.loaded or (inode.reference is not None and inode.reference.content == content)
                for inode in self._inodes.values()
            )

    def is_written(self, key: Key) -> bool:
        with self._condition:
            inode = self._inodes.get(key)
            return inode is not None and bool(inode.writers or inode.dirty)

    def wait_until_closed(self, key: Key | None, timeout_s: float) -> bool:
        """Wait until what apps have closed is released: the kernel tells of that just after close() returned.

        With a key, for that file, else for all; only for files that are to be settled at their release. Of the close of
        some writers we hear beforehand. The others, and readers, may have closed or not, and are not waited for as
        long. False when a release did not come, since the file is open in another process as well.
        """

        def waiting(*, announced: bool) -> list[OpenInode]:
            inodes = self._inodes.values() if key is None else filter(None, [self._inodes.get(key)])
            return [
                inode
                for inode in inodes
                if (inode.dirty or inode.resettle)
                and (inode.writers or not announced)
                and all(
                    handle.flushed or (handle.silent and not announced) for handle in inode.handles if handle.writes
                )
            ]

        with self._condition:
            self._condition.wait_for(lambda: not waiting(announced=True), timeout_s)
            return self._condition.wait_for(lambda: not waiting(announced=False), min(timeout_s, _UNANNOUNCED_S))

    def wait_for_releases(self, timeout_s: float) -> None:
        """Wait until writers that seem to have closed, of whatever file, are released; for each of them once, so that a
        file that stays open (a duplicate of its descriptor was closed, or we hear nothing of a close) costs one who
        asks a moment, and not everybody."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            writers = [
                handle
                for inode in self._inodes.values()
                if inode.dirty
                for handle in inode.handles
                if handle.writes and (handle.flushed or handle.silent) and not handle.outlasted
            ]

            def left() -> list[Handle]:
                return [handle for handle in writers if handle in handle.inode.handles]

            self._condition.wait_for(lambda: not left(), min(timeout_s, _UNANNOUNCED_S))
            self._condition.wait_for(
                lambda: not any(handle.flushed for handle in left()), max(deadline - time.monotonic(), 0.0)
            )
            for handle in left():
                handle.outlasted = True

    def handles_of(self, key: Key) -> list[Handle]:
        with self._condition:
            inode = self._inodes.get(key)
            return [] if inode is None else list(inode.handles)

    def handles(self) -> list[Handle]:
        with self._condition:
            return [handle for inode in self._inodes.values() for handle in inode.handles]

    def __len__(self) -> int:
        with self._condition:
            return len(self._inodes)


def _nothing(backing_file: BackingFile) -> None:
    """No file was given to the kernel."""
