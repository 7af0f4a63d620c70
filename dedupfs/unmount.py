"""Unmounting, and waiting for the daemon to end; and dead mounts, which a daemon leaves that is killed.

A dead mount answers ENOTCONN, and hides what is beneath it. That is worth keeping until another one takes its place:
where the bare directory is seen, references read as zeros, and what is written is written past the mount.
"""

import ctypes
import errno
import os
import select
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from . import control
from .backing import checked
from .errors import Busy, NotMounted, SourceError, Unavailable, UsageError

FUSERMOUNT = "fusermount3"

_PATIENCE_S = 5

# unshare(2), mount(2), umount2(2)
_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 1 << 18
_DETACH_NOFOLLOW = 2 | 8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p]

Seen = TypeVar("Seen")


def unmount(mountpoint: str, still_there: Callable[[int], None]) -> None:
    """Unmount, and return when the daemon has ended, so that its store is closed and marked clean.

    `still_there` is called once, with the daemon's process ID, when that takes long. The dead mount of a killed daemon
    is removed. Raises NotMounted, Busy while something in it is in use, Unavailable, OSError.
    """
    mountpoint = os.path.realpath(mountpoint)
    try:
        socket_path = control.mount_at(mountpoint)
    except NotMounted:
        if _mounted_type(mountpoint) != control.FUSE_TYPE:
            raise NotMounted(
                f"{mountpoint} is a dead mount, but not one of dedupfs; run umount -l {mountpoint}"
            ) from None
        _run_unmount(mountpoint, lazy=True)
        return
    if socket_path is None:
        raise NotMounted(f"no dedupfs is mounted at {mountpoint}")
    pid = control.daemon_pid(socket_path)
    daemon = os.pidfd_open(pid)
    try:
        _run_unmount(mountpoint, lazy=False)
        ended = select.poll()
        ended.register(daemon, select.POLLIN)
        if not ended.poll(_PATIENCE_S * 1000):
            still_there(pid)
            ended.poll()
    finally:
        os.close(daemon)


def is_dead(mountpoint: str) -> bool:
    """Whether a killed daemon's mount is there."""
    try:
        control.mount_at(os.path.realpath(mountpoint))
    except NotMounted:
        return _mounted_type(os.path.realpath(mountpoint)) == control.FUSE_TYPE
    except (UsageError, SourceError):
        pass  # deeper in another mount, or not there
    return False


def detach_dead(mountpoint: str) -> None:
    """Let what a killed daemon left go at once, and nothing else. Raises OSError: root."""
    while is_dead(mountpoint):
        checked(_libc.umount2(os.fsencode(mountpoint), _DETACH_NOFOLLOW))


def beneath(mountpoint: str, look: Callable[[], Seen]) -> Seen:
    """What `look` answers, which sees what dead mounts at `mountpoint` hide; all others see these still.

    It runs in a thread with a mount namespace of its own. A directory that it opens is good for what is on that
    filesystem; those that are mounted in it go with the thread. Raises OSError (root), and what `look` raises.
    """

    def enter() -> Seen:
        checked(_libc.unshare(_CLONE_NEWNS))
        checked(_libc.mount(None, b"/", None, _MS_REC_PRIVATE, None))  # or everybody would lose what is detached here
        detach_dead(mountpoint)
        return look()

    with ThreadPoolExecutor(1, "beneath") as pool:
        return pool.submit(enter).result()


def _run_unmount(mountpoint: str, *, lazy: bool) -> None:
    if shutil.which(FUSERMOUNT) is not None:
        command = [FUSERMOUNT, "-u", *(["-z"] if lazy else [])]
    elif os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else [])]
    else:
        raise Unavailable(f"{FUSERMOUNT} is missing, without which only root can unmount; install the package fuse3")
    done = subprocess.run(
        [*command, "--", mountpoint],
        env={**os.environ, "LC_ALL": "C"},  # the reason has to be recognised
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
    )
    if done.returncode == 0:
        return
    reason = " ".join(done.stderr.split())
    if "busy" in reason:
        raise Busy(
            f"{mountpoint} is in use; close what is open in it (fuser -vm {mountpoint} shows what) and try again"
        )
    raise OSError(errno.EPERM, f"cannot unmount: {reason}", mountpoint)


def _mounted_type(mountpoint: str) -> str | None:
    """What /proc says is mounted there last: the one way to ask about a mount that answers nothing."""
    found = None
    with open("/proc/thread-self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields, _, filesystem = line.partition(" - ")
            if _unescape(fields.split(" ")[4]) == mountpoint:
                found = filesystem.split(" ", 1)[0]
    return found


def _unescape(field: str) -> str:
    for character in " \t\n\\":
        field = field.replace(f"\\{ord(character):03o}", character)
    return field
