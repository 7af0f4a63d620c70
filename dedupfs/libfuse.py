"""libfuse: which one is used, whether its structs are known, and its main loop. What else of the binding is needed is
in `fusefs`."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from .errors import Unavailable
from .model import Caller

__all__ = ["ENDED_BY_SIGNAL", "Mounting", "Session", "caller", "dotted", "fuse", "request"]


def _choose_libfuse() -> None:
    """mfusepy loads libfuse as it is imported, and libfuse 2 where it finds both: name version 3 before it does."""
    if os.environ.get("FUSE_LIBRARY_PATH"):
        return
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        os.environ["FUSE_LIBRARY_PATH"] = name
        return
    raise Unavailable("libfuse 3 is not installed; install the package libfuse3-3 (or fuse3) of your distribution")


_choose_libfuse()
try:
    import mfusepy as fuse
except (OSError, AttributeError) as error:
    raise Unavailable(f"libfuse cannot be used: {error}") from None

# mfusepy declares libfuse's structs in Python, by the version that the library says it has. They changed within
# libfuse 3. Of what is used here, in bytes, from the headers of 3.14.0, 3.17.2 and 3.18.3 (tests/unit/test_libfuse.py
# compares them with what mfusepy declares):
#
#                                                 3.12 to 3.16    3.17, 3.18
#     fuse_file_info  flags, fh                          0, 16        0, 16
#                     writepage, direct_io, keep_cache   bits 0 to 2 of byte 4
#                     noflush                             7 (8)           7
#                     poll_events, backing_id             32, -       32, 36  mfusepy: one number of 64 bits
#     fuse_conn_info  max_write, capable, want       8, 20, 24    8, 20, 24
#                     max_backing_stack_depth                -           40
#     fuse_config     nullpath_ok                          104           96  3.11 put a field before it, 3.17 moved it
#     fuse_context    size, behind which _request looks     40           40
#     fuse_operations as far as lseek                     same         same  3.18 added statx behind it
#
# 3.14.1 and later 3.14s have the fields of 3.15 (libfuse issue 1029), which the version does not tell. Those lie behind
# the ones used here, but for noflush: what is set there instead, cache_readdir, means nothing for a file. Before 3.12
# there is no option max_threads.
_OLDEST, _NEWEST = (3, 12), (3, 18)
# struct stat is another on each machine, and for those that mfusepy does not know it declares that of a 32-bit x86.
_MACHINES = ("x86_64", "aarch64")


def dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


def _refuse_untried(version: tuple[int, int], machine: str, pointer_bytes: int) -> None:
    if not _OLDEST <= version <= _NEWEST:
        known = f"{dotted(_OLDEST)} to {dotted(_NEWEST)}"
        raise Unavailable(f"libfuse {dotted(version)} was never tried with dedupfs; install one of {known}")
    if machine not in _MACHINES or pointer_bytes != 8:
        known = " and ".join(_MACHINES)
        raise Unavailable(
            f"dedupfs was never tried on {machine} with {pointer_bytes * 8} bits, only on {known} with 64"
        )


_refuse_untried(fuse.get_fuse_version(fuse._libfuse), fuse._machine, ctypes.sizeof(ctypes.c_void_p))

_library = fuse._libfuse
for _function, _result, *_arguments in (
    ("fuse_new_31", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
    ("fuse_mount", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p),
    ("fuse_unmount", None, ctypes.c_void_p),
    ("fuse_destroy", None, ctypes.c_void_p),
    ("fuse_exit", None, ctypes.c_void_p),
    ("fuse_get_session", ctypes.c_void_p, ctypes.c_void_p),
    ("fuse_session_fd", ctypes.c_int, ctypes.c_void_p),
    ("fuse_session_reset", None, ctypes.c_void_p),
    ("fuse_set_signal_handlers", ctypes.c_int, ctypes.c_void_p),
    ("fuse_remove_signal_handlers", None, ctypes.c_void_p),
    ("fuse_loop_cfg_create", ctypes.c_void_p),
    ("fuse_loop_cfg_set_max_threads", None, ctypes.c_void_p, ctypes.c_uint),
    ("fuse_loop_cfg_set_idle_threads", None, ctypes.c_void_p, ctypes.c_uint),
    ("fuse_loop_cfg_destroy", None, ctypes.c_void_p),
    ("fuse_loop_mt", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
    ("fuse_opt_free_args", None, ctypes.c_void_p),
    ("fuse_invalidate_path", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p),
):
    getattr(_library, _function).restype = _result
    getattr(_library, _function).argtypes = _arguments


def caller() -> Caller:
    """Who made the request that this thread serves."""
    context = _library.fuse_get_context().contents
    return Caller(context.uid, context.gid, context.pid, context.umask)


def request() -> int:
    """The number of the request that this thread serves, as the kernel counts them.

    libfuse keeps it where its public context ends: struct fuse_context_i {struct fuse_context ctx; fuse_req_t req;},
    struct fuse_req {struct fuse_session *se; uint64_t unique; ...}: so in 3.14.0, 3.17.2 and 3.18.3.
    """
    context = ctypes.cast(_library.fuse_get_context(), ctypes.c_void_p).value or 0
    pending = ctypes.c_void_p.from_address(context + ctypes.sizeof(fuse.fuse_context)).value
    return ctypes.c_uint64.from_address(pending + 8).value if pending else 0


# What fuse_main(3) answers.
_FAILED_NEW, _FAILED_MOUNT, _FAILED_SIGNALS, ENDED_BY_SIGNAL = 3, 4, 6, 8


# Calls what mounts, 0 when it did, and answers what that does.
Mounting = Callable[[Callable[[], int]], int]


class _Arguments(ctypes.Structure):
    """struct fuse_args of fuse_opt.h."""

    _fields_ = (("argc", ctypes.c_int), ("argv", ctypes.c_void_p), ("allocated", ctypes.c_int))


class Session:
    """One mount from its making to its end, and what others may tell the kernel meanwhile.

    fuse_main(3) in steps, for it frees the session as soon as it is unmounted, also under a thread of ours that is
    telling the kernel of a file. Here those come to their end first.
    """

    def __init__(self, *, threads: int, mount_with: Mounting) -> None:
        """Up to `threads` serve requests. None ends for being idle: the interpreter keeps something for each.
        `mount_with` is called when nothing else is left to be done."""
        self._threads, self._mount_with = threads, mount_with
        self._fuse: int | None = None
        self._lock = threading.Lock()
        self._open = False
        self._telling = 0
        self._main_thread = 0

    def main(self, argc: int, argv: Any, operations: Any, operations_bytes: int, _data: None) -> int:
        """To be called by mfusepy in the place of libfuse's fuse_main_real, with its arguments: the last of argv is
        the mountpoint, the others are for fuse_new(3)."""
        arguments = _Arguments(argc - 1, ctypes.cast(argv, ctypes.c_void_p).value, 0)
        try:
            self._fuse = _library.fuse_new_31(ctypes.byref(arguments), operations, operations_bytes, None)
        finally:
            _library.fuse_opt_free_args(ctypes.byref(arguments))
        if not self._fuse:
            return _FAILED_NEW
        try:
            return self._serve(self._fuse, argv[argc - 1])
        finally:
            _library.fuse_destroy(self._fuse)

    def _serve(self, fuse_: int, mountpoint: bytes) -> int:
        if self._mount_with(lambda: int(_library.fuse_mount(fuse_, mountpoint))):
            return _FAILED_MOUNT
        try:
            os.chdir("/")  # keep no other mount from being unmounted
            session = _library.fuse_get_session(fuse_)
            if _library.fuse_set_signal_handlers(session):
                return _FAILED_SIGNALS
            self._main_thread = threading.get_ident()
            self._open = True
            config = _library.fuse_loop_cfg_create()
            _library.fuse_loop_cfg_set_max_threads(config, self._threads)
            _library.fuse_loop_cfg_set_idle_threads(config, self._threads)
            try:
                result = _library.fuse_loop_mt(fuse_, config)
                while not self._may_end(session):
                    _library.fuse_loop_mt(fuse_, config)
            finally:
                _library.fuse_loop_cfg_destroy(config)
                _library.fuse_remove_signal_handlers(session)
            return ENDED_BY_SIGNAL if result else 0
        finally:
            _library.fuse_unmount(fuse_)

    def _may_end(self, session: int) -> bool:
        """Whether nobody is telling the kernel anything, and nobody will any more.

        Who does may be waiting for pages that an app's request holds, which only we can answer: serve on.
        """
        with self._lock:
            self._open = False
            if self._telling:
                _library.fuse_session_reset(session)
            return not self._telling

    @property
    def fd(self) -> int:
        """The open /dev/fuse."""
        descriptor: int = _library.fuse_session_fd(_library.fuse_get_session(self._fuse))
        return descriptor

    def leave(self) -> None:
        """End it. From a request."""
        _library.fuse_exit(self._fuse)

    def invalidate(self, path: bytes) -> None:
        """Let the kernel forget attributes and pages of a path. Not from a request that holds pages of it."""
        with self._lock:
            if not self._open:
                return
            self._telling += 1
        try:
            _library.fuse_invalidate_path(self._fuse, b"/" + path)
        finally:
            with self._lock:
                self._telling -= 1
                if not self._open and not self._telling:
                    # as any signal that ends libfuse's loop; which waits in the main thread
                    signal.pthread_kill(self._main_thread, signal.SIGTERM)
