"""What an app does with a file it has open: read, write, resize, flush, copy, close.

Reads go to where the bytes are, writes always to the inode at the path, which is made to hold the bytes first. All of
this runs in the threads of FUSE's requests; a file is locked (`OpenInode.lock`) while its content changes, never while
it is read. No error is raised at release, where nobody would hear it.
"""

import errno
import fcntl
import logging
import os
import stat
from contextlib import suppress

from .backing import Backing
from .blobs import Blobs
from .errors import DamagedContent, StoreError
from .index import Index
from .journal import Restored, Shared, Touched
from .matching import domains_of
from .model import SMALLEST_SHARED_BYTES, UNKNOWN_PATH, Caller, ContentKey, FileRecord, FileState, Stamp, is_hidden
from .openfiles import Gate, GivenUp, Handle, InUse, Key, OpenFiles, OpenInode
from .orphans import Orphans
from .rules import EVERYTHING, SharingRules
from .settle import Settler
from .sharing import Changed, ReferenceSharing, Settled
from .store import is_in_another

log = logging.getLogger(__name__)

_CAPABILITY_XATTR = "security.capability"
_KEPT_FLAGS = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC
_MOST_UNMARKED = 4096


class FileIo:
    """Opens files of the source and does the I/O on them."""

    def __init__(
        self,
        backing: Backing,
        index: Index,
        blobs: Blobs,
        openfiles: OpenFiles,
        gate: Gate,
        references: ReferenceSharing,
        settler: Settler,
        orphans: Orphans,
        *,
        copies_refer: bool,
        noatime: bool,
        rules: SharingRules = EVERYTHING,
    ) -> None:
        """`copies_refer`: a copy of a whole file inside the mount becomes a reference (else the backing filesystem
        shares extents by itself). `noatime`: reading leaves access times alone."""
        self._backing, self._index, self._blobs = backing, index, blobs
        self._openfiles, self._gate = openfiles, gate
        self._references, self._settler, self._orphans = references, settler, orphans
        self._copies_refer, self._rules = copies_refer, rules
        self._quiet_flag = os.O_NOATIME if noatime else 0
        # Whether handles may be given to the kernel (see `passthrough`).
        self.kernel_may_serve = False
        # Materialised, and that its mark is gone may not be on disk: fdatasync(2) need not flush an xattr, and does not
        # on ext4. What was written since would be lost with a power loss, for the blob is the truth while there is one.
        self._unmarked: dict[Key, object] = {}

    # -- open and close -----------------------------------------------------------------------------------------------

    def open(self, path: bytes, flags: int, caller: Caller) -> Handle:
        """Open an existing file. Raises OSError, DamagedContent."""
        if flags & (os.O_ACCMODE | os.O_TRUNC) == os.O_RDONLY:
            with self._gate.shared():
                handle = self._register(path, flags, caller.pid)
            try:
                with handle.inode.lock:
                    self._load(handle)
                    if self.kernel_may_serve:
                        self._touch(handle)
            except BaseException:
                self.release(handle)
                raise
            return handle
        while True:
            key = Key.of(self._backing.lstat(path))
            with self._openfiles.writing_intent(key):
                with self._gate.shared():
                    handle = self._register(path, flags, caller.pid)
                if handle.inode.key == key:
                    break
                self.release(handle)  # another inode came to the path before we had announced ourselves to it
        try:
            with handle.inode.lock:
                self._prepare_for_writing(handle, flags, caller)
        except BaseException:
            self.release(handle)
            raise
        return handle

    def _register(self, path: bytes, flags: int, pid: int = 0) -> Handle:
        access = flags & os.O_ACCMODE
        writes = access != os.O_RDONLY or bool(flags & os.O_TRUNC)
        kept = flags & _KEPT_FLAGS
        if writes and access in (os.O_RDONLY, os.O_ACCMODE):  # open(2): 3 is for ioctls, with both rights
            kept = kept & ~os.O_ACCMODE | os.O_RDWR
        try:
            fd = self._backing.open(path, kept | self._quiet_flag)
        except PermissionError:
            if not self._quiet_flag:
                raise
            fd = self._backing.open(path, kept)  # only its owner and root may read a file quietly
        st = os.fstat(fd)
        return self._openfiles.register(
            Key.of(st),
            fd,
            alone=st.st_nlink == 1,
            writes=writes,
            appends=writes and bool(flags & os.O_APPEND),
            pid=pid,
            empty=bool(flags & os.O_TRUNC),
        )

    def create(self, path: bytes, flags: int, mode: int, pid: int) -> Handle:
        """A new file. Raises FileExistsError where there is one. The caller is inside the gate."""
        kept = flags & _KEPT_FLAGS
        fd = self._backing.open(path, kept | os.O_CREAT | os.O_EXCL, mode)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        handle = self._openfiles.register(
            Key.of(os.fstat(fd)),
            fd,
            writes=writes,
            appends=writes and bool(flags & os.O_APPEND),
            pid=pid,
            empty=True,
        )
        handle.inode.loaded = True
        handle.inode.begin_stream()
        # Also a file that stays empty is settled; one that is opened read-only is nobody's to write, and done.
        handle.inode.dirty = writes
        handle.inode.privileges_checked = True
        if not writes:
            handle.inode.resettle = True
        return handle

    def _load(self, handle: Handle) -> None:
        """Find out where the bytes are, once for all handles of an inode. Caller holds the lock."""
        inode = handle.inode
        if not inode.loaded:
            st = os.fstat(handle.own_fd)
            reference = self._references.load(handle.own_fd, st)
            if reference is None:
                if not st.st_size and handle.writes:
                    self._forget_record(handle.own_fd)  # truncated, and the crash came before its record went
                inode.loaded = True
            else:
                inode.become_reference(reference, self._blobs.open(reference.content, reference.size_bytes))
        inode.direct(handle)

    def _forget_record(self, fd: int) -> None:
        """Raises OSError: what is written beside a record would be nobody's content."""
        try:
            self._backing.fremove_reference(fd)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise

    def _prepare_for_writing(self, handle: Handle, flags: int, caller: Caller) -> None:
        inode = handle.inode
        if flags & os.O_TRUNC:
            self._truncate(inode, handle.own_fd, 0)
            self._drop_privileges(inode, handle.own_fd, caller)
        else:
            self._load(handle)
            self._materialise(inode, handle.own_fd)
            if inode.stream is None and not os.fstat(handle.own_fd).st_size:
                inode.begin_stream()
        if self.kernel_may_serve and (os.fstat(handle.own_fd).st_nlink > 1 or _carries_privileges(handle.own_fd)):
            # The kernel knows other names as other files, which must show what is written by this one; and it writes
            # with our rights, which take no privileges away.
            handle.through_us = True

    def _materialise(self, inode: OpenInode, fd: int, length: int | None = None) -> None:
        """Caller holds the lock; `fd` is open for writing."""
        if inode.reference is None:
            return
        try:
            self._references.materialise(fd, inode.reference, inode.content_fd, length)
        except OSError:
            path = self._backing.path_of(fd)
            if path is not None:
                self._settler.note(Touched(inode.key.ino, path))  # as it was, but for its ctime
            raise
        self._unmarked[inode.key] = object()
        inode.become_plain()
        inode.stream = None
        inode.dirty = True
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC:
            self._fsync_plain(inode, fd)
        elif len(self._unmarked) > _MOST_UNMARKED:
            with suppress(OSError):
                self._flush_unmarked()

    def _fsync_plain(self, inode: OpenInode, fd: int) -> None:
        unmarked = self._unmarked.get(inode.key)
        self._backing.fsync(fd)
        self._forget_unmarked(inode.key, unmarked)

    def _flush_unmarked(self) -> None:
        before = dict(self._unmarked)
        self._backing.sync()
        for key, unmarked in before.items():
            self._forget_unmarked(key, unmarked)

    def _forget_unmarked(self, key: Key, unmarked: object) -> None:
        """Unless it was materialised once more meanwhile."""
        if unmarked is not None and self._unmarked.get(key) is unmarked:
            self._unmarked.pop(key, None)

    def flush(self, handle: Handle) -> None:
        """An app closed one of its descriptors. Raises what the backing filesystem has to report only then (EIO,
        EDQUOT on network filesystems)."""
        handle.flushed, handle.outlasted = True, False
        os.close(os.dup(handle.own_fd))

    def release(self, handle: Handle) -> None:
        inode = handle.inode
        if handle.writes:
            inode.forget_if_unchanged(handle.own_fd)

        def settle() -> None:
            path, st = self._backing.path_of(handle.own_fd), os.fstat(handle.own_fd)
            if path is None or inode.key.device != self._backing.device:
                return
            if is_hidden(path):
                # Unlinked while it was open. It may have another name, which the index knows.
                if st.st_nlink == 1:
                    return
                path = UNKNOWN_PATH
            stream = inode.stream
            digest = stream.digest_of(st.st_size) if stream else None
            self._settler.enqueue(inode.key.ino, path, digest, Stamp.of(st))

        self._openfiles.release(handle, settle)
        self._orphans.let_go(inode.key)

    def release_all(self) -> None:
        """Release what the kernel did not: an unmount may overtake the releases of files that were just closed."""
        for handle in self._openfiles.handles():
            self.release(handle)

    # -- content ------------------------------------------------------------------------------------------------------

    def read(self, handle: Handle, buffer: memoryview, offset: int) -> int:
        self._touch(handle)
        return os.preadv(handle.read_fd, [buffer], offset)

    def _touch(self, handle: Handle) -> None:
        """Of a reference the blob is read: let the backing filesystem keep the access time by its own rules."""
        if handle.read_fd != handle.own_fd and not handle.was_read:
            handle.was_read = True
            os.pread(handle.own_fd, 1, 0)

    def write(self, handle: Handle, data: memoryview, offset: int, caller: Caller, *, cached: bool) -> int:
        """`cached`: the kernel writes back a page that was changed through mmap; it belongs at `offset` even where the
        handle appends."""
        inode, fd = handle.inode, handle.own_fd
        with inode.lock:
            self._materialise(inode, fd)
            self._drop_privileges(inode, fd, caller)
            inode.dirty, handle.flushed = True, False
            if handle.appends and not cached:
                # Another name of the same inode may have made it longer than the kernel thinks.
                offset = os.fstat(fd).st_size
            count = os.pwrite(fd, data, offset)
            if inode.stream is not None:
                inode.stream.update(data[:count], offset)
            return count

    def restore(self, path: bytes) -> int | None:
        """Make a reference a plain file again, compared with its blob, flushed, and not to be shared at once.

        The number of bytes brought back; None when it was no reference. Raises OSError, DamagedContent, with the
        reference as it was.
        """
        handle, forced_mode = self._open_to_restore(path)
        try:
            inode = handle.inode
            with inode.lock:
                try:
                    try:
                        self._load(handle)
                        reference = inode.reference
                        if reference is None:
                            return None
                        self._references.materialise(handle.own_fd, reference, inode.content_fd, verify=True)
                    finally:
                        if forced_mode is not None:
                            os.fchmod(handle.own_fd, forced_mode)
                except (OSError, StoreError):
                    self._settler.note(Touched(inode.key.ino, path))  # as it was, but for its ctime
                    raise
                inode.become_plain()
                st = os.fstat(handle.own_fd)  # before anybody else can write to it
            with self._gate.exclusive():  # or who removes it now may note that first
                if os.fstat(handle.own_fd).st_nlink:
                    self._settler.note(Restored(st, reference.content))
            return reference.size_bytes
        finally:
            self.release(handle)

    def _open_to_restore(self, path: bytes) -> tuple[Handle, int | None]:
        """A handle that writes, and the mode that the file is to have again, if it had to be changed for that."""
        while True:
            key = Key.of(self._backing.lstat(path))
            # No app puts another file at the path, which would keep the mode of this one.
            with self._openfiles.writing_intent(key), self._gate.exclusive():
                st = self._backing.lstat(path)
                if Key.of(st) != key:
                    continue
                try:
                    return self._register(path, os.O_RDWR), None
                except PermissionError:
                    # An ordinary user's own file that he made read-only: writable for as long as this takes.
                    mode = stat.S_IMODE(st.st_mode)
                    self._backing.chmod(path, mode | stat.S_IRUSR | stat.S_IWUSR)
                    return self._register(path, os.O_RDWR), mode

    def truncate(self, handle: Handle, size_bytes: int, caller: Caller) -> None:
        inode = handle.inode
        with inode.lock:
            self._truncate(inode, handle.own_fd, size_bytes)
            self._drop_privileges(inode, handle.own_fd, caller)

    def truncate_path(self, path: bytes, size_bytes: int, caller: Caller) -> None:
        """truncate(2): as if opened for it. What need not be copied first is not."""
        if size_bytes == 0:
            self.release(self.open(path, os.O_WRONLY | os.O_TRUNC, caller))
            return
        key = Key.of(self._backing.lstat(path))
        while True:
            with self._openfiles.writing_intent(key), self._gate.shared():
                handle = self._register(path, os.O_WRONLY)
            try:
                if handle.inode.key == key:
                    with handle.inode.lock:
                        self._load(handle)
                        if size_bytes == os.fstat(handle.own_fd).st_size:
                            # No byte changes, whatever the file is: what becomes of its times is the filesystem's say.
                            self._backing.truncate(handle.own_fd, size_bytes)
                            self._drop_privileges(handle.inode, handle.own_fd, caller)
                            handle.inode.dirty = True
                        else:
                            self.truncate(handle, size_bytes, caller)
                    return
                key = handle.inode.key
            finally:
                self.release(handle)

    def _truncate(self, inode: OpenInode, fd: int, size_bytes: int) -> None:
        """Caller holds the lock."""
        inode.dirty = True
        if size_bytes == 0:
            if inode.reference is not None or self._carries_a_record(fd):
                self._references.discard(fd)
                inode.become_plain()
            else:
                self._backing.ftruncate(fd, 0)
            inode.begin_stream()
            return
        if inode.reference is not None and size_bytes < inode.reference.size_bytes:
            self._materialise(inode, fd, size_bytes)
        else:
            self._materialise(inode, fd)
        self._backing.ftruncate(fd, size_bytes)
        if inode.stream is not None and size_bytes != inode.stream.length:
            inode.stream.spoil()

    def _carries_a_record(self, fd: int) -> bool:
        try:
            return self._backing.fread_reference(fd) is not None
        except StoreError:
            return True  # damaged, or a newer one's: of no interest to who overwrites it

    def fallocate(self, handle: Handle, mode: int, offset: int, length: int, caller: Caller) -> None:
        inode = handle.inode
        with inode.lock:
            self._materialise(inode, handle.own_fd)
            self._drop_privileges(inode, handle.own_fd, caller)
            inode.dirty = True
            if inode.stream is not None and (mode or inode.stream.length):
                inode.stream.spoil()
            self._backing.fallocate(handle.own_fd, mode, offset, length)

    def seek(self, handle: Handle, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE."""
        return os.lseek(handle.read_fd, offset, whence)

    def fsync(self, handle: Handle, *, data_only: bool) -> None:
        """Make durable what the handle shows: of a reference, its blob, itself, and that it is at its path."""
        inode = handle.inode
        if inode.reference is not None and not self._backing.orders_metadata:
            self._backing.sync()  # one by one, what comes first might be found without the others
        elif inode.reference is not None:
            self._backing.fsync(handle.read_fd)
            self._backing.fsync(handle.own_fd)
            path = self._backing.path_of(handle.own_fd)
            if path is not None:
                self._backing.fsync_directory(os.path.dirname(path))
        elif data_only and inode.key not in self._unmarked:
            self._backing.fdatasync(handle.own_fd)
        else:
            self._fsync_plain(inode, handle.own_fd)

    def _drop_privileges(self, inode: OpenInode, fd: int, caller: Caller) -> None:
        """Clear what a write by an ordinary user must: the set-id bits, and file capabilities. Caller holds the lock.

        The kernel leaves it to us (FUSE_HANDLE_KILLPRIV_V2), which spares it a question before every write.
        """
        if inode.privileges_checked:
            return
        inode.privileges_checked = True
        try:
            os.removexattr(fd, _CAPABILITY_XATTR)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
                raise
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if caller.uid == 0 or not mode & (stat.S_ISUID | stat.S_ISGID):
            # Root keeps the bits; but the next who writes may not be root.
            inode.privileges_checked = not mode & (stat.S_ISUID | stat.S_ISGID)
            return
        cleared = mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            cleared &= ~stat.S_ISGID
        os.fchmod(fd, cleared)

    # -- copying inside the mount -------------------------------------------------------------------------------------

    def copy_range(
        self, source: Handle, source_offset: int, target: Handle, target_offset: int, length: int, caller: Caller
    ) -> int:
        """copy_file_range(2). A settled file copied whole into an empty one becomes one more reference."""
        if self._copies_refer and not source_offset and not target_offset:
            count = self._copy_as_reference(source, target, length)
            if count:
                return count
        if source_offset >= os.fstat(source.own_fd).st_size:
            return 0
        if self._rules.keeps_apart and not self._may_share_extents(source, target):
            # Filesystems that can let the two share extents. For this errno the kernel copies bytes.
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        inode = target.inode
        with inode.lock:
            self._materialise(inode, target.own_fd)
            self._drop_privileges(inode, target.own_fd, caller)
            inode.dirty, inode.stream = True, None
            return os.copy_file_range(source.read_fd, target.own_fd, length, source_offset, target_offset)

    def _copy_as_reference(self, source: Handle, target: Handle, length: int) -> int:
        """The number of bytes copied, 0 where it cannot be done this way."""
        inode = target.inode
        st = os.fstat(target.own_fd)
        size_bytes = os.fstat(source.own_fd).st_size
        if (
            st.st_size
            or st.st_nlink != 1
            or st.st_dev != self._backing.device
            or inode.writers != 1
            or inode.backing_file is not None  # later writes through the kernel would go to the reference itself
            or not SMALLEST_SHARED_BYTES <= size_bytes <= length
            or source.inode is inode
        ):
            return 0
        path = self._backing.path_of(target.own_fd)
        if path is None or is_in_another(self._backing, path) or not self._rules.allow(path, size_bytes):
            return 0
        if self._rules.domains and not self._is_of_one_domain(source, target):
            return 0
        content = self._content_of(source)
        if content is None:
            return 0
        # Keeps the blob from being removed as the last reference to it goes, and the target from being renamed.
        with self._gate.exclusive():
            try:
                blob_fd = self._blobs.open(content, size_bytes)
            except (DamagedContent, OSError):
                return 0
            with inode.lock:
                if os.fstat(target.own_fd).st_size or inode.reference is not None:
                    os.close(blob_fd)
                    return 0
                try:
                    reference = self._references.refer_in_place(target.own_fd, content, size_bytes)
                except OSError:
                    os.close(blob_fd)
                    self._references.discard(target.own_fd)  # no room for the record: bytes may still fit
                    return 0
                inode.become_reference(reference, blob_fd)
                inode.dirty, inode.stream = True, None
            path = self._backing.path_of(target.own_fd) or path
            st = os.fstat(target.own_fd)
            self._settler.note(Shared(st, self._backing.link_of(path), path, FileState.REFERENCE, content))
        return size_bytes

    def _content_of(self, source: Handle) -> ContentKey | None:
        """The content with a blob that an open file stands for; a settled plain file is made one."""
        inode = source.inode
        if inode.reference is not None:
            if inode.reference.materialising or not self._may_join(source, inode.reference.content):
                return None
            return inode.reference.content
        try:
            record = self._index.file(inode.key.ino)
        except StoreError:
            return None  # no index: a copy is then made of bytes
        st = os.fstat(source.own_fd)
        path = self._backing.path_of(source.own_fd)
        if path is None or not self._may_publish(path, record, st, inode.key) or record is None:
            return None
        if not self._may_join(source, record.content):
            return None
        try:
            with self._openfiles.watch(inode.key) as watch:
                # Opened again: there is a lease on it until it is closed.
                fd = os.open(f"/proc/self/fd/{source.own_fd}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    file = Settled(path, self._backing.link_of(path), fd, record.stamp, inode.key, watch)
                    file.leased = self._backing.take_read_lease(fd)
                    self._references.publish(file, record.content)
                finally:
                    os.close(fd)
        except (InUse, GivenUp, Changed, OSError) as error:
            log.debug("cannot publish %s for a copy: %s", os.fsdecode(path), error)
            return None
        return record.content

    def _is_of_one_domain(self, source: Handle, target: Handle) -> bool:
        paths = [self._backing.path_of(handle.own_fd) for handle in (source, target)]
        return len({self._rules.domain_of(path) for path in paths if path is not None}) == 1 and None not in paths

    def _may_share_extents(self, source: Handle, target: Handle) -> bool:
        size_bytes = os.fstat(source.own_fd).st_size
        for handle in (source, target):
            path = self._backing.path_of(handle.own_fd)
            if path is None or not self._rules.allow(path, size_bytes):
                return False
        return not self._rules.domains or self._is_of_one_domain(source, target)

    def _may_join(self, source: Handle, content: ContentKey) -> bool:
        """Whether those who share a content are all of the domain of the file that is copied."""
        if not self._rules.domains:
            return True
        path = self._backing.path_of(source.own_fd)
        try:
            domains = domains_of(self._index, self._rules, content, self._backing.root_ino)
        except StoreError:
            return False
        return path is not None and domains <= {self._rules.domain_of(path)}

    def _may_publish(self, path: bytes, record: FileRecord | None, st: os.stat_result, key: Key) -> bool:
        return (
            record is not None
            and self._rules.allow(path, st.st_size)
            and record.state is FileState.PLAIN
            and record.stamp == Stamp.of(st)
            and st.st_nlink == 1
            and key.device == self._backing.device
            and not self._blobs.usable(record.content)
            and not self._settler.is_pending(key.ino)
        )


def _carries_privileges(fd: int) -> bool:
    """Whether a file has something that a write must take away: a set-id bit, or capabilities."""
    if os.fstat(fd).st_mode & (stat.S_ISUID | stat.S_ISGID):
        return True
    try:
        os.getxattr(fd, _CAPABILITY_XATTR)
    except OSError:
        return False
    return True
