"""The adapter between libfuse and `vfs`: raw requests in, calls and errnos out. The only module that knows the binding.

mfusepy's own libfuse 3 handlers drop arguments that POSIX needs (flags of rename, the file handle of chmod, UTIME_OMIT)
and it has none for some calls, so this subclass takes the raw callbacks. Paths are bytes throughout. libfuse calls from
threads of its own, many at once; a callback must not raise.

What the kernel caches it is told to forget here: libfuse's high-level API knows each name of a hard link as another
file, so that whoever changes an inode through one name invalidates the others.
"""

import ctypes
import errno
import logging
import os
import re
import stat
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import get_ident
from types import SimpleNamespace
from typing import Any, NamedTuple

from .backing import RENAME_EXCHANGE
from .config import Passthrough as Wanted
from .engine import Engine
from .errors import DedupfsError, SourceError, Unavailable
from .hardlinks import OtherNames
from .kernelcache import KernelPages
from .libfuse import ENDED_BY_SIGNAL, Mounting, Session, caller, dotted, fuse, request
from .openfiles import Handle, Key
from .passthrough import Passthrough
from .vfs import Attributes, Directory

log = logging.getLogger(__name__)


_CAP_DONT_MASK = 1 << 6
_CAP_SPLICE_READ = 1 << 9
_CAP_AUTO_INVAL_DATA = 1 << 12
_CAP_READDIRPLUS = 1 << 13
_CAP_READDIRPLUS_AUTO = 1 << 14
_CAP_POSIX_ACL = 1 << 19
_CAP_HANDLE_KILLPRIV_V2 = 1 << 21
_CAP_PASSTHROUGH = 1 << 29

_PASSTHROUGH_LIBFUSE = (3, 17)
_PASSTHROUGH_LINUX = (6, 9)

# The least that the kernel has room for (fuse_readdir_uncached: a page), and what an entry takes of it besides its name
# (struct fuse_direntplus).
_DIRECTORY_BUFFER_BYTES = 4096
_DIRENTPLUS_BYTES = 152
_FILL_DIR_PLUS = 2
_READDIR_PLUS = 1
_KEPT = 0xFFFFFFFF  # chown's -1

# The mount is the only way in, and what changes otherwise is invalidated.
_CACHE_S = 30.0

_MAX_WRITE_BYTES = 1 << 20

_MOMENT_S = 0.05

# A question about a pending file keeps one of libfuse's threads until it is settled: leave enough for everybody else.
_THREADS = 64

# fmt: off
_CALLBACKS = [
    "getattr", "readlink", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "chmod", "chown",
    "truncate", "open", "read", "write", "statfs", "flush", "release", "fsync", "setxattr", "getxattr", "listxattr",
    "removexattr", "opendir", "readdir", "releasedir", "fsyncdir", "init", "create", "utimens", "fallocate",
    "copy_file_range", "lseek",
]
_STATFS = [
    "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax",
]
# fmt: on


# struct stat in one go: several times as fast as field by field. Where each machine has its fields (from st_ino on;
# libfuse sets st_dev), and which of st_nlink and st_mode comes first.
_STAT, _NLINK_FIRST = {
    "x86_64": (struct.Struct("=8xQQIII4xQqqq6q"), True),
    "aarch64": (struct.Struct("=8xQIIIIQ8xqi4xq6q"), False),
}[os.uname().machine]


class Mount(NamedTuple):
    """What others may ask of a mount."""

    # Drop what the kernel has cached of a path that got another inode.
    forget: Callable[[bytes], None]
    # Why the kernel does not read and write files without us; "" where it does.
    why_no_passthrough: Callable[[], str]


def _relative(path: bytes) -> bytes:
    return path[1:]


def _fill(target: Any, attributes: Attributes) -> None:
    st, blocks, nlink = attributes
    atime_s, atime_ns = divmod(st.st_atime_ns, 10**9)
    mtime_s, mtime_ns = divmod(st.st_mtime_ns, 10**9)
    ctime_s, ctime_ns = divmod(st.st_ctime_ns, 10**9)
    first, second = (nlink, st.st_mode) if _NLINK_FIRST else (st.st_mode, nlink)
    # fmt: off
    _STAT.pack_into(
        target, 0, st.st_ino, first, second, st.st_uid, st.st_gid, st.st_rdev, st.st_size, st.st_blksize, blocks,
        atime_s, atime_ns, mtime_s, mtime_ns, ctime_s, ctime_ns,
    )
    # fmt: on


# What libfuse calls an open file that is being unlinked (hidden_name in its fuse.c): node number and a counter.
_HIDDEN_NAME = re.compile(rb"\.fuse_hidden[0-9a-f]{16}")


_thread = threading.local()


def _keep_thread_state() -> None:
    """Let the interpreter keep what it knows of this thread of libfuse's, which it would else make anew for each
    request (two mappings of memory, and a fault): PyGILState_Ensure without its Release, once a thread."""
    _thread.known = True
    ctypes.pythonapi.PyGILState_Ensure()


class _Adapter(fuse.FUSE):  # type: ignore[misc]
    """One mount. Constructing it serves until it is unmounted; every method but `__init__` is a callback."""

    def __init__(
        self,
        engine: Engine,
        mountpoint: str,
        options: list[str],
        fsname: str,
        *,
        passthrough: bool,
        mount_with: Mounting,
        on_ready: Callable[["_Adapter"], None],
    ) -> None:
        self._engine, self._vfs, self._io = engine, engine.vfs, engine.vfs.io
        self._wants_passthrough = passthrough
        self._passthrough: Passthrough | None = None
        self._on_ready = on_ready
        self.session = Session(threads=_THREADS, mount_with=mount_with)
        self._names = OtherNames(engine.openfiles)
        self._pages = KernelPages(engine.openfiles)
        self._invalidating = ThreadPoolExecutor(4, "invalidating")
        self._handles: dict[int, Handle] = {}
        self._directories: dict[int, Directory] = {}
        # What was done for the request that a thread serves (libfuse makes several calls for some), by thread: changed
        # attributes in which request; asked for which name of libfuse's manner in which request; hid an open file in
        # which request, under which name.
        self._set_attributes: dict[int, int] = {}
        self._probed: dict[int, tuple[int, bytes]] = {}
        self._hid: dict[int, tuple[int, bytes]] = {}
        words: dict[str, object] = {
            "fsname": fsname.replace("\\", "\\\\").replace(",", "\\,"),
        }
        for option in options:
            key, _, value = option.partition("=")
            words[key] = value or True
        callbacks = SimpleNamespace(use_ns=True, **dict.fromkeys(_CALLBACKS, True))
        fuse.fuse_main_real = self.session.main
        try:
            super().__init__(callbacks, mountpoint, **words)
        finally:
            if self._passthrough is not None:
                self._passthrough.end()

    def _wrapper(self, func: Callable[..., int | None], *args: object) -> int:
        if not hasattr(_thread, "known"):
            _keep_thread_state()
        try:
            return func(*args) or 0
        except OSError as error:
            if (
                error.errno == errno.ENOENT
                and isinstance(args[0], bytes)
                and self._vfs.was_put_back(_relative(args[0]))
            ):
                return -errno.ESTALE  # its last handle went since the call began
            return -(error.errno or errno.EIO)
        except DedupfsError as error:
            log.error("%s %s: %s", func.__name__, args[0], error)
            return -error.errno
        except Exception:
            log.exception("%s failed", func.__name__)
            return -errno.EIO
        except BaseException:
            log.exception("%s was interrupted", func.__name__)
            return -errno.EINTR

    # -- mounting -----------------------------------------------------------------------------------------------------

    def init_fuse_3(self, connection: Any, config: Any) -> None:
        conn, conf = connection.contents, config.contents
        for wanted in (_CAP_READDIRPLUS, _CAP_POSIX_ACL, _CAP_DONT_MASK, _CAP_HANDLE_KILLPRIV_V2):
            conn.want |= conn.capable & wanted
        # Attributes with every entry: programs that list an archive look at what they find, or else pay little.
        conn.want &= ~_CAP_READDIRPLUS_AUTO
        # Through a pipe a request takes two system calls more, and what is written is copied once more.
        conn.want &= ~_CAP_SPLICE_READ
        # Not by the kernel's own judgement, under those who write (see `kernelcache`).
        conn.want &= ~_CAP_AUTO_INVAL_DATA
        conn.max_write = _MAX_WRITE_BYTES
        conf.use_ino = 1
        conf.nullpath_ok = 1
        conf.hard_remove = 0
        conf.entry_timeout = conf.attr_timeout = _CACHE_S
        conf.negative_timeout = 0.0
        os.umask(0)
        if self._wants_passthrough and conn.capable & _CAP_PASSTHROUGH:
            conn.want |= _CAP_PASSTHROUGH
            conn.max_backing_stack_depth = 1
            self._passthrough = Passthrough(self.session.fd, self._engine.backing, self._engine.openfiles)
            self._io.kernel_may_serve = True
        self._on_ready(self)

    def why_no_passthrough(self) -> str:
        if self._passthrough is None:
            return "the kernel offers no passthrough for FUSE"
        return self._passthrough.refused

    def replaced(self, path: bytes) -> None:
        """Another inode came to a path, which changed its directory as well."""
        is_written = False  # then its pages stay; the kernel asks after each write anyway, and it is settled again
        with suppress(OSError):
            is_written = self._engine.openfiles.is_written(Key.of(self._engine.backing.lstat(path)))
        if not is_written:
            self.session.invalidate(path)
        self.session.invalidate(os.path.dirname(path))

    def _invalidate_others(self, st: os.stat_result, path: bytes | None) -> None:
        for name in self._names.of(Key.of(st), path):
            self.session.invalidate(name)

    def _written(self, handle: Handle) -> None:
        """Content changed: let the other names of the file show it before the writer is answered.

        The kernel drops the pages of such a name only when nobody holds one, and a writer by that name may hold one
        while he waits for us to do the same with this name: so this is not waited for longer than a moment.
        """
        if self._names:
            for name in self._names.of_written(handle):
                with suppress(TimeoutError):
                    self._invalidating.submit(self.session.invalidate, name).result(_MOMENT_S)

    def _handle(self, fip: Any) -> Handle | None:
        return self._handles.get(fip.contents.fh) if fip else None

    def _changed(self, path: bytes | None, handle: Handle | None) -> None:
        """Attributes of an inode changed: its other names must show that."""
        if not self._names:
            return
        with suppress(OSError):
            st = os.fstat(handle.own_fd) if handle is not None else self._vfs.getattr(_relative(path or b"/")).st
            self._invalidate_others(st, _relative(path) if path else None)

    # -- names --------------------------------------------------------------------------------------------------------

    def getattr_fuse_3(self, path: bytes | None, buffer: Any, fip: Any) -> int:
        handle = self._handle(fip)
        if handle is not None:
            found = self._vfs.getattr_open(handle)
            if self._set_attributes.get(get_ident()) == request():
                # Here libfuse does not take off the link that it keeps of an unlinked file, as it does otherwise.
                found = found._replace(nlink=found.nlink - self._vfs.names_hidden(handle))
        elif path is None:
            return -errno.ESTALE
        else:
            relative = _relative(path)
            name = relative.rpartition(b"/")[2]
            looks_hidden = _HIDDEN_NAME.fullmatch(name)
            if looks_hidden:
                self._probed[get_ident()] = (request(), name)
            found = self._vfs.getattr(relative)
            if looks_hidden and self._set_attributes.get(get_ident()) == request() and self._vfs.is_unlinked(relative):
                found = found._replace(nlink=found.nlink - 1)  # as above
            if found.nlink > 1 and not stat.S_ISDIR(found.st.st_mode):
                self._names.seen(found.st, relative)
        _fill(buffer.contents, found)
        return 0

    def readlink(self, path: bytes, buffer: Any, size: int) -> int:
        target = self._vfs.readlink(_relative(path))[: size - 1] + b"\0"
        ctypes.memmove(buffer, target, len(target))
        return 0

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        self._vfs.mknod(_relative(path), mode, device, caller())

    def mkdir(self, path: bytes, mode: int) -> None:
        self._vfs.mkdir(_relative(path), mode, caller())

    def symlink(self, target: bytes, path: bytes) -> None:
        self._vfs.symlink(target, _relative(path), caller())

    def unlink(self, path: bytes) -> None:
        relative = _relative(path)
        self._pages.forget(relative)
        try:
            st = self._vfs.unlink(relative)
        except FileNotFoundError:
            # For one request libfuse hid a file and, as that is not open any more, removes it: it went with its last
            # handle.
            if self._hid.get(get_ident()) == (request(), relative.rpartition(b"/")[2]):
                return
            raise
        for other in self._names.gone(st, relative):
            self.session.invalidate(other)

    def rmdir(self, path: bytes) -> None:
        self._vfs.rmdir(_relative(path))

    def link(self, path: bytes, new: bytes) -> None:
        old, relative = _relative(path), _relative(new)
        st = self._vfs.link(old, relative)
        self._names.seen(st, old)
        self._names.seen(st, relative)
        self._invalidate_others(st, relative)

    def rename_fuse_3(self, path: bytes, new: bytes, flags: int) -> None:
        old, relative = _relative(path), _relative(new)
        name = relative.rpartition(b"/")[2]
        if self._probed.pop(get_ident(), None) == (request(), name):
            # Within one request libfuse asked whether the name is free, and now moves a file there: an app that renames
            # a file to such a name asks and renames in two.
            st = self._vfs.hide(old, name)
            self._pages.forget(old)
            self._names.moved(st, old, relative)
            self._invalidate_others(st, relative)
            self._hid[get_ident()] = (request(), name)
            return
        hid_in, hidden = self._hid.pop(get_ident(), (0, b""))
        hid = bool(hid_in) and hid_in == request()
        try:
            if hid and self._vfs.unhide(hidden, relative, old):
                return
            st, replaced = self._vfs.rename(old, relative, flags)
        except BaseException:
            if hid:
                self._vfs.put_back(hidden, relative)
            raise
        is_directory = stat.S_ISDIR(st.st_mode)
        if flags & RENAME_EXCHANGE and replaced is not None:
            is_directory |= stat.S_ISDIR(replaced.st_mode)
            self._pages.moved({old: relative, relative: old}, is_directory=is_directory)
            self._names.exchanged(st, replaced, old, relative)
            self._invalidate_others(replaced, old)
        else:
            if replaced is not None:
                for name in self._names.gone(replaced, relative):
                    self.session.invalidate(name)
            self._pages.moved({old: relative}, is_directory=is_directory)
            self._names.moved(st, old, relative)
        self._invalidate_others(st, relative)

    def opendir(self, path: bytes, fip: Any) -> None:
        directory = self._vfs.opendir(_relative(path))
        fip.contents.fh = id(directory)
        self._directories[id(directory)] = directory

    def readdir_fuse_3(self, path: bytes | None, buffer: Any, filler: Any, offset: int, fip: Any, flags: int) -> int:
        """Answers as many entries as are sure to fit, with their attributes as of now.

        The offsets are . and .. and then the positions of the vfs. Were all entries handed over at once, libfuse would
        keep those that do not fit, and the kernel take their attributes for fresh ones later. And were one handed over
        that does not fit, libfuse would count a look-up of it that the kernel never ends.
        """
        directory = self._directories[fip.contents.fh]
        st = fuse.c_stat()
        room = _DIRECTORY_BUFFER_BYTES - 2 * (_DIRENTPLUS_BYTES + 8)
        for following, name in enumerate((b".", b".."), start=1):
            if offset < following:
                filler(buffer, name, None, following, 0)
        for name, found, following in self._vfs.readdir(directory, max(0, offset - 2)):
            room -= _DIRENTPLUS_BYTES + (len(name) + 7 & ~7)
            if room < 0:
                break
            if found is None:
                filler(buffer, name, None, following + 2, 0)
                continue
            _fill(st, found)
            # What is told of the names of a hard link goes stale: let the kernel look each of them up.
            whole = flags & _READDIR_PLUS and (found.nlink == 1 or stat.S_ISDIR(found.st.st_mode))
            filler(buffer, name, st, following + 2, _FILL_DIR_PLUS if whole else 0)
        return 0

    def releasedir(self, path: bytes | None, fip: Any) -> None:
        os.close(self._directories.pop(fip.contents.fh).fd)

    def fsyncdir(self, path: bytes | None, data_only: int, fip: Any) -> None:
        self._engine.backing.fsync_names(self._directories[fip.contents.fh].fd)

    def statfs(self, path: bytes, buffer: Any) -> None:
        found, target = self._vfs.statfs(_relative(path)), buffer.contents
        for field in _STATFS:
            setattr(target, field, getattr(found, field))

    # -- attributes ---------------------------------------------------------------------------------------------------

    def _target(self, path: bytes | None, fip: Any) -> tuple[bytes | None, Handle | None]:
        self._set_attributes[get_ident()] = request()
        handle = self._handle(fip)
        if handle is None and path is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return (None if path is None else _relative(path)), handle

    def chmod_fuse_3(self, path: bytes | None, mode: int, fip: Any) -> None:
        relative, handle = self._target(path, fip)
        self._vfs.chmod(relative, handle, mode & 0o7777)
        self._changed(path, handle)

    def chown_fuse_3(self, path: bytes | None, uid: int, gid: int, fip: Any) -> None:
        relative, handle = self._target(path, fip)
        self._vfs.chown(relative, handle, -1 if uid == _KEPT else uid, -1 if gid == _KEPT else gid)
        self._changed(path, handle)

    def utimens_fuse_3(self, path: bytes | None, times: Any, fip: Any) -> None:
        relative, handle = self._target(path, fip)
        self._vfs.utimens(relative, handle, ctypes.cast(times, ctypes.c_void_p).value)
        self._changed(path, handle)

    def truncate_fuse_3(self, path: bytes | None, size_bytes: int, fip: Any) -> None:
        relative, handle = self._target(path, fip)
        self._vfs.truncate(relative, handle, size_bytes, caller())
        self._changed(path, handle)

    def setxattr(self, path: bytes, name: bytes, value: Any, size: int, flags: int) -> None:
        self._vfs.setxattr(_relative(path), name, ctypes.string_at(value, size), flags, caller())
        self._changed(path, None)

    def getxattr(self, path: bytes, name: bytes, value: Any, size: int) -> int:
        return _answer(self._vfs.getxattr(_relative(path), name, caller()), value, size)

    def listxattr(self, path: bytes, names: Any, size: int) -> int:
        return _answer(b"".join(name + b"\0" for name in self._vfs.listxattr(_relative(path), caller())), names, size)

    def removexattr(self, path: bytes, name: bytes) -> None:
        self._vfs.removexattr(_relative(path), name)
        self._changed(path, None)

    # -- content ------------------------------------------------------------------------------------------------------

    def open(self, path: bytes, fip: Any) -> None:
        fi = fip.contents
        handle = self._vfs.open(_relative(path), fi.flags, caller())
        self._enter(path, fi, handle)
        if fi.flags & os.O_TRUNC:
            self._written(handle)

    def create(self, path: bytes, mode: int, fip: Any) -> None:
        fi = fip.contents
        self._enter(path, fi, self._vfs.create(_relative(path), fi.flags, mode, caller()))

    def _enter(self, path: bytes, fi: Any, handle: Handle) -> None:
        handle.known_as = _relative(path)
        # A request less where a close() has nothing to say: of a reader, and of a writer who has no other names to
        # tell, no error to hear, and cannot have mapped the file, whose pages the kernel would write back then.
        handle.silent = fi.flags & os.O_ACCMODE == os.O_WRONLY and handle.alone and self._engine.backing.closes_silently
        fi.noflush = int(handle.silent or not handle.writes)
        # Appending through several names, each of which has pages and a length of its own for the kernel: in one piece.
        fi.direct_io = int(handle.appends and not handle.alone)
        if self._passthrough is not None:
            try:
                way = self._passthrough.attach(handle)
            except OSError:
                self._io.release(handle)
                raise
            fi.direct_io |= int(way.direct)
            # struct fuse_file_info {…; uint32_t poll_events; int32_t backing_id; …} since libfuse 3.17: mfusepy
            # declares the two as one number of 64 bits.
            fi.poll_events = way.backing_id << 32
        if handle.inode.backing_file is not None:
            self._pages.forget(handle.known_as)
        else:
            fi.keep_cache = int(self._pages.may_stay(handle))
        handle.may_be_mapped = fi.flags & os.O_ACCMODE == os.O_RDWR
        fi.fh = id(handle)
        self._handles[id(handle)] = handle

    def read(self, path: bytes | None, buffer: Any, size: int, offset: int, fip: Any) -> int:
        view = memoryview((ctypes.c_char * size).from_address(ctypes.addressof(buffer.contents))).cast("B")
        return self._io.read(self._handles[fip.contents.fh], view, offset)

    def write(self, path: bytes | None, buffer: Any, size: int, offset: int, fip: Any) -> int:
        fi = fip.contents
        view = memoryview((ctypes.c_char * size).from_address(ctypes.addressof(buffer.contents))).cast("B")
        handle = self._handles[fi.fh]
        if not fi.writepage:
            handle.appends = bool(fi.flags & os.O_APPEND)  # as of now: fcntl(2) may have changed it
        count = self._io.write(handle, view, offset, caller(), cached=bool(fi.writepage))
        self._written(handle)
        return count

    def flush(self, path: bytes | None, fip: Any) -> None:
        handle = self._handles[fip.contents.fh]
        self._io.flush(handle)
        if handle.writes:
            self._changed(path, handle)
            self._mapped(handle)

    def release(self, path: bytes | None, fip: Any) -> None:
        handle = self._handles.pop(fip.contents.fh)
        others = self._names.of(handle.inode.key, None) if self._names else []
        if handle.writes and handle.inode.backing_file is None and not self._vfs.is_unlinked(handle.known_as):
            self._pages.written(handle)
        self._io.release(handle)
        for name in others:  # one link less, if it was the last handle of a name that had been unlinked
            self.session.invalidate(name)

    def fsync(self, path: bytes | None, data_only: int, fip: Any) -> None:
        handle = self._handles[fip.contents.fh]
        self._io.fsync(handle, data_only=bool(data_only))
        self._mapped(handle)

    def _mapped(self, handle: Handle) -> None:
        """What an app writes through a mapping of a file that is passed through, nobody tells the kernel's FUSE: let it
        ask for size and times again."""
        if handle.may_be_mapped and handle.inode.backing_file is not None:
            path = self._vfs.path_of(handle)
            if path is not None:
                self.session.invalidate(path)

    def fallocate(self, path: bytes | None, mode: int, offset: int, length: int, fip: Any) -> None:
        handle = self._handles[fip.contents.fh]
        self._io.fallocate(handle, mode, offset, length, caller())
        self._written(handle)

    def lseek(self, path: bytes | None, offset: int, whence: int, fip: Any) -> int:
        return self._io.seek(self._handles[fip.contents.fh], offset, whence)

    def copy_file_range(
        self,
        path_in: bytes | None,
        fip_in: Any,
        offset_in: int,
        path_out: bytes | None,
        fip_out: Any,
        offset_out: int,
        size: int,
        flags: int,
    ) -> int:
        source, target = self._handles[fip_in.contents.fh], self._handles[fip_out.contents.fh]
        count = self._io.copy_range(source, offset_in, target, offset_out, size, caller())
        self._written(target)
        return count


def _answer(value: bytes, buffer: Any, size: int) -> int:
    """Give an xattr's value as getxattr(2) does: its length when that is asked, ERANGE when it does not fit."""
    if not size:
        return len(value)
    if len(value) > size:
        return -errno.ERANGE
    ctypes.memmove(buffer, value, len(value))
    return len(value)


def _why_not_passthrough(wanted: Wanted) -> str:
    """What stands in its way, as far as that can be known before mounting."""
    if wanted is Wanted.OFF:
        return "passthrough=off"
    version = (fuse.fuse_version_major, fuse.fuse_version_minor)
    if version < _PASSTHROUGH_LIBFUSE:
        needed = dotted(_PASSTHROUGH_LIBFUSE)
        return f"libfuse {dotted(version)} is older than {needed}; scripts/libfuse builds a newer one"
    release = os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is not None and (int(found[1]), int(found[2])) < _PASSTHROUGH_LINUX:
        return f"Linux {release} is older than {dotted(_PASSTHROUGH_LINUX)}"
    if os.geteuid() != 0:
        return "only root may let the kernel pass files through"
    return ""


def serve(
    engine: Engine,
    mountpoint: str,
    options: list[str],
    *,
    fsname: str,
    wanted: Wanted,
    mount_with: Mounting,
    on_ready: Callable[[Mount], None],
) -> None:
    """Mount, and serve until unmounted. `on_ready` is called from FUSE's init.

    Raises Unavailable for passthrough that is wanted and cannot be had, SourceError when mounting fails.
    """
    hindrance = _why_not_passthrough(wanted)
    if hindrance and wanted is Wanted.ON:
        raise Unavailable(f"no passthrough: {hindrance}; leave passthrough=on out to do without")
    ready = threading.Event()
    refused = ""

    def announce(adapter: _Adapter) -> None:
        nonlocal refused
        refused = adapter.why_no_passthrough()
        if refused and wanted is Wanted.ON:
            adapter.session.leave()
            return
        ready.set()
        on_ready(Mount(adapter.replaced, lambda: hindrance or adapter.why_no_passthrough()))

    try:
        _Adapter(
            engine,
            mountpoint,
            options,
            fsname,
            passthrough=not hindrance,
            mount_with=mount_with,
            on_ready=announce,
        )
    except RuntimeError as error:
        if not ready.is_set():
            raise SourceError(f"cannot mount at {mountpoint} (libfuse says {error}); see the lines above") from None
        if error.args != (ENDED_BY_SIGNAL,):
            log.error("libfuse ended with %s", error)
    if not ready.is_set():
        raise Unavailable(f"no passthrough: {refused}; leave passthrough=on out to do without")
