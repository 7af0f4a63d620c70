"""The index against the tree: the first scan of an archive, and what an unclean stop or a detour left behind.

One walk looks at every file (lstat against the record) and offers the settler those that the index does not know as
they are; then records whose file is gone are dropped, and blobs that nothing refers to are handed to be removed. The
mount serves meanwhile. Stopping and starting again costs only the walk: what was settled stays known.

Before the first of these, files that may have a duplicate are settled, large ones of one length together: so that space
is saved first, and so that two equal files are compared while their bytes are in memory.
"""

import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from .backing import Backing
from .blobs import Blobs
from .errors import StoreError
from .index import Index
from .journal import Found, Unnamed
from .model import ROOT, STORE_DIRECTORY, FileState, Ino, Link, Progress, Stamp
from .settle import Settler

log = logging.getLogger(__name__)

# So many files wait at most to be settled while the walk goes on: it bounds the memory.
_MOST_WAITING = 4096
_CHUNK = 500
_SHOWN_UNREADABLE = 200


_Path = bytes  # where a sum is called so

_LENGTHS = 1 << 24  # longer files share a place with shorter ones, and may be taken for repeated
_MOST_SORTED = 20_000  # files that are put in order at a time: it bounds the memory
_LARGE_BYTES = (
    1 << 18
)  # smaller files stay in the order of the walk: to find them on a disk takes longer than to read them


class Stopped(Exception):
    """The scan was told to stop; it goes on where it was when it is started again."""


@dataclass(slots=True)
class Census:
    """What one walk saw. Sizes are lengths."""

    files: int = 0
    directories: int = 0
    bytes: int = 0
    offered: int = 0
    elsewhere: list[_Path] = field(default_factory=list)  # directories that are another filesystem
    unreadable: int = 0
    unreadable_paths: list[tuple[_Path, str]] = field(default_factory=list)  # the first ones, and why

    def refuse(self, path: _Path, error: OSError | StoreError) -> None:
        self.unreadable += 1
        if len(self.unreadable_paths) < _SHOWN_UNREADABLE:
            self.unreadable_paths.append((path, _reason(error)))

    def add_unreadable(self, other: "Census") -> None:
        """What another walk could not look at."""
        self.unreadable += other.unreadable
        self.unreadable_paths += other.unreadable_paths[: _SHOWN_UNREADABLE - len(self.unreadable_paths)]


def _reason(error: OSError | StoreError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def walk(
    backing: Backing,
    census: Census,
    stopping: Callable[[], bool],
    top: bytes = ROOT,
    *,
    device: int | None = None,
) -> Iterator[tuple[bytes, os.stat_result]]:
    """Every directory and regular file below `top` on the source's filesystem (or the one with this device number),
    without the store. Raises Stopped."""
    device = backing.device if device is None else device
    waiting = [top]
    while waiting:
        directory = waiting.pop()
        census.directories += 1
        prefix = directory + b"/" if directory else b""
        try:
            for entry in backing.scandir(directory):
                if stopping():
                    raise Stopped
                path = prefix + os.fsencode(entry.name)
                if path == STORE_DIRECTORY:
                    continue
                try:
                    st = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # removed while we looked
                except OSError as error:
                    census.refuse(path, error)
                    log.warning("cannot look at %s: %s", os.fsdecode(path), error.strerror)
                    continue
                if (st.st_dev, st.st_ino) != (device, entry.inode()):
                    _look_beneath(backing, path, census)  # the directory has another inode there than is seen
                if st.st_dev != device:
                    if stat.S_ISDIR(st.st_mode):
                        census.elsewhere.append(path)
                elif stat.S_ISDIR(st.st_mode):
                    waiting.append(path)
                    yield path, st
                elif stat.S_ISREG(st.st_mode):
                    yield path, st
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            census.refuse(directory, error)
            log.warning("cannot list %s: %s", os.fsdecode(directory), error.strerror)


def _look_beneath(backing: Backing, path: bytes, census: Census) -> None:
    """What is mounted there may hide references, whose blobs are not to be taken for unneeded."""
    try:
        if not backing.is_mount_point(path):
            return
        with backing.without_mounts() as bare:
            problem = "what is mounted there hides references; unmount it" if _needs_blobs(bare, path) else ""
    except FileNotFoundError:
        return  # removed while we looked
    except (OSError, StoreError) as error:
        problem = f"what is mounted there hides what cannot be looked at: {_reason(error)}"
    if problem:
        census.refuse(path, StoreError(problem))
        log.warning("cannot look at %s: %s", os.fsdecode(path), problem)


def refuse_references_elsewhere(backing: Backing, census: Census) -> None:
    """Who moves a reference to another filesystem below the source (mv keeps its xattrs) reads it there through the
    mount, but nobody counts it: for who is about to conclude that a blob is not needed, it is in the way."""
    while census.elsewhere:
        path = census.elsewhere.pop()
        try:
            problem = "holds references, on another filesystem; move them back" if _needs_blobs(backing, path) else ""
        except (OSError, StoreError) as error:
            problem = _reason(error)
        if problem:
            census.refuse(path, StoreError(problem))
            log.warning("cannot look at %s: %s", os.fsdecode(path), problem)


def _needs_blobs(backing: Backing, top: bytes) -> bool:
    """Whether there is a reference to a blob of this store at or below `top`. Raises OSError, StoreError."""
    blobs, census, st = Blobs(backing), Census(), backing.lstat(top)
    below = walk(backing, census, lambda: False, top, device=st.st_dev) if stat.S_ISDIR(st.st_mode) else [(top, st)]
    for path, _ in below:
        try:
            reference = backing.read_reference(path)
        except FileNotFoundError:
            continue
        if reference is not None and blobs.is_needed_by(reference, path):
            return True
    if census.unreadable:
        raise StoreError(census.unreadable_paths[0][1])
    return False


class Reconciler:
    """Runs in a thread of its own beside a mount, or in the caller's without one."""

    def __init__(self, backing: Backing, index: Index, blobs: Blobs, settler: Settler) -> None:
        self._backing, self._index, self._blobs, self._settler = backing, index, blobs, settler

    def run(self, progress: Progress, *, settle: Callable[[], None], stopping: Callable[[], bool]) -> Census:
        """Bring the index in line with the tree. `settle` returns when everything offered is settled.

        Raises Stopped, and StoreError when the index cannot be used.
        """
        with suppress(OSError):
            self._backing.sync()  # of what was there before, no file has to be flushed by itself
        census = Census()
        failures = self._settler.failures
        complete = False
        knew_all, knew_nothing = self._index.is_complete(), not self._index.totals().files
        if not knew_all:
            self._settle_likely_duplicates(census, settle, stopping)
        with self._settler.watching_moves() as take_moved:
            tops = [ROOT]
            while True:
                for top in tops:
                    self._walk_and_look(top, census, progress, settle, stopping)
                progress("looking", census.files, None)
                settle()
                if stopping():
                    raise Stopped
                # What is in a directory that the disk does not give back, or that its owner has closed, is not gone:
                # the blobs of its references are to be there when it is open again.
                if not census.unreadable:
                    self._drop_records_of_missing_files(census, stopping)
                if not knew_all:
                    refuse_references_elsewhere(self._backing, census)
                # Nor are references offered for ever that cannot be settled.
                looked = not census.unreadable and self._settler.failures == failures
                if looked and self._offer_uncounted_references(census, stopping):
                    tops = []
                    continue
                with self._settler.quiet():
                    # What an app moved meanwhile may have gone from where we had not been to where we had.
                    tops = take_moved()
                    if not tops and not self._settler.pending():
                        if not census.unreadable and self._settler.failures == failures:
                            complete = self._settler.declare_complete()
                        break
        if complete:
            self._index.set_complete()
            self._look_at_blobs(to_trash=knew_nothing)
            settle()
        else:
            # What we did not see may be a reference: no blob may be called unreferenced, though the last one that is
            # counted goes.
            self._settler.index_is_complete = False
            self._index.set_incomplete()
            log.warning("the scan could not look at everything; blobs that seem unused are kept")
        progress("settled", census.files, census.files)
        return census

    def _settle_likely_duplicates(
        self, census: Census, settle: Callable[[], None], stopping: Callable[[], bool]
    ) -> None:
        """Those whose length another file has, too. The walk that follows finds them settled."""
        met = bytearray(_LENGTHS)
        for _, st in self._files(stopping):
            place = st.st_size % _LENGTHS
            met[place] = min(met[place] + 1, 2)
        repeated = ((path, st) for path, st in self._files(stopping) if met[st.st_size % _LENGTHS] > 1)
        while some := list(itertools.islice(repeated, _MOST_SORTED)):
            some.sort(key=lambda file: max(file[1].st_size, _LARGE_BYTES))
            for path, st in some:
                if self._index.file(Ino(st.st_ino)) is None:
                    census.offered += 1
                    self._settler.offer(Ino(st.st_ino), path, just_seen=True)
                    if self._settler.pending() >= _MOST_WAITING:
                        settle()
            settle()

    def _files(self, stopping: Callable[[], bool]) -> Iterator[tuple[bytes, os.stat_result]]:
        return self._files_again(Census(), stopping)

    def _files_again(self, census: Census, stopping: Callable[[], bool]) -> Iterator[tuple[bytes, os.stat_result]]:
        """Every file there is now; what could not be looked at is added to the census."""
        again = Census()
        for path, st in walk(self._backing, again, stopping):
            if stat.S_ISREG(st.st_mode):
                yield path, st
        census.add_unreadable(again)

    def _walk_and_look(
        self,
        top: bytes,
        census: Census,
        progress: Progress,
        settle: Callable[[], None],
        stopping: Callable[[], bool],
    ) -> None:
        for path, st in walk(self._backing, census, stopping, top):
            if stat.S_ISDIR(st.st_mode):
                if self._index.directory(Ino(st.st_ino)) is None:
                    self._settler.note(Found(Ino(st.st_ino), path))
                continue
            self._look(path, st, census)
            if self._settler.pending() >= _MOST_WAITING:
                settle()
            if not census.files % 1000:
                progress("looking", census.files, None)

    def _look(self, path: bytes, st: os.stat_result, census: Census) -> None:
        census.files += 1
        census.bytes += st.st_size
        ino = Ino(st.st_ino)
        record = self._index.file(ino)
        if record is None or record.stamp != Stamp.of(st):
            census.offered += 1
            self._settler.offer(ino, path, just_seen=True)
        if st.st_nlink > 1 or (record is not None and path not in self._index.paths(ino, self._backing.root_ino)):
            self._settler.note(Found(ino, path))

    def _drop_records_of_missing_files(self, census: Census, stopping: Callable[[], bool]) -> None:
        missing: set[Ino] = set()
        after = Ino(-1)
        while chunk := self._index.all_files(after, _CHUNK):
            if stopping():
                raise Stopped
            missing.update(ino for ino, _ in chunk if not self._may_be_at_a_path(ino))
            after = chunk[-1][0]
        # Somebody who moves files behind our back can hide one from a walk; hardly from two.
        for path, st in self._files_again(census, stopping) if missing else ():
            if st.st_ino in missing:
                missing.discard(Ino(st.st_ino))
                self._look(path, st, Census())
                self._settler.note(Found(Ino(st.st_ino), path))
        if missing:
            refuse_references_elsewhere(self._backing, census)
        for ino in missing if not census.unreadable else ():
            with self._settler.quiet():
                gone = not self._may_be_at_a_path(ino)
            if gone:
                self._settler.note(Unnamed(ino, Link(Ino(0), b"?"), gone=True))

    def _offer_uncounted_references(self, census: Census, stopping: Callable[[], bool]) -> bool:
        """The last look before blobs may go: is every reference in the index? A photograph is at stake, so this trusts
        nothing that came before. Answers whether there was one that is not, which is then offered."""
        again = self._files_again(census, stopping)
        suspects = [(path, st) for path, st in again if not self._is_counted(path, st, census)]
        if not suspects:
            return False
        found = False
        with self._settler.quiet():  # what apps and the settler did meanwhile is in the index now
            for path, st in suspects:
                if not self._is_counted(path, st, census):
                    self._settler.offer(Ino(st.st_ino), path, just_seen=True)
                    found = True
        return found

    def _is_counted(self, path: bytes, st: os.stat_result, census: Census) -> bool:
        """Whether a file is no reference, or the index knows which one it is; or that cannot be told."""
        if self._backing.is_no_reference(st):
            return True
        record = self._index.file(Ino(st.st_ino))
        try:
            reference = self._backing.read_reference(path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except (OSError, StoreError) as error:
            if record is None or record.state is not FileState.REFERENCE:
                census.refuse(path, error)
            return True
        if reference is None or not self._blobs.is_needed_by(reference, path):
            return True
        return record is not None and record.state is FileState.REFERENCE and record.content == reference.content

    def _may_be_at_a_path(self, ino: Ino) -> bool:
        """Whether an inode is at a path of its, or that cannot be told."""
        paths = self._index.paths(ino, self._backing.root_ino)
        return any(self._backing.may_be_at(path, ino) for path in paths)

    def _look_at_blobs(self, *, to_trash: bool) -> None:
        """Hand over those that nothing refers to, and seal those that a crash left unsealed.

        `to_trash`: nobody knew what there was. Of a store that was copied without xattrs the blobs are all there is.
        """
        for content, st in self._blobs.list():
            if not self._settler.is_referenced(content):
                self._settler.suspect(content, to_trash=to_trash)
            elif st.st_nlink == 1:
                with suppress(OSError):
                    self._blobs.seal(content)
