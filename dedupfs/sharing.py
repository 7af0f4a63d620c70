"""Share and materialise: the only place where a path changes the inode behind it.

Two strategies, chosen once a mount. `ReferenceSharing`: one blob, and at each path a small inode that names it; for any
filesystem with hard links, sparse files and xattrs. `ReflinkSharing`: the kernel compares two files and lets them share
extents; for XFS and btrfs, and nothing needs to be kept.

References, step by step (F is known, G is new; same bytes, both watched, so that nobody writes meanwhile):

    flush F · reference for F in staging/ · link F as the blob · rename staging/… over F   [F is a reference]
    seal the blob · reference for G in staging/ · rename it over G                         [G is a reference]

A crash between any two leaves each path either as it was or as a reference whose blob is there, and perhaps a leftover
in staging/, which names the blob it was made for: `sweep` deletes it, and takes the blob's name back if F was not yet
replaced. The renames happen inside the exclusive gate, after a last look that F or G is still what was compared.
A journal that keeps metadata in order carries the blob's name to disk before what relies on it; where there is none,
every reference and directory is flushed before it is relied on.

Materialising copies the blob into the reference's own inode, marked `materialising` meanwhile; a crash leaves the mark,
and `undo_copy` empties the inode again: until the mark is gone the blob is the truth. A blob is never modified.
"""

import errno
import itertools
import logging
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from .backing import Backing
from .blobs import Blobs, parse_name
from .digest import same_bytes
from .errors import DamagedContent, StoreError
from .journal import Shared
from .model import ContentKey, FileState, Ino, Link, Reference, Stamp
from .openfiles import Gate, InUse, Key, OpenFiles, Watch
from .store import STAGING, set_aside

log = logging.getLogger(__name__)

_STAGED = re.compile(rb"(publish|heal|refer)\.[0-9]{1,20}\.[0-9]{1,10}\.[0-9]+|probe\.[0-9]{1,10}\.[0-9]+")


class Changed(Exception):
    """What was looked at is not there any more; whoever changed it has it settled again."""


class Settled:
    """A watched regular file whose digest is known: `fd` is open for reading, `stamp` was true when it was hashed.
    `leased`: there is a lease on it, which tells of writers who go around the mount."""

    __slots__ = ("fd", "key", "leased", "link", "path", "stamp", "watch")

    def __init__(self, path: bytes, link: Link, fd: int, stamp: Stamp, key: Key, watch: Watch) -> None:
        self.path, self.link, self.fd, self.stamp, self.key, self.watch = path, link, fd, stamp, key, watch
        self.leased = False


# Notes in the journal what changed at a path, in the same instant: a reference nobody knows of is not counted.
Note = Callable[[Shared], None]


class Sharing(Protocol):
    """How files of equal content come to use one set of blocks.

    Both methods answer False, with nothing changed, when the bytes differ. They raise Changed, GivenUp, InUse and
    OSError with each path either as it was, or shared and noted.
    """

    name: str

    def share(self, known: Settled, new: Settled, content: ContentKey) -> bool:
        """Share `new` with another file."""

    def share_with_blob(self, blob_fd: int, new: Settled, content: ContentKey) -> bool:
        """Share `new` with a blob."""


class ReflinkSharing:
    """Shared extents. The kernel compares under its own locks, so neither a crash nor a writer can come between."""

    name = "reflink"

    def __init__(self, backing: Backing, gate: Gate, note: Note) -> None:
        self._backing, self._gate, self._note = backing, gate, note

    def share(self, known: Settled, new: Settled, content: ContentKey) -> bool:
        def checkpoint() -> None:
            known.watch.checkpoint()
            new.watch.checkpoint()

        if not self._backing.dedupe(known.fd, new.fd, new.stamp.size_bytes, checkpoint):
            return False
        self._note_shared(new, content)
        self._note_shared(known, content)
        return True

    def share_with_blob(self, blob_fd: int, new: Settled, content: ContentKey) -> bool:
        if not self._backing.dedupe(blob_fd, new.fd, new.stamp.size_bytes, new.watch.checkpoint):
            return False
        self._note_shared(new, content)
        return True

    def _note_shared(self, file: Settled, content: ContentKey) -> None:
        with self._gate.exclusive():  # or who renames it now may note that first
            try:
                st = self._backing.lstat(file.path)
            except FileNotFoundError:
                raise Changed("gone") from None
            if Key.of(st) != file.key or Stamp.of(st) != file.stamp:
                raise Changed("renamed, removed or written meanwhile")
            self._note(Shared(st, file.link, file.path, FileState.SHARED, content))


class ReferenceSharing:
    """References to blobs; also what undoes them, whichever strategy a mount uses for new files."""

    name = "reference"

    def __init__(self, backing: Backing, blobs: Blobs, openfiles: OpenFiles, gate: Gate, note: Note) -> None:
        self._backing, self._blobs, self._note = backing, blobs, note
        self._openfiles, self._gate = openfiles, gate
        self._names = itertools.count()

    # -- sharing ------------------------------------------------------------------------------------------------------

    def share(self, known: Settled, new: Settled, content: ContentKey) -> bool:
        def checkpoint() -> None:
            known.watch.checkpoint()
            new.watch.checkpoint()

        if not self._may_become_blob(known) and self._openfiles.settle_when_closed(known.key):
            return False
        if not same_bytes(known.fd, new.fd, checkpoint):
            return False
        self.publish(known, content)
        self.refer(new, content)
        return True

    def share_with_blob(self, blob_fd: int, new: Settled, content: ContentKey) -> bool:
        if not same_bytes(blob_fd, new.fd, new.watch.checkpoint):
            return False
        self.refer(new, content)  # the blob was flushed before it was published
        return True

    def publish(self, known: Settled, content: ContentKey) -> None:
        """Make the inode of `known` the blob of `content`, and its path a reference to it.

        `known` may be open for reading. Its bytes are flushed first: a reference is to a whole content, also one that
        nobody was promised to be on disk.
        """
        self._become_blob(known, content, "publish", self._blobs.publish)

    def heal(self, good: Settled, rotten: ContentKey) -> None:
        """Like `publish`, where the blob exists and is not what its digest says, or is missing.

        The damaged one goes to quarantine/. Every reference to it reads the good bytes from its next open on.
        """
        self._become_blob(good, rotten, "heal", self._blobs.supersede)

    def _become_blob(
        self, known: Settled, content: ContentKey, label: str, enter: Callable[[bytes | int, ContentKey], None]
    ) -> None:
        if not self._backing.is_on_disk(os.fstat(known.fd)):
            self._backing.fdatasync(known.fd)
        reference = Reference(content, known.stamp.size_bytes)
        with self._gate.exclusive():
            self._verify(known)
            if not self._may_become_blob(known):
                raise Changed("opened meanwhile")
            staged, staged_fd = self._stage(known, reference, label)
            spare = [staged_fd]
            try:
                # Opened again: a duplicate would keep the lease that the settler has on it, and the kernel makes a
                # writer in passthrough wait for that.
                spare.insert(0, os.open(f"/proc/self/fd/{known.fd}", os.O_RDONLY))
                for _ in self._openfiles.handles_of(known.key):
                    spare.append(self._backing.open(staged, os.O_RDONLY))
                enter(known.fd, content)
                if not self._backing.orders_metadata:
                    self._blobs.flush_name(content)
                st = self._replace(known, staged, staged_fd, content)
            except BaseException as error:
                for fd in spare:  # first: it may be for want of descriptors, and taking back needs one
                    os.close(fd)
                # Whatever name the blob got, `sweep` would take it back for as long as the leftover is there.
                self._take_back(staged)
                if isinstance(error, FileExistsError) and self._blobs.usable(content):
                    raise Changed("published meanwhile") from None
                raise
            self._openfiles.follow(known.key, Key.of(st), reference, spare)
            if self._openfiles.is_passed_through(Key.of(st)):
                with suppress(OSError):  # then no writer is let in beside them
                    self._blobs.seal(content)
        with suppress(OSError):  # the blob is complete; a seal that is missing is what a scan mends
            if not self._backing.orders_metadata:
                self._backing.sync()  # or the seal might be found on what is still the file
            self._blobs.seal(content)
        if known.leased and not self._backing.immutable_binds_mappings and self._backing.lease_is_breaking(known.fd):
            # Somebody has opened the file around the mount and waits for us: he would write into the blob.
            self._blobs.detach(content)

    def _may_become_blob(self, known: Settled) -> bool:
        """Whether nobody can write to the blob that a file is to be: who opens the file after it was replaced, while
        the kernel still has it for a reader, can map the blob."""
        return self._backing.immutable_binds_mappings or not self._openfiles.is_passed_through(known.key)

    def refer(self, new: Settled, content: ContentKey) -> None:
        """Put a reference to an existing blob at the path of `new`, whose own inode goes.

        Raises InUse when an app has the file open.
        """
        with self._gate.exclusive():
            self._verify(new)
            if self._openfiles.get(new.key) is not None:
                raise InUse("open for reading")
            staged, staged_fd = self._stage(new, Reference(content, new.stamp.size_bytes), "refer")
            try:
                self._replace(new, staged, staged_fd, content)
            except BaseException:
                os.close(staged_fd)
                self._backing.unlink(staged)
                raise
            os.close(staged_fd)

    def _verify(self, file: Settled) -> None:
        """Inside the gate: the path still leads to the inode that was compared, and nobody changed it or waits to."""
        file.watch.checkpoint()
        if file.leased and self._backing.lease_is_breaking(file.fd):
            raise Changed("opened for writing around the mount")
        try:
            st = self._backing.lstat(file.path)
        except FileNotFoundError:
            raise Changed("gone") from None
        if Key.of(st) != file.key or Stamp.of(st) != file.stamp or st.st_nlink != 1:
            raise Changed("changed meanwhile")

    def _stage(self, original: Settled, reference: Reference, label: str) -> tuple[bytes, int]:
        """A complete reference in staging/ with everything that belongs to the file at `original.path`: its path, and
        an open descriptor."""
        st = os.fstat(original.fd)
        # The inode in the name tells `_take_back` which blob is the one that was made from it.
        path = b"%s/%s.%d.%d.%d" % (STAGING, label.encode(), st.st_ino, os.getpid(), next(self._names))
        fd = self._backing.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self._backing.fset_reference(fd, reference)
            self._backing.ftruncate(fd, reference.size_bytes)
            if (st.st_uid, st.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(fd, st.st_uid, st.st_gid)
            # The mode goes first: setting an ACL afterwards finds the group bits it must have.
            os.fchmod(fd, stat.S_IMODE(st.st_mode))
            for name in os.listxattr(original.fd):
                _copy_xattr(original.fd, fd, name)
            os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
            if not self._backing.orders_metadata:
                self._backing.fsync(fd)
        except BaseException:
            os.close(fd)
            self._backing.unlink(path)
            raise
        return path, fd

    def _replace(self, file: Settled, staged: bytes, staged_fd: int, content: ContentKey) -> os.stat_result:
        """Rename a staged reference over the path, note that, and let the directory look as if nothing had happened.

        Fails before the rename or not at all: a reference that nobody hears of is not counted.
        """
        directory = os.path.dirname(file.path)
        before = self._backing.lstat(directory)
        link = Link(Ino(before.st_ino), os.path.basename(file.path))
        if Key.of(self._backing.lstat(file.path)) != file.key:
            raise Changed("replaced meanwhile")  # by somebody who goes around the mount
        self._backing.rename(staged, file.path)
        st = os.fstat(staged_fd)
        self._note(Shared(st, link, file.path, FileState.REFERENCE, content, replaced=file.key.ino))
        with suppress(OSError):  # a wrong time of a directory is not worth undoing anything for
            self._backing.set_mtime(directory, before.st_mtime_ns)
        return st

    def refer_in_place(self, fd: int, content: ContentKey, size_bytes: int) -> Reference:
        """Make an empty file, open for writing, a reference.

        In this order: a record on an empty file says that the file is empty, so every instant is valid.
        """
        reference = Reference(content, size_bytes)
        self._backing.fset_reference(fd, reference)
        self._backing.ftruncate(fd, size_bytes)
        return reference

    # -- undoing ------------------------------------------------------------------------------------------------------

    def load(self, fd: int, st: os.stat_result) -> Reference | None:
        """The reference behind an open descriptor, None for a plain file.

        Raises DamagedContent for a reference that something outside dedupfs has written to: neither its blob nor its
        blocks can be called its content.
        """
        reference = self._backing.fread_reference(fd) if stat.S_ISREG(st.st_mode) else None
        if reference is None or reference.materialising:
            return reference
        if not st.st_size:
            # A record on an empty file means an empty file: that is how truncating one begins.
            return None
        if st.st_size != reference.size_bytes or (st.st_blocks and self._backing.has_data(fd)):
            raise DamagedContent("a reference was written to from outside dedupfs; run dedupfs fsck")
        return reference

    def materialise(
        self, fd: int, reference: Reference, blob_fd: int, length: int | None = None, *, verify: bool = False
    ) -> None:
        """Bring the content (or its first `length` bytes) into the reference's own inode, which is plain afterwards.

        `fd` is open for writing; with `verify`, for reading too, and the copy is compared before it is relied on. The
        times stay as they were. Raises OSError, with the reference as it was.
        """
        if reference.materialising:
            abandon(self._backing, fd, reference)
        st = os.fstat(fd)
        size_bytes = reference.size_bytes if length is None else length
        marked = replace(reference, materialising=True, mtime_ns=st.st_mtime_ns)
        self._backing.fset_reference(fd, marked)
        try:
            self._backing.copy_range(blob_fd, fd, min(size_bytes, reference.size_bytes))
            if size_bytes != reference.size_bytes:
                self._backing.ftruncate(fd, size_bytes)
            os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
            self._backing.fsync(fd)
            if verify and not same_bytes(blob_fd, fd):
                raise OSError(errno.EIO, "the copy differs from its blob")
            self._backing.fremove_reference(fd)
        except OSError:
            abandon(self._backing, fd, marked)
            raise

    def undo_copy(self, fd: int, reference: Reference) -> None:
        """`abandon`, for a file that nobody has open for writing: what a crash while materialising left.

        By a descriptor, which is open for reading: an app may put another file at the path just now.
        """
        writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            abandon(self._backing, writable, reference)
        finally:
            os.close(writable)

    def discard(self, fd: int) -> None:
        """Make a reference an empty plain file. First the size: the other way round a crash leaves a file of zeros."""
        self._backing.ftruncate(fd, 0)
        try:
            self._backing.fremove_reference(fd)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise

    def unlink_blob(self, content: ContentKey) -> None:
        """Remove a blob that nothing refers to. The caller is inside the exclusive gate and has made certain."""
        if not self._backing.orders_metadata:
            os.sync()  # the last reference must be gone for good before its blob is
        self._blobs.remove(content)

    # -- after a crash ------------------------------------------------------------------------------------------------

    def sweep(self) -> int:
        """Clear staging/ of what a crash left, or an error that undoing met as well. Nobody shares now.

        Answers how many leftovers there were.
        """
        count = 0
        for entry in list(self._backing.scandir(STAGING)):
            path = STAGING + b"/" + os.fsencode(entry.name)
            try:
                st = self._backing.lstat(path)
            except FileNotFoundError:
                continue  # the copy of a blob that was not finished: healing was undone before, which made it anew
            if stat.S_ISREG(st.st_mode) and _is_name_in_staging(os.fsencode(entry.name)):
                self._take_back(path)
                count += 1
            else:
                set_aside(self._backing, path)
        return count

    def _take_back(self, staged: bytes) -> None:
        """Undo what a staged reference was made for, and delete it.

        A file that has a blob's name beside its own must lose one of the two, or whoever writes to it next changes what
        others read. Publishing: nothing refers to the blob before the path is replaced, so its name goes. Healing:
        references exist, so the blob gets an inode of its own.
        """
        label, ino, *_ = os.path.basename(staged).split(b".")
        if label in (b"publish", b"heal"):
            try:
                reference = self._backing.read_reference(staged)
            except StoreError:
                reference = None  # not even the reference was complete: no blob has a name yet
            blob = self._blobs.stat(reference.content) if reference is not None else None
            if reference is not None and blob is not None and blob.st_ino == int(ino) and blob.st_nlink > 1:
                if label == b"publish":
                    self._blobs.remove(reference.content)
                else:
                    try:
                        self._blobs.detach(reference.content)
                    except OSError as error:
                        # Better none than one that the file's next writer changes: the next settling heals it.
                        log.error("blob %s cannot get an inode of its own: %s", reference.content.name, error)
                        self._blobs.remove(reference.content)
        if label == b"heal":
            self._blobs.drop_from_quarantine(int(ino))
        self._backing.unlink(staged)


def _is_name_in_staging(name: bytes) -> bool:
    """Whether it is one that we give. docs/format.md lists them."""
    label, _, rest = name.partition(b".")
    if label == b"detach":
        return parse_name(os.fsdecode(rest)) is not None
    return _STAGED.fullmatch(name) is not None


def abandon(backing: Backing, fd: int, reference: Reference) -> None:
    """Undo a materialising that did not finish: empty the inode, put its size and time back, clear the mark.

    In this order: while the mark is there, the blob is the truth.
    """
    # The size is what apps see before anybody has opened the file: better it does not shrink, not even for a moment.
    with suppress(OSError):
        backing.punch(fd, reference.size_bytes)
    if backing.has_data(fd):
        backing.ftruncate(fd, 0)
    backing.ftruncate(fd, reference.size_bytes)
    os.utime(fd, ns=(os.fstat(fd).st_atime_ns, reference.mtime_ns))
    backing.fset_reference(fd, replace(reference, materialising=False, mtime_ns=0))


def _copy_xattr(source: int, target: int, name: str) -> None:
    value = os.getxattr(source, name)
    try:
        os.setxattr(target, name, value)
    except OSError:
        # A label that only the system may set, and has set already.
        if os.getxattr(target, name) != value:
            raise


def supports_reflink(backing: Backing) -> bool:
    """Whether files of this source can share extents: tried, on two files without a name."""
    descriptors: list[int] = []
    try:
        for _ in range(2):
            descriptors.append(backing.open(STAGING, os.O_TMPFILE | os.O_RDWR))
        os.pwrite(descriptors[0], b"dedupfs!" * 512, 0)
        backing.clone(descriptors[0], descriptors[1])
    except OSError:
        return False
    finally:
        for fd in descriptors:
            os.close(fd)
    return True
