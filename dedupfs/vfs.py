"""The tree as apps see it: names and attributes. No FUSE here, and no file content (that is `fileio`).

Every path is as the kernel resolved it: no symbolic links on the way, `.dedupfs` included, which does not exist here.
Whoever changes a name or an attribute passes the gate, and notes for the index what changed. Permissions were checked
by the kernel (default_permissions); what is created belongs to the caller.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import NamedTuple

from .asking import supplementary_groups
from .backing import RENAME_EXCHANGE, RENAME_NOREPLACE, Backing
from .errors import StoreError
from .fileio import FileIo
from .journal import DirectoryNamed, Named, Touched, Unnamed
from .model import ROOT, STORE_DIRECTORY, Caller, Ino, Link, is_hidden
from .openfiles import Gate, Handle, Key, OpenFiles
from .orphans import Orphans
from .settle import Settler

OUR_XATTRS = b"user.dedupfs."
_RESERVED_XATTRS = (OUR_XATTRS, b"trusted.dedupfs.")
_DEFAULT_ACL = b"system.posix_acl_default"
_ACCESS_ACL = b"system.posix_acl_access"
_CAPABILITY = b"security.capability"


class Attributes(NamedTuple):
    """What stat(2) of the mount answers: `st`, but for the number of 512-byte blocks and of links."""

    st: os.stat_result
    blocks: int
    nlink: int


class Directory:
    """A directory that an app has open, and the names in it when it was last read from its beginning."""

    __slots__ = ("fd", "names")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.names: list[bytes] = []


class Entry(NamedTuple):
    """A directory entry. `attributes` are what `getattr` answers, None where the filesystem cannot tell; `following` is
    the position behind it."""

    name: bytes
    attributes: Attributes | None
    following: int


def _errno(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _files(*found: os.stat_result) -> list[Ino] | None:
    """Their inodes; None when there is a directory among them."""
    return None if any(stat.S_ISDIR(st.st_mode) for st in found) else [Ino(st.st_ino) for st in found]


class Vfs:
    """Path operations on the mount. Any number of threads; raises OSError and DedupfsError."""

    def __init__(
        self,
        backing: Backing,
        openfiles: OpenFiles,
        gate: Gate,
        settler: Settler,
        io: FileIo,
        answer: Callable[[bytes, bytes, Caller], bytes],
        orphans: Orphans,
    ) -> None:
        self._backing, self._openfiles, self._gate = backing, openfiles, gate
        self._settler, self.io, self._answer, self._orphans = settler, io, answer, orphans
        self.control_path = b""  # where the mount listens for commands; set before it serves

    # -- paths --------------------------------------------------------------------------------------------------------

    def _resolve(self, path: bytes) -> bytes:
        """The backing path. Raises ENOENT for the store; an open file that was unlinked is among the orphans."""
        if path.startswith(STORE_DIRECTORY) and path[len(STORE_DIRECTORY) :][:1] in (b"", b"/"):
            raise _errno(errno.ENOENT)
        if self._orphans.is_stale(path):
            raise _errno(errno.ESTALE)
        return self._orphans.path(path) or path

    def _resolve_new(self, path: bytes) -> bytes:
        """The backing path of a name that is to be made."""
        if path == STORE_DIRECTORY:
            raise _errno(errno.EPERM)
        return self._resolve(path)

    # -- looking ------------------------------------------------------------------------------------------------------

    def getattr(self, path: bytes) -> Attributes:
        resolved = self._resolve(path)
        with self._backing.directory_of(resolved) as (beneath, name):
            found = self._attributes(self._stat(name, beneath), name, beneath)
        if not resolved and found.nlink > 2:
            found = found._replace(nlink=found.nlink - 1)  # the store is not seen
        hidden = self._orphans.count(Key.of(found.st))
        if resolved is not path:
            hidden -= 1  # the link of the orphan that is asked for, libfuse takes off
        return found._replace(nlink=found.nlink - hidden) if hidden > 0 else found

    def getattr_open(self, handle: Handle) -> Attributes:
        st = os.fstat(handle.own_fd)
        blocks = _full_blocks(st) if handle.inode.reference is not None else st.st_blocks
        return Attributes(st, blocks, st.st_nlink)

    def path_of(self, handle: Handle) -> bytes | None:
        """Where an open file is now, None when it has no name that the mount shows."""
        path = self._backing.path_of(handle.own_fd)
        return None if path is None or is_hidden(path) else path

    def was_put_back(self, path: bytes) -> bool:
        """Whether libfuse calls a file so that has its own path again: the kernel is to look that up anew (ESTALE)."""
        return self._orphans.was_put_back(path)

    def is_unlinked(self, path: bytes) -> bool:
        """Whether a path is what libfuse calls an open file that was unlinked."""
        return self._orphans.path(path) is not None

    def names_hidden(self, handle: Handle) -> int:
        """How many of an open file's links nobody sees, since they were unlinked."""
        return self._orphans.count(handle.inode.key)

    def _stat(self, path: bytes, directory_fd: int) -> os.stat_result:
        """lstat(2). While a file becomes a reference, its directory has a time that is not its own: the kernel would
        keep that."""
        st = self._backing.lstat(path, directory_fd)
        if not stat.S_ISDIR(st.st_mode):
            return st
        with self._gate.shared():
            return self._backing.lstat(path, directory_fd)

    def _attributes(self, st: os.stat_result, path: bytes, directory_fd: int) -> Attributes:
        """What to report of an inode: of a reference the blocks of its content, so that nobody takes it for a file of
        holes."""
        blocks = st.st_blocks
        if self._backing.may_be_reference(st):
            with suppress(StoreError):
                if self._backing.read_reference(path, directory_fd) is not None:
                    blocks = _full_blocks(st)
        return Attributes(st, blocks, st.st_nlink)

    def readlink(self, path: bytes) -> bytes:
        return self._backing.readlink(self._resolve(path))

    def opendir(self, path: bytes) -> Directory:
        return Directory(self._backing.open(self._resolve(path), os.O_RDONLY | os.O_DIRECTORY))

    def readdir(self, directory: Directory, position: int) -> Iterator[Entry]:
        """The entries from a position on, without . and .. . At position 0 the names are read anew; what has been made
        since is not shown, what has been removed is left out, and attributes are those of now."""
        if not position:
            at_root = Key.of(os.fstat(directory.fd)) == Key(self._backing.device, self._backing.root_ino)
            found = map(os.fsencode, self._names_in(directory.fd))
            directory.names = [name for name in found if not (at_root and name == STORE_DIRECTORY)]
        for following in range(position + 1, len(directory.names) + 1):
            name = directory.names[following - 1]
            attributes = None
            try:
                attributes = self._attributes(self._stat(name, directory.fd), name, directory.fd)
            except FileNotFoundError:
                continue
            except OSError:
                pass  # damaged, say: it has a name all the same
            yield Entry(name, attributes, following)

    def _names_in(self, fd: int) -> list[str]:
        """On btrfs a name whose inode is replaced goes to the end of its directory, behind what a listing shows that
        has begun: there no file comes to share meanwhile, and it begins now."""
        with nullcontext() if self._backing.replaces_in_place else self._gate.shared():
            os.lseek(fd, 0, os.SEEK_SET)
            return os.listdir(fd)

    def statfs(self, path: bytes) -> os.statvfs_result:
        """Of the filesystem that `path` is on: another one may be mounted inside the source."""
        return self._backing.statvfs(self._resolve(path))

    # -- making -------------------------------------------------------------------------------------------------------

    def _mode(self, path: bytes, mode: int, caller: Caller) -> int:
        """The mode to create with: a default ACL of the directory takes the place of the umask (acl(5))."""
        if caller.umask & mode:
            try:
                self._backing.getxattr(os.path.dirname(path), _DEFAULT_ACL)
            except OSError:
                return mode & ~caller.umask
        return mode

    def _give(self, path: bytes, caller: Caller) -> None:
        """A new inode belongs to who made it; its group is the directory's where that is set-group-id."""
        if not self._backing.privileged or (caller.uid, caller.gid) == (0, 0):
            return
        parent = self._backing.lstat(os.path.dirname(path))
        # Mounted with grpid, the filesystem gives everything the directory's group.
        inherited = parent.st_mode & stat.S_ISGID or self._backing.lstat(path).st_gid != os.getegid()
        self._backing.chown(path, caller.uid, -1 if inherited else caller.gid)

    @staticmethod
    @contextmanager
    def _or_undo(undo: Callable[[bytes], None], path: bytes) -> Iterator[None]:
        """What cannot be given to who made it (EDQUOT, say) was not made."""
        try:
            yield
        except BaseException:
            with suppress(OSError):
                undo(path)
            raise

    def _with_set_ids(self, path: bytes, mode: int) -> int:
        """The mode the backing filesystem gave (a default ACL may have taken bits off), with what chown took off."""
        return stat.S_IMODE(self._backing.lstat(path).st_mode) | (mode & 0o7000)

    def create(self, path: bytes, flags: int, mode: int, caller: Caller) -> Handle:
        path = self._resolve_new(path)
        try:
            with self._gate.shared():
                mode = self._mode(path, mode, caller)
                handle = self.io.create(path, flags, mode, caller.pid)
                try:
                    self._give(path, caller)
                    if mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX):
                        os.fchmod(handle.own_fd, self._with_set_ids(path, mode))
                        handle.inode.privileges_checked = False
                        handle.through_us = True
                except BaseException:
                    self._backing.unlink(path)
                    self.io.release(handle)
                    raise
                return handle
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
        return self.io.open(path, flags, caller)

    def mknod(self, path: bytes, mode: int, device: int, caller: Caller) -> None:
        path = self._resolve_new(path)
        with self._gate.shared():
            mode = self._mode(path, mode, caller)
            self._backing.mknod(path, mode, device)
            with self._or_undo(self._backing.unlink, path):
                self._give(path, caller)
                if mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX):
                    self._backing.chmod(path, self._with_set_ids(path, mode))
            if stat.S_ISREG(mode):
                st = self._backing.lstat(path)
                if self._is_ours(st):
                    self._settler.enqueue(Ino(st.st_ino), path)

    def mkdir(self, path: bytes, mode: int, caller: Caller) -> None:
        path = self._resolve_new(path)
        with self._gate.shared():
            self._backing.mkdir(path, self._mode(path, mode, caller))
            with self._or_undo(self._backing.rmdir, path):
                self._give(path, caller)
            st = self._backing.lstat(path)
            if self._is_ours(st):
                self._settler.note(DirectoryNamed(Ino(st.st_ino), self._backing.link_of(path)))

    def symlink(self, target: bytes, path: bytes, caller: Caller) -> None:
        path = self._resolve_new(path)
        with self._gate.shared():
            self._backing.symlink(target, path)
            with self._or_undo(self._backing.unlink, path):
                self._give(path, caller)

    def link(self, path: bytes, new: bytes) -> os.stat_result:
        """Answers the attributes of the inode, which other names show as well."""
        path, new = self._resolve(path), self._resolve_new(new)
        with self._gate.shared():
            self._backing.link(path, new)
            st = self._backing.lstat(new)
            # The old name as well: only settling has noted it, and that may go by the new one now.
            if not is_hidden(path):  # as an orphan is, of which nobody is told
                self._note_named(st, path)
            self._note_named(st, new)
            return st

    # -- opening and resizing -----------------------------------------------------------------------------------------

    def open(self, path: bytes, flags: int, caller: Caller) -> Handle:
        return self.io.open(self._resolve(path), flags, caller)

    def truncate(self, path: bytes | None, handle: Handle | None, size_bytes: int, caller: Caller) -> None:
        if handle is not None and handle.writes:
            self.io.truncate(handle, size_bytes, caller)
        else:
            self.io.truncate_path(self._resolve(path or ROOT), size_bytes, caller)

    # -- removing and moving ------------------------------------------------------------------------------------------

    def unlink(self, path: bytes) -> os.stat_result:
        """Answers the attributes that the inode has then."""
        resolved = self._resolve(path)
        with self._gate.shared():
            link = self._backing.link_of(resolved)
            with self._pinned(resolved) as fd:
                self._backing.unlink(resolved)
                if resolved is not path:
                    self._orphans.unlinked(path.rpartition(b"/")[2])
                st = os.fstat(fd)
                self._note_unnamed(st, link)
                return st

    def hide(self, path: bytes, name: bytes) -> os.stat_result:
        """Unlink a file that is open: it stays, out of the tree, for as long as it is. Answers its attributes."""
        path = self._resolve(path)
        with self._gate.shared():
            st = self._backing.lstat(path)
            link = self._backing.link_of(path)
            try:
                self._orphans.take_in(path, name, st)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # On another filesystem: it stays where it is under libfuse's name, and libfuse removes it.
                hidden = _beside(path, name)
                self._backing.rename(path, hidden)
                self._note_moved(st, link, self._backing.link_of(hidden), hidden)
                return st
            if stat.S_ISREG(st.st_mode) and self._is_ours(st):
                self._settler.note(Unnamed(Ino(st.st_ino), link, gone=False))
        self._orphans.let_go(Key.of(st))
        return st

    def put_back(self, name: bytes, path: bytes) -> None:
        """Undo `hide`: what was to take the place of the file did not come."""
        path = self._resolve(path)
        with self._gate.shared():
            orphan = self._orphans.named(name)
            try:
                # The orphan stays for now, since libfuse goes on asking for it.
                self._backing.link(orphan or _beside(path, name), path)
            except FileNotFoundError:
                return  # its last handle went before
            if orphan is not None:
                self._orphans.put_back(name, Key.of(self._backing.lstat(os.path.dirname(path))))
            self._note_named(self._backing.lstat(path), path)

    @contextmanager
    def _pinned(self, path: bytes) -> Iterator[int]:
        """A descriptor that keeps an inode from going, so that afterwards its link count tells whether it is gone:
        counted before, another name may come or go meanwhile."""
        fd = self._backing.open(path, os.O_PATH)
        try:
            yield fd
        finally:
            os.close(fd)

    def _is_ours(self, st: os.stat_result) -> bool:
        """Whether an inode is of the archive's filesystem: one that is mounted inside has numbers of its own, which are
        not to be taken for those that the index knows."""
        return st.st_dev == self._backing.device

    def _note_named(self, st: os.stat_result, path: bytes) -> None:
        """A file got this name, perhaps beside others."""
        if stat.S_ISREG(st.st_mode) and self._is_ours(st):
            self._settler.note(Named(Ino(st.st_ino), self._backing.link_of(path), path))

    def _note_unnamed(self, st: os.stat_result, link: Link) -> None:
        """An inode lost a name; `st` is from afterwards."""
        if stat.S_ISREG(st.st_mode) and self._is_ours(st):
            self._settler.note(Unnamed(Ino(st.st_ino), link, gone=st.st_nlink == 0))

    def rmdir(self, path: bytes) -> None:
        path = self._resolve(path)
        # Pinned, so that no new directory gets the number before this is noted.
        with self._gate.shared(), self._pinned(path) as fd:
            self._backing.rmdir(path)
            self._note_directory_gone(os.fstat(fd))

    def _note_directory_gone(self, st: os.stat_result) -> None:
        if self._is_ours(st):
            self._settler.note(DirectoryNamed(Ino(st.st_ino), None))

    def unhide(self, name: bytes, path: bytes, other: bytes) -> bool:
        """Let a file that was just hidden from `path` be there again, if it is what is at `other` as well: renaming
        one name of an inode to another leaves both (rename(2)). Answers whether it was so."""
        path, other = self._resolve(path), self._resolve(other)
        with self._gate.shared():
            st = self._backing.lstat(other)
            orphan = self._orphans.named(name)
            try:
                if orphan is None or Key.of(self._backing.lstat(orphan)) != Key.of(st):
                    return False
            except FileNotFoundError:
                return False  # its last handle went just now
            # The orphan stays beside it, since libfuse goes on asking for it by that name; or it goes just now.
            self._backing.link(other, path)
            self._note_named(st, path)
            return True

    def rename(self, path: bytes, new: bytes, flags: int) -> tuple[os.stat_result, os.stat_result | None]:
        """Answers the attributes of what was moved, and of what it replaced or was exchanged with."""
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise _errno(errno.EINVAL)  # a whiteout would belong to us, not to the caller
        path = self._resolve(path)
        new = self._resolve_new(new)
        with self._gate.shared(), ExitStack() as stack:
            st = self._backing.lstat(path)
            replaced: os.stat_result | None = None
            with suppress(FileNotFoundError, NotADirectoryError):
                pinned = stack.enter_context(self._pinned(new))
                replaced = os.fstat(pinned)
            old_link, new_link = self._backing.link_of(path), self._backing.link_of(new)
            self._backing.rename(path, new, flags)
            if replaced is not None and Key.of(replaced) == Key.of(st):
                return st, None  # two names of one inode: rename(2) leaves both
            if flags & RENAME_EXCHANGE and replaced is not None:
                self._note_moved(replaced, new_link, old_link, path)
                self._settler.moved({path: new, new: path}, _files(st, replaced))
            else:
                if replaced is not None:
                    replaced = os.fstat(pinned)
                    self._note_unnamed(replaced, new_link)
                    if stat.S_ISDIR(replaced.st_mode):
                        self._note_directory_gone(replaced)
                self._settler.moved({path: new}, _files(st))
            self._note_moved(st, old_link, new_link, new)
            return st, replaced

    def _note_moved(self, st: os.stat_result, old: Link, new: Link, path: bytes) -> None:
        if not self._is_ours(st):
            return
        ino = Ino(st.st_ino)
        if stat.S_ISDIR(st.st_mode):
            self._settler.note(DirectoryNamed(ino, new))
            self._settler.directory_moved(path)
        elif stat.S_ISREG(st.st_mode):
            self._settler.note(Unnamed(ino, old, gone=False))
            self._settler.note(Named(ino, new, path))

    # -- attributes ---------------------------------------------------------------------------------------------------

    def chmod(self, path: bytes | None, handle: Handle | None, mode: int) -> None:
        with self._gate.shared():
            if handle is not None:
                os.fchmod(handle.own_fd, mode)
            else:
                self._backing.chmod(self._resolve(path or ROOT), mode)
            self._note_touched(path, handle, privileges=True)

    def chown(self, path: bytes | None, handle: Handle | None, uid: int, gid: int) -> None:
        with self._gate.shared():
            if handle is not None:
                os.fchown(handle.own_fd, uid, gid)
            else:
                self._backing.chown(self._resolve(path or ROOT), uid, gid)
            self._note_touched(path, handle)

    def utimens(self, path: bytes | None, handle: Handle | None, times: int | None) -> None:
        """`times`: address of two struct timespec, or None for now."""
        with self._gate.shared():
            if handle is not None:
                self._backing.futimens(handle.own_fd, times)
            else:
                self._backing.utimensat(self._resolve(path or ROOT), times)
            self._note_touched(path, handle, sets_times=True)

    def _note_touched(
        self, path: bytes | None, handle: Handle | None, *, privileges: bool = False, sets_times: bool = False
    ) -> None:
        if handle is not None:
            if privileges:
                handle.inode.privileges_checked = False
            found = self._backing.path_of(handle.own_fd)
            if found is not None and handle.inode.key.device == self._backing.device:
                self._settler.note(Touched(handle.inode.key.ino, found, sets_times))
            return
        st = self._backing.lstat(self._resolve(path or ROOT))
        if stat.S_ISREG(st.st_mode):
            if privileges and (inode := self._openfiles.get(Key.of(st))) is not None:
                inode.privileges_checked = False
            if self._is_ours(st):
                self._settler.note(Touched(Ino(st.st_ino), path or ROOT, sets_times))

    # -- extended attributes ------------------------------------------------------------------------------------------

    def getxattr(self, path: bytes, name: bytes, caller: Caller) -> bytes:
        path = self._resolve(path)
        if name.startswith(_RESERVED_XATTRS):
            if not path and name == OUR_XATTRS + b"control":
                return self.control_path
            if name.startswith(OUR_XATTRS):
                return self._answer(path, name[len(OUR_XATTRS) :], caller)
            raise _errno(errno.ENODATA)
        return self._backing.getxattr(path, name)

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int, caller: Caller) -> None:
        backing_path = self._resolve(path)
        if name.startswith(_RESERVED_XATTRS):
            raise _errno(errno.EPERM)
        with self._gate.shared():
            self._backing.setxattr(backing_path, name, value, flags)
            if name == _ACCESS_ACL and self._backing.privileged and caller.uid:
                # As the backing filesystem does for who sets it, for whom it takes us (posix_acl_update_mode).
                st = self._backing.lstat(backing_path)
                groups = [caller.gid, *(supplementary_groups(caller.pid) or [])]
                if st.st_mode & stat.S_ISGID and not stat.S_ISDIR(st.st_mode) and st.st_gid not in groups:
                    self._backing.chmod(backing_path, stat.S_IMODE(st.st_mode) & ~stat.S_ISGID)
            self._note_touched(path, None, privileges=name == _CAPABILITY)

    def listxattr(self, path: bytes, caller: Caller) -> list[bytes]:
        hidden = _RESERVED_XATTRS if caller.uid == 0 else (*_RESERVED_XATTRS, b"trusted.")  # xattr(7)
        return [name for name in self._backing.listxattr(self._resolve(path)) if not name.startswith(hidden)]

    def removexattr(self, path: bytes, name: bytes) -> None:
        backing_path = self._resolve(path)
        if name.startswith(_RESERVED_XATTRS):
            raise _errno(errno.EPERM)
        with self._gate.shared():
            self._backing.removexattr(backing_path, name)
            self._note_touched(path, None)


def _beside(path: bytes, name: bytes) -> bytes:
    return path[: path.rfind(b"/") + 1] + name


def _full_blocks(st: os.stat_result) -> int:
    return -(-st.st_size // 4096) * 8
