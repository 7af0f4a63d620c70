"""The system calls dedupfs makes on the source tree, each one a method, so that a test can make each of them fail.

Everything is relative to one descriptor of the source directory, opened before anything is mounted over it, so that the
same code serves an archive mounted over itself. Called by every storage and engine module; holds no state but that
descriptor and what it learned about the filesystem; any thread may call any method. Errors are the OSError of the call.

The reference xattr lives in `trusted.` when we are privileged (nobody else can write it), else in `user.`.
"""

import ctypes
import errno
import fcntl
import os
import signal
import stat
import struct
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from .codec import decode_reference, encode_reference
from .digest import Checkpoint
from .errors import SourceError
from .model import ROOT, SMALLEST_SHARED_BYTES, Ino, Link, Reference

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

UTIME_OMIT = (1 << 30) - 2

_LARGEST_BLOCK_BYTES = 65536
_MOST_XATTR_BYTES = 256 << 10
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

# include/uapi/linux/fs.h
_FICLONE = 0x40049409
_FIDEDUPERANGE = 0xC0189436
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IMMUTABLE_FL = 0x10
_FILE_DEDUPE_RANGE_DIFFERS = 1
_DEDUPE_HEADER = struct.Struct("=QQHHI")
_DEDUPE_INFO = struct.Struct("=qQQiI")
_DEDUPE_CHUNK_BYTES = 16 << 20  # btrfs refuses more in one call; XFS does not mind

_F_SETSIG = 10
_TICK_NS = 10**9  # more than any filesystem's time stamps lag behind
_F_SETLEASE = 1024
_F_GETLEASE = 1025
_COPY_CHUNK_BYTES = 64 << 20

# Filesystems that refuse a page fault for writing on an immutable file (ext4_page_mkwrite); tried.
_BINDING_FILESYSTEMS = frozenset({"ext3", "ext4"})

# Filesystems whose journal applies metadata changes in the order they were made: a reference that was completed before
# it was renamed into place is complete whenever the rename survived. Elsewhere each reference is fsynced first.
_ORDERED_FILESYSTEMS = frozenset({"ext3", "ext4", "xfs"})

# Filesystems in whose directories a name keeps its place when a rename gives it another inode (ext4_setent,
# xfs_dir_replace).
_REPLACING_FILESYSTEMS = frozenset({"ext4", "xfs"})

# Filesystems that have nothing to say at close(2) that they had not said before, unlike those of a network.
_SILENT_FILESYSTEMS = _ORDERED_FILESYSTEMS | {"btrfs", "f2fs", "tmpfs"}

# Filesystems where a lease is the server's to give (nfs4_setlease, cifs_setlease): none says nothing of writers.
_LEASED_BY_A_SERVER = frozenset({"nfs", "nfs4", "cifs", "smb3"})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
_libc.futimens.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.syncfs.argtypes = [ctypes.c_int]
_AT_SYMLINK_NOFOLLOW = 0x100

# open_tree(2), mount_setattr(2): the same numbers on every architecture
_SYS_OPEN_TREE = 428
_SYS_MOUNT_SETATTR = 442
_AT_EMPTY_PATH = 0x1000
_WHOLE_TREE = 0x8000 | _AT_EMPTY_PATH  # AT_RECURSIVE
_CLONE_TREE = 1 | os.O_CLOEXEC | _WHOLE_TREE
_CLONE_MOUNT = 1 | os.O_CLOEXEC | _AT_EMPTY_PATH
_SYS_OPENAT2 = 437
_PATH_MAX = 4096
_HOW = struct.Struct("=QQQ")  # struct open_how: flags, mode, resolve
_MAKING_FLAGS = os.O_CREAT | os.O_TMPFILE & ~os.O_DIRECTORY  # which have a use for a mode
_BENEATH = 0x02 | 0x04 | 0x08  # RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH
_CACHED = 0x20  # RESOLVE_CACHED, Linux 5.12: fails where it would have to wait for the disk
_CACHED_DIRECTORY = _HOW.pack(os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, _BENEATH | _CACHED)
# Keeps the interpreter meanwhile: for what never waits. Handing it over and back costs more than such a call.
_at_once = ctypes.PyDLL(None)
_at_once.syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
_at_once.close.argtypes = [ctypes.c_int]
_MOUNT_ATTR = struct.Struct("=QQQQ")  # to set, to clear, propagation, user namespace
_MOUNT_ATTR_NOATIME = 0x10
_MOUNT_ATTR__ATIME = 0x70


def checked(result: int) -> int:
    """What a function of the C library answered. Raises OSError with its errno for less than 0."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _inode_flags(fd: int) -> int:
    """ioctl_iflags(2): an int, in whatever room the size in the request's number says."""
    word = bytearray(8)
    fcntl.ioctl(fd, _FS_IOC_GETFLAGS, word)
    return int.from_bytes(word[:4], sys.byteorder)


def _mounts() -> Iterator[tuple[str, str, str]]:
    """Of everything mounted: its mount id, its device number, and the kernel's name for the kind of filesystem."""
    with open("/proc/thread-self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            mount, _, source = line.partition(" - ")
            mount_id, _, device, _ = mount.split(" ", 3)
            yield mount_id, device, source.split(" ", 1)[0]


def filesystem_type(device: int) -> str:
    """The kernel's name for the filesystem with this device number, "" when it is not in the mount table."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((kind for _, found, kind in _mounts() if found == wanted), "")


def _filesystem_of(fd: int) -> str:
    """The same for an open file, by the mount that it was reached through: btrfs answers stat with device numbers of
    its own, which are not in the table."""
    wanted = _mount_of(fd)
    return next((kind for mount_id, _, kind in _mounts() if mount_id == wanted), "")


def _mount_of(fd: int) -> str:
    """The id of the mount that an open file was reached through."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="utf-8") as lines:
        return next(line.split()[1] for line in lines if line.startswith("mnt_id:"))


def _clock_ns() -> int:
    """Where the clock of time stamps stands against one that nobody sets."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class _Place:
    """A directory that is held open for the length of a `with`, and a name in it."""

    __slots__ = ("_fd", "_name", "_owned")

    def __init__(self, fd: int, name: bytes, *, owned: bool) -> None:
        self._fd, self._name, self._owned = fd, name, owned

    def __enter__(self) -> tuple[int, bytes]:
        return self._fd, self._name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owned:
            _at_once.close(self._fd)


def _may_use_trusted() -> bool:
    """Whether we see `trusted.` xattrs: root without CAP_SYS_ADMIN, in a container say, is told that there are none."""
    if os.geteuid() != 0:
        return False
    fd = os.memfd_create("dedupfs", os.MFD_CLOEXEC)
    try:
        os.setxattr(fd, "trusted.dedupfs.probe", b"")
    except OSError as error:
        return error.errno != errno.EPERM
    finally:
        os.close(fd)
    return True


class Backing:
    """One source directory, held open."""

    def __init__(self, source: str | bytes, *, noatime: bool = False, own_mounts: bool = False) -> None:
        """`noatime`: reading leaves access times alone also where it is the kernel that reads; only root can have that.
        `own_mounts`: what is mounted in the source is seen as it is now, also when this mount namespace is no more.

        Raises SourceError when `source` is not a directory that can be opened, and OSError where `own_mounts` cannot be
        had: root, Linux 5.2.
        """
        self.source = os.path.abspath(os.fsencode(source))
        shown = os.fsdecode(self.source)
        try:
            self.root_fd = os.open(self.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            raise SourceError(f"{shown} is not a directory; name the directory that holds the archive") from None
        except OSError as error:
            raise SourceError(f"cannot open {shown}: {error.strerror}") from None
        self.filesystem = _filesystem_of(self.root_fd)
        self._bare_fd = -1
        if own_mounts or noatime:
            with suppress(OSError):  # root, Linux 5.2; from mounts of our own it cannot be had
                self._bare_fd = self._clone_bare()
        if own_mounts:
            self._enter_own_mounts()
        try:
            os.close(self._open_beneath(b".", os.O_PATH))
        except OSError as error:
            os.close(self.root_fd)
            raise SourceError(f"{shown}: openat2(2), which takes Linux 5.6, cannot be used: {error.strerror}") from None
        if noatime:
            with suppress(OSError):
                self._enter_own_mounts(_MOUNT_ATTR.pack(_MOUNT_ATTR_NOATIME, _MOUNT_ATTR__ATIME, 0, 0))
        st = os.fstat(self.root_fd)
        self.device = st.st_dev
        self.root_ino = Ino(st.st_ino)
        self.orders_metadata = self.filesystem in _ORDERED_FILESYSTEMS
        self.replaces_in_place = self.filesystem in _REPLACING_FILESYSTEMS
        self.closes_silently = self.filesystem in _SILENT_FILESYSTEMS
        # Whether nobody can write to an immutable file through a mapping either.
        self.immutable_binds_mappings = self.filesystem in _BINDING_FILESYSTEMS
        self.privileged = os.geteuid() == 0
        self._synced_ns = self._synced_clock_ns = 0
        self.reference_xattr = b"trusted.dedupfs.ref" if _may_use_trusted() else b"user.dedupfs.ref"
        self._root_prefix = self.source.rstrip(b"/") + b"/"  # where the source was when that was last looked at

    def _enter_own_mounts(self, attributes: bytes = b"") -> None:
        """Reach the source through mounts of our own, which may have other attributes (struct mount_attr; Linux 5.12).
        That they keep no access times is for what the kernel reads on its own for an app (see `passthrough`), with the
        app's flags and not with ours."""
        clone = checked(_libc.syscall(_SYS_OPEN_TREE, self.root_fd, b"", _CLONE_TREE))
        try:
            if attributes:
                size_bytes = ctypes.c_size_t(len(attributes))
                checked(_libc.syscall(_SYS_MOUNT_SETATTR, clone, b"", _WHOLE_TREE, attributes, size_bytes))
            root_fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=clone)
        finally:
            os.close(clone)
        os.close(self.root_fd)
        self.root_fd = root_fd

    @contextmanager
    def without_mounts(self) -> Iterator["Backing"]:
        """The source as it is beneath what is mounted in it. Raises OSError where that cannot be had: it takes root and
        Linux 5.2."""
        clone = os.dup(self._bare_fd) if self._bare_fd >= 0 else self._clone_bare()
        try:
            bare = Backing(b"/proc/self/fd/%d" % clone)
        finally:
            os.close(clone)
        try:
            yield bare
        finally:
            bare.close()

    def is_mount_point(self, path: bytes) -> bool:
        """Whether something is mounted over what is at `path` in the source."""
        fd = self.open(path, os.O_PATH)
        try:
            return _mount_of(fd) != _mount_of(self.root_fd)
        finally:
            os.close(fd)

    def _clone_bare(self) -> int:
        return checked(_libc.syscall(_SYS_OPEN_TREE, self.root_fd, b"", _CLONE_MOUNT))

    def close(self) -> None:
        os.close(self.root_fd)
        if self._bare_fd >= 0:
            os.close(self._bare_fd)

    def directory_of(self, path: bytes) -> "_Place":
        """The directory that a path is in, and the name there. We may be root: who can put a symbolic link into the
        source, past the mount, must not lead us out of it."""
        if len(path) >= _PATH_MAX:  # or what is made could not be named as a whole
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        directory, _, name = path.rpartition(b"/")
        if not directory:
            return _Place(self.root_fd, name or b".", owned=False)
        fd = _at_once.syscall(_SYS_OPENAT2, self.root_fd, directory, _CACHED_DIRECTORY, _HOW.size)
        if fd >= 0:
            return _Place(fd, name, owned=True)
        try:
            return _Place(self._open_beneath(directory, os.O_PATH | os.O_DIRECTORY), name, owned=True)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EXDEV):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
            raise

    def _open_beneath(self, path: bytes, flags: int, mode: int = 0) -> int:
        """openat2(2) that follows no symbolic link."""
        how = _HOW.pack(flags | os.O_CLOEXEC, mode, _BENEATH)
        while True:
            with suppress(InterruptedError):
                return checked(_libc.syscall(_SYS_OPENAT2, self.root_fd, path, how, ctypes.c_size_t(len(how))))

    # -- looking ------------------------------------------------------------------------------------------------------

    def lstat(self, path: bytes, directory_fd: int | None = None) -> os.stat_result:
        """`path` is relative to `directory_fd`, or to the source."""
        if directory_fd is not None:
            return os.stat(path or b".", dir_fd=directory_fd, follow_symlinks=False)
        with self.directory_of(path) as (beneath, name):
            return os.stat(name, dir_fd=beneath, follow_symlinks=False)

    def may_be_at(self, path: bytes, ino: Ino) -> bool:
        """Whether an inode is at this path, or that cannot be told: what the disk, or its owner, does not let us look
        at is not gone."""
        try:
            return self.lstat(path).st_ino == ino
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def open(self, path: bytes, flags: int, mode: int = 0o600) -> int:
        """A descriptor; a symbolic link in the last place is never followed."""
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        if b"/" in path:
            try:
                return self._open_beneath(path, flags, mode & 0o7777 if flags & _MAKING_FLAGS else 0)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EXDEV):
                    raise
        with self.directory_of(path) as (beneath, name):  # tells which of the names is a link
            return os.open(name, flags, mode, dir_fd=beneath)

    def open_quietly(self, path: bytes) -> int:
        """A read-only descriptor of a regular file that leaves its access time alone where the kernel allows that."""
        return self._open_quietly(path, os.O_NONBLOCK)  # a FIFO put in the file's place must not hold us up

    def will_need(self, path: bytes, most_bytes: int) -> int:
        """Have the kernel begin to read a file, from its start and at most so much. Answers how much that is."""
        fd = self._open_quietly(path, os.O_NONBLOCK)
        try:
            count = min(os.fstat(fd).st_size, most_bytes)
            os.posix_fadvise(fd, 0, count, os.POSIX_FADV_WILLNEED)
            return count
        finally:
            os.close(fd)

    def _open_quietly(self, path: bytes, flags: int) -> int:
        try:
            return self.open(path, os.O_RDONLY | flags | os.O_NOATIME)
        except PermissionError:
            return self.open(path, os.O_RDONLY | flags)

    def scandir(self, path: bytes) -> Generator[os.DirEntry[str], None, None]:
        """The entries of a directory, whose access time stays; a symbolic link in its place is an error, not followed.

        Names come as `str` (Python has no bytes form for descriptors): `os.fsencode(entry.name)` is the name.
        """
        fd = self._open_quietly(path, os.O_DIRECTORY)
        try:
            with os.scandir(fd) as entries:
                yield from entries
        finally:
            os.close(fd)

    def readlink(self, path: bytes) -> bytes:
        with self.directory_of(path) as (beneath, name):
            return os.readlink(name, dir_fd=beneath)

    def path_of(self, fd: int) -> bytes | None:
        """Where in the source an open descriptor is now, whatever was renamed since; None when it has no name there."""
        if os.fstat(fd).st_nlink == 0:
            return None
        try:
            path = os.readlink(b"/proc/self/fd/%d" % fd)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None  # longer than the kernel can say: a scan finds the file
            raise
        if not path.startswith(self._root_prefix):
            root = os.readlink(b"/proc/self/fd/%d" % self.root_fd)  # it may have been renamed as well
            if path == root:
                return ROOT
            self._root_prefix = root if root.endswith(b"/") else root + b"/"
            if not path.startswith(self._root_prefix):
                return None
        return path[len(self._root_prefix) :]

    def statvfs(self, path: bytes) -> os.statvfs_result:
        fd = self.open(path, os.O_PATH)
        try:
            return os.fstatvfs(fd)
        finally:
            os.close(fd)

    def link_of(self, path: bytes) -> Link:
        """The directory entry at a path. Raises OSError when there is no such directory."""
        directory, _, name = path.rpartition(b"/")
        return Link(Ino(self.lstat(directory).st_ino) if directory else self.root_ino, name)

    # -- names --------------------------------------------------------------------------------------------------------

    def mkdir(self, path: bytes, mode: int) -> None:
        with self.directory_of(path) as (beneath, name):
            os.mkdir(name, mode, dir_fd=beneath)

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        with self.directory_of(path) as (beneath, name):
            os.mknod(name, mode, device, dir_fd=beneath)

    def symlink(self, target: bytes, path: bytes) -> None:
        with self.directory_of(path) as (beneath, name):
            os.symlink(target, name, dir_fd=beneath)

    def unlink(self, path: bytes) -> None:
        with self.directory_of(path) as (beneath, name):
            os.unlink(name, dir_fd=beneath)

    def rmdir(self, path: bytes) -> None:
        with self.directory_of(path) as (beneath, name):
            os.rmdir(name, dir_fd=beneath)

    def link(self, path: bytes | int, new: bytes) -> None:
        """`path`, or an open file, whatever is at its path by now."""
        with self.directory_of(new) as (target, name):
            if isinstance(path, int):
                os.link(b"/proc/self/fd/%d" % path, name, dst_dir_fd=target, follow_symlinks=True)
                return
            with self.directory_of(path) as (source, old):
                os.link(old, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)

    def rename(self, path: bytes, new: bytes, flags: int = 0) -> None:
        with self.directory_of(path) as (source, old), self.directory_of(new) as (target, name):
            if flags:
                checked(_libc.renameat2(source, old, target, name, flags))
            else:
                os.rename(old, name, src_dir_fd=source, dst_dir_fd=target)

    # -- attributes ---------------------------------------------------------------------------------------------------

    def chmod(self, path: bytes, mode: int) -> None:
        # fchmodat has no way not to follow a link before Linux 6.6.
        fd = self.open(path, os.O_PATH)
        try:
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            os.chmod(b"/proc/self/fd/%d" % fd, mode)
        finally:
            os.close(fd)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        with self.directory_of(path) as (beneath, name):
            os.chown(name, uid, gid, dir_fd=beneath, follow_symlinks=False)

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        with self.directory_of(path) as (beneath, name):
            os.utime(name, ns=(atime_ns, mtime_ns), dir_fd=beneath, follow_symlinks=False)

    def set_mtime(self, path: bytes, mtime_ns: int) -> None:
        """Set the modification time and leave the access time as it is."""
        seconds, ns = divmod(mtime_ns, 10**9)
        times = (ctypes.c_long * 4)(0, UTIME_OMIT, seconds, ns)
        self.utimensat(path, ctypes.addressof(times))

    def utimensat(self, path: bytes, times: int | None) -> None:
        """`times`: the address of two struct timespec, UTIME_NOW and UTIME_OMIT included, or None for now."""
        with self.directory_of(path) as (beneath, name):
            checked(_libc.utimensat(beneath, name, times, _AT_SYMLINK_NOFOLLOW))

    @staticmethod
    def futimens(fd: int, times: int | None) -> None:
        checked(_libc.futimens(fd, times))

    # There is no getxattrat before Linux 6.13; the magic link leads into the source even where it is mounted over.

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        with self.directory_of(path) as (beneath, last):
            return os.getxattr(b"/proc/self/fd/%d/%s" % (beneath, last), name, follow_symlinks=False)

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int = 0) -> None:
        with self.directory_of(path) as (beneath, last):
            os.setxattr(b"/proc/self/fd/%d/%s" % (beneath, last), name, value, flags, follow_symlinks=False)

    def listxattr(self, path: bytes) -> list[bytes]:
        with self.directory_of(path) as (beneath, last):
            names = os.listxattr(b"/proc/self/fd/%d/%s" % (beneath, last), follow_symlinks=False)
        return [os.fsencode(name) for name in names]

    def removexattr(self, path: bytes, name: bytes) -> None:
        with self.directory_of(path) as (beneath, last):
            os.removexattr(b"/proc/self/fd/%d/%s" % (beneath, last), name, follow_symlinks=False)

    # -- references ---------------------------------------------------------------------------------------------------

    @staticmethod
    def may_be_reference(st: os.stat_result) -> bool:
        """Whether an inode looks as a reference does: a regular file with fewer blocks than bytes.

        Spares ordinary files the xattr call. A reference may own a block (of xattrs too long for its inode).
        """
        return stat.S_ISREG(st.st_mode) and st.st_size >= SMALLEST_SHARED_BYTES and st.st_blocks * 512 < st.st_size

    @staticmethod
    def is_no_reference(st: os.stat_result) -> bool:
        """Whether an inode is surely none, whatever room its xattrs take."""
        own_bytes = st.st_blocks * 512
        return not stat.S_ISREG(st.st_mode) or own_bytes >= max(st.st_size, _MOST_XATTR_BYTES)

    def read_reference(self, path: bytes, directory_fd: int | None = None) -> Reference | None:
        """The reference that the file carries, None when it carries none. Raises StoreError for one we cannot read.

        `path` is relative to `directory_fd`, or to the source.
        """
        try:
            if directory_fd is not None:
                full = b"/proc/self/fd/%d/%s" % (directory_fd, path)
                value = os.getxattr(full, self.reference_xattr, follow_symlinks=False)
            else:
                value = self.getxattr(path, self.reference_xattr)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return None
            raise
        return decode_reference(value)

    def fread_reference(self, fd: int) -> Reference | None:
        try:
            value = os.getxattr(fd, self.reference_xattr)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return None
            raise
        return decode_reference(value)

    def fset_reference(self, fd: int, reference: Reference) -> None:
        os.setxattr(fd, self.reference_xattr, encode_reference(reference))

    def fremove_reference(self, fd: int) -> None:
        os.removexattr(fd, self.reference_xattr)

    @staticmethod
    def has_data(fd: int) -> bool:
        """Whether the inode has a block of its own. Leaves the descriptor's offset at an unspecified place."""
        try:
            os.lseek(fd, 0, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        return True

    # -- content ------------------------------------------------------------------------------------------------------

    @staticmethod
    def ftruncate(fd: int, size_bytes: int) -> None:
        os.ftruncate(fd, size_bytes)

    @staticmethod
    def truncate(fd: int, size_bytes: int) -> None:
        """As truncate(2), which unlike ftruncate(2) need not touch the times of a file that has that size already."""
        os.truncate(b"/proc/self/fd/%d" % fd, size_bytes)

    def punch(self, fd: int, size_bytes: int) -> None:
        """Give back all blocks of an inode, which keeps its size. Raises OSError (EOPNOTSUPP) where that cannot be."""
        # Beyond the end: to the exact size, the last block would be zeroed and kept.
        whole_blocks = -(-size_bytes // _LARGEST_BLOCK_BYTES) * _LARGEST_BLOCK_BYTES
        self.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, 0, whole_blocks)

    @staticmethod
    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        checked(_libc.fallocate(fd, mode, offset, length))

    @staticmethod
    def copy_range(source: int, target: int, length: int) -> None:
        """Copy the first `length` bytes of `source` to the same place in `target`, sharing extents where that works.

        Raises OSError; EIO when `source` ends early.
        """
        with suppress(OSError):
            if os.fstat(source).st_size == length:
                fcntl.ioctl(target, _FICLONE, source)
                return
        offset = 0
        while offset < length:
            try:
                count = os.copy_file_range(source, target, min(length - offset, _COPY_CHUNK_BYTES), offset, offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                data = os.pread(source, 1 << 20, offset)[: length - offset]
                count = os.pwrite(target, data, offset) if data else 0
            if not count:
                raise OSError(errno.EIO, "content ends before its recorded size")
            offset += count

    @staticmethod
    def clone(source: int, target: int) -> None:
        """Make `target` share all extents of `source`. Raises OSError where the filesystem cannot."""
        fcntl.ioctl(target, _FICLONE, source)

    @staticmethod
    def dedupe(source: int, target: int, size_bytes: int, checkpoint: Checkpoint) -> bool:
        """Let the kernel compare the two and share their extents. False, with nothing lost, when bytes differ.

        ioctl_fideduperange(2). Raises OSError, and what `checkpoint` raises.
        """
        offset = 0
        while offset < size_bytes:
            checkpoint()
            length = min(size_bytes - offset, _DEDUPE_CHUNK_BYTES)
            request = bytearray(
                _DEDUPE_HEADER.pack(offset, length, 1, 0, 0) + _DEDUPE_INFO.pack(target, offset, 0, 0, 0)
            )
            fcntl.ioctl(source, _FIDEDUPERANGE, request)
            _, _, done, status, _ = _DEDUPE_INFO.unpack_from(request, _DEDUPE_HEADER.size)
            if status == _FILE_DEDUPE_RANGE_DIFFERS:
                return False
            if status < 0:
                raise OSError(-status, os.strerror(-status))
            if not done:
                raise OSError(errno.EIO, "the filesystem shared no extents and gave no reason")
            offset += done
        return True

    @staticmethod
    def forget_cached(fd: int) -> None:
        """Let the kernel drop what it has of the file in memory, so that the next read is the disk's."""
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    # -- durability and guards ----------------------------------------------------------------------------------------

    @staticmethod
    def fsync(fd: int) -> None:
        os.fsync(fd)

    @staticmethod
    def fdatasync(fd: int) -> None:
        """Make the bytes and the length durable, and no attribute: on a file that was written back it costs little."""
        os.fdatasync(fd)

    def sync(self) -> None:
        """Flush the whole filesystem. Raises OSError."""
        now_ns, clock_ns = time.time_ns(), _clock_ns()
        checked(_libc.syncfs(self.root_fd))
        self._synced_ns, self._synced_clock_ns = now_ns, clock_ns

    def is_on_disk(self, st: os.stat_result) -> bool:
        """Whether nothing of an inode changed since the last `sync`: flushing it would cost a round to the disk, and
        nothing else. Never while the clock goes otherwise than it did then."""
        return st.st_ctime_ns < self._synced_ns - _TICK_NS and abs(_clock_ns() - self._synced_clock_ns) < _TICK_NS

    def fsync_directory(self, path: bytes) -> None:
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.fsync_names(fd)
        finally:
            os.close(fd)

    def fsync_names(self, directory_fd: int) -> None:
        """Make the names in a directory durable. Raises OSError."""
        if self.orders_metadata:
            self.fsync(directory_fd)
        else:
            # btrfs would log what it thinks is in question. Beside inodes that settling renames into the directory from
            # another one, that has not always been all of it.
            checked(_libc.syncfs(directory_fd))

    @staticmethod
    def is_immutable(fd: int) -> bool:
        """Whether the immutable flag is set; False also where the filesystem has none."""
        try:
            return bool(_inode_flags(fd) & _FS_IMMUTABLE_FL)
        except OSError:
            return False

    @staticmethod
    def fset_immutable(fd: int, *, immutable: bool) -> None:
        """Set or clear the immutable flag, where the filesystem and our rights allow it.

        Raises OSError where there is no room to clear it: btrfs refuses that where a quota is used up.
        """
        try:
            flags = _inode_flags(fd)
            wanted = flags | _FS_IMMUTABLE_FL if immutable else flags & ~_FS_IMMUTABLE_FL
            if wanted != flags:
                fcntl.ioctl(fd, _FS_IOC_SETFLAGS, wanted.to_bytes(4, sys.byteorder) + bytes(4))
        except OSError as error:
            if error.errno in NO_ROOM and not immutable:
                raise

    def take_read_lease(self, fd: int) -> bool:
        """Make a writer who goes around the mount wait until `fd` is closed, or for /proc/sys/fs/lease-break-time.

        Raises BlockingIOError while anybody has the file open or mapped for writing. False where leases cannot be had:
        not on every filesystem, and without privileges not on the files of others. fcntl(2).
        """
        try:
            # The default signal of a lease break, SIGIO, would end the process; SIGURG is ignored by default.
            fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, _F_SETLEASE, fcntl.F_RDLCK)
        except BlockingIOError:
            if self.filesystem in _LEASED_BY_A_SERVER:
                return False
            raise
        except OSError:
            return False
        return True

    @staticmethod
    def lease_is_breaking(fd: int) -> bool:
        """Whether somebody waits for the lease taken on `fd`."""
        return fcntl.fcntl(fd, _F_GETLEASE) != fcntl.F_RDLCK
