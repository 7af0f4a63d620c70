"""May this caller list and read that path? Asked of the kernel with the caller's own credentials.

A thread of its own takes on the caller's file-system user, group and supplementary groups (Linux keeps them per
thread), which drops root's power over permissions, and then asks faccessat2 for every directory on the way and the
file: modes, ACLs and mounted filesystems all count as they would for the caller. Where we are not root we cannot take
on anybody, and answer only ourselves.
"""

import ctypes
import os
import platform
from concurrent.futures import ThreadPoolExecutor

from .backing import Backing
from .model import Caller

# glibc's setgroups changes all threads; the bare system call changes the one that makes it.
_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159, "ppc64le": 81, "s390x": 206}.get(platform.machine())

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class AsCaller:
    """Answers for callers, one question at a time."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="asking")

    def readable(self, paths: list[bytes], caller: Caller) -> list[bytes]:
        """Those of `paths` that the caller could have found by listing directories, and could read."""
        if caller.uid == 0 and self._backing.privileged:
            return paths
        if caller.uid == os.geteuid():
            return self._filter(paths)
        if not self._backing.privileged or _SETGROUPS is None:
            return []
        return self._thread.submit(self._as_caller, paths, caller).result()

    def _as_caller(self, paths: list[bytes], caller: Caller) -> list[bytes]:
        groups = supplementary_groups(caller.pid)
        if groups is None:
            return []
        ours = os.getgroups()
        try:
            self._setgroups(groups)
            _libc.setfsgid(caller.gid)
            _libc.setfsuid(caller.uid)
            if _libc.setfsuid(-1) != caller.uid:
                return []
            return self._filter(paths)
        finally:
            _libc.setfsuid(os.geteuid())
            _libc.setfsgid(os.getegid())
            self._setgroups(ours)

    @staticmethod
    def _setgroups(groups: list[int]) -> None:
        array = (ctypes.c_uint32 * max(1, len(groups)))(*groups)
        if _libc.syscall(_SETGROUPS, len(groups), array) != 0:
            raise OSError(ctypes.get_errno(), "setgroups")

    def _filter(self, paths: list[bytes]) -> list[bytes]:
        allowed: set[bytes] = set()
        return [path for path in paths if self._may_read(path, allowed)]

    def _may_read(self, path: bytes, allowed: set[bytes]) -> bool:
        return self._may_list(os.path.dirname(path), allowed) and self._access(path, os.R_OK)

    def _may_list(self, directory: bytes, allowed: set[bytes]) -> bool:
        """Whether `directory` and all above it can be listed and passed; `allowed` remembers those that can."""
        if directory not in allowed:
            if directory and not self._may_list(os.path.dirname(directory), allowed):
                return False
            if not self._access(directory or b".", os.R_OK | os.X_OK):
                return False
            allowed.add(directory)
        return True

    def _access(self, path: bytes, mode: int) -> bool:
        return os.access(path, mode, dir_fd=self._backing.root_fd, effective_ids=True, follow_symlinks=False)

    def close(self) -> None:
        self._thread.shutdown()


def supplementary_groups(pid: int) -> list[int] | None:
    """The supplementary groups of a process, None when it cannot be known."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("Groups:"):
                    return [int(word) for word in line.split()[1:]]
    except (OSError, ValueError):
        return None
    return None
