"""What apps did to names and attributes, noted in order while they do it, and carried to the index later.

Requests append (a few hundred nanoseconds); the settler drains and applies. Lost in a crash, and then not needed:
`reconcile` walks the tree. Entries of one inode are applied before any file settled after them, so that an inode number
that is used again never takes over the record of its predecessor.
"""

import os
import stat
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from .backing import Backing
from .index import Batch
from .model import ROOT, UNKNOWN_PATH, ContentKey, FileRecord, FileState, Ino, Link, Stamp


@dataclass(frozen=True, slots=True)
class Named:
    """A regular file got a name: as a link, and as the path it was at the time."""

    ino: Ino
    link: Link
    path: bytes


@dataclass(frozen=True, slots=True)
class Unnamed:
    """It lost one; its last, if `gone`."""

    ino: Ino
    link: Link
    gone: bool


@dataclass(frozen=True, slots=True)
class DirectoryNamed:
    """A directory was renamed, or (None) removed."""

    ino: Ino
    link: Link | None


@dataclass(frozen=True, slots=True)
class Touched:
    """Attributes changed, the content did not."""

    ino: Ino
    path: bytes
    sets_times: bool = False  # the modification time is one of them


@dataclass(frozen=True, slots=True)
class Shared:
    """What is at a path came to share its bytes with others; in the place of another inode, if one was `replaced`.

    Noted inside the exclusive gate: before whatever anybody does to that path afterwards, and after whatever was done
    to the inode number that it has now.
    """

    st: os.stat_result
    link: Link
    path: bytes
    state: FileState
    content: ContentKey
    replaced: Ino | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A scan met this inode under this path."""

    ino: Ino
    path: bytes


@dataclass(frozen=True, slots=True)
class Restored:
    """A reference was made plain, and is to stay so: its content is known, it is not to be settled again. Noted inside
    the exclusive gate, as above."""

    st: os.stat_result
    content: ContentKey


Entry = Found | Restored | Named | Unnamed | DirectoryNamed | Touched | Shared


class Journal:
    """The entries not applied yet. Whoever owns the queue of files holds its lock around `append` and `drain`."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self.appended = 0

    def append(self, entry: Entry) -> None:
        self._entries.append(entry)
        self.appended += 1

    def drain(self) -> deque[Entry]:
        entries, self._entries = self._entries, deque()
        return entries

    def takes_away(self) -> bool:
        """Whether an inode lost its last name."""
        return any(isinstance(entry, Unnamed) and entry.gone for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Recording:
    """Writes what is known of files into a batch."""

    def __init__(
        self,
        backing: Backing,
        is_pending: Callable[[Ino], bool],
        offer: Callable[[Ino, bytes], None],
        on_replaced: Callable[[bytes], None],
        is_complete: Callable[[], bool],
    ) -> None:
        """`is_pending`: whether a file is queued or being written; `offer`: have one looked at; `on_replaced` is called
        with each path that got another inode; `is_complete`: whether a walk has held every record against its file."""
        self._backing, self._on_replaced = backing, on_replaced
        self._is_pending, self._offer = is_pending, offer
        self._is_complete = is_complete
        self._untouched: set[Ino] = set()
        # By more than the ctime. An entry that is still to come may say why, as when an app sets times; or somebody
        # wrote who goes around the mount, and nothing must make the record look true.
        self._unlike: set[Ino] = set()

    def apply(self, batch: Batch, entry: Entry) -> None:
        match entry:
            case Named(ino, link, path):
                batch.put_link(ino, link)
                self._add_name(batch, ino, path)
                if batch.file(ino) is None and not self._is_pending(ino):
                    self._offer(ino, path)  # moved under the eyes of a scan that had not come to it
                self._retouch(batch, ino)
            case Unnamed(ino, _, gone=True):
                self.forget(batch, ino)
            case Unnamed(ino, link):
                batch.remove_link(ino, link)
                self._retouch(batch, ino)
            case DirectoryNamed(ino, None):
                batch.forget_directory(ino)
            case DirectoryNamed(ino, link) if link is not None:
                batch.put_directory(ino, link)
            case Touched(ino, path, sets_times):
                self._retouch(batch, ino, path, sets_times=sets_times)
            case Found(ino, path):
                self._add_name(batch, ino, path)
            case Restored(st, content):
                batch.put_file(Ino(st.st_ino), FileRecord(Stamp.of(st), FileState.PLAIN, content))
            case Shared(st, link, path, state, content, replaced):
                self.put(batch, link, path, st, state, content)
                if replaced is not None:
                    batch.forget_file(replaced)
                    self._on_replaced(path)

    def put(
        self,
        batch: Batch,
        link: Link,
        path: bytes,
        st: os.stat_result,
        state: FileState,
        content: ContentKey,
    ) -> None:
        """Record a settled file, which was `link` when it was at `path`: a directory above may have been renamed since,
        which changes the path and not the link."""
        ino = Ino(st.st_ino)
        batch.put_file(ino, FileRecord(Stamp.of(st), state, content))
        batch.put_link(ino, link)
        if link.parent in batch.learned:
            return  # by the file before, as a rule
        with suppress(OSError):
            if self.learn_directory(batch, path.rpartition(b"/")[0]) == link.parent:
                batch.learned.add(link.parent)

    def _add_name(self, batch: Batch, ino: Ino, path: bytes) -> None:
        directory, _, name = path.rpartition(b"/")
        try:
            st = self._backing.lstat(path)
            if st.st_ino != ino:
                return
            if stat.S_ISDIR(st.st_mode):
                self.learn_directory(batch, path)
            else:
                batch.put_link(ino, Link(self.learn_directory(batch, directory), name))
        except OSError:
            return  # renamed meanwhile; the journal says to where

    def learn_directory(self, batch: Batch, path: bytes) -> Ino:
        """Record the directories on the way to `path`, and answer its inode. Raises OSError."""
        if path == ROOT:
            return self._backing.root_ino
        ino = Ino(self._backing.lstat(path).st_ino)
        parent, _, name = path.rpartition(b"/")
        link = Link(self.learn_directory(batch, parent), name)
        if batch.directory(ino) != link:
            batch.put_directory(ino, link)
        return ino

    def forget(self, batch: Batch, ino: Ino) -> None:
        """An inode is gone, unless its number is that of another file by now, which is then recorded, or pending."""
        if any(
            st.st_ino == ino and stat.S_ISREG(st.st_mode)
            for st in self._stats(batch.paths(ino, self._backing.root_ino))
        ):
            return
        batch.forget_file(ino)

    def _retouch(self, batch: Batch, ino: Ino, path: bytes | None = None, *, sets_times: bool = False) -> None:
        """Renaming, linking and chmod change an inode's ctime: let the record follow, or it would look modified."""
        record = batch.file(ino)
        if record is None:
            return
        if not self._is_complete():
            # It may have been written before a crash, and queued: what shows that is the stamp.
            if not self._is_pending(ino):
                self._offer(ino, path if path is not None else UNKNOWN_PATH)
            return
        for st in self._stats([path] if path is not None else batch.paths(ino, self._backing.root_ino)):
            if st.st_ino == ino:
                # Asked after the look: a writer who came before it is seen, one who comes later changes the stamp
                # again.
                if self._is_pending(ino):
                    return
                now = Stamp.of(st)
                times = now if sets_times else record.stamp
                if now == record.stamp._replace(mtime_ns=times.mtime_ns, ctime_ns=now.ctime_ns):
                    batch.put_file(ino, record._replace(stamp=now))
                else:
                    self._unlike.add(ino)
                return
        self._untouched.add(ino)

    def catch_up(self, batch: Batch) -> None:
        """Look again for files that were not where the journal had come to: a directory above them was moved later. If
        it is being moved just now, nobody has said so yet: then settling looks for them, which waits for that."""
        untouched, self._untouched, self._unlike = self._untouched | self._unlike, set(), set()
        for ino in untouched:
            self._retouch(batch, ino)
        untouched, self._untouched, self._unlike = self._untouched | self._unlike, set(), set()
        for ino in untouched:
            self._offer(ino, UNKNOWN_PATH)

    def _stats(self, paths: list[bytes]) -> list[os.stat_result]:
        found = []
        for path in paths:
            try:
                found.append(self._backing.lstat(path))
            except OSError:
                continue
        return found
