"""Unmounting, and waiting for the daemon to end; and dead mounts, which a daemon leaves that is killed.

A dead mount answers ENOTCONN, and hides what is beneath it. That is worth keeping: where the bare directory is seen,
references read as zeros, and what is written is written past the mount. So the next mount comes to lie over the dead
one, which goes when that is over: at no moment is nothing there.
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

# unshare(2), mount(2), umount2(2), open_tree(2), move_mount(2); the numbers are those of all machines
_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 1 << 18
_DETACH_NOFOLLOW = 2 | 8
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT = 428, 429
_AT_FDCWD = -100
_CLONE_MOUNT = 1 | os.O_CLOEXEC
_MOVE_FROM_DESCRIPTOR = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p]

Result = TypeVar("Result")


def unmount(mountpoint: str, still_there: Callable[[int], None]) -> None:
    """Unmount, and return when the daemon has ended, so that its store is closed and marked clean.

    `still_there` is called once, with the daemon's process ID, when that takes long. The dead mount of a killed daemon
    is removed. Raises NotMounted, Busy while something in it is in use, Unavailable, OSError.
    """
    mountpoint = os.path.realpath(mountpoint)
    try:
        socket_path = control.mount_at(mountpoint)
    except NotMounted:
        if _mounted_types(mountpoint)[-1:] != [control.FUSE_TYPE]:
            raise NotMounted(
                f"{mountpoint} is a dead mount, but not one of dedupfs; run umount -l {mountpoint}"
            ) from None
        while is_dead(mountpoint):
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
        return _mounted_types(os.path.realpath(mountpoint))[-1:] == [control.FUSE_TYPE]
    except (UsageError, SourceError):
        pass  # deeper in another mount, or not there
    return False


def detach_dead(mountpoint: str) -> None:
    """Let what killed daemons left go at once, and nothing else. Raises OSError: root."""
    while is_dead(mountpoint):
        _detach(mountpoint)


def beneath(mountpoint: str, act: Callable[[], Result]) -> Result:
    """What `act` answers, for which there are no dead mounts at `mountpoint`; for all others they are there still.

    It runs in a thread with a mount namespace of its own, in which other mounts of dead ones are detached. What it
    mounts goes with the thread. Raises OSError (root), Unavailable, and what `act` raises.
    """

    def enter() -> Result:
        checked(_libc.unshare(_CLONE_NEWNS))
        try:
            checked(_libc.mount(None, b"/", None, _MS_REC_PRIVATE, None))  # or everybody would lose what is detached
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise Unavailable(
                f"a dead mount is at {mountpoint}, and where the root directory is no mount (in a chroot) it cannot be "
                f"mounted over; stop what uses it, run dedupfs umount {mountpoint}, and mount again"
            ) from None
        detach_dead(mountpoint)
        return act()

    with ThreadPoolExecutor(1, "beneath") as pool:
        return pool.submit(enter).result()


def mount_over_dead(mountpoint: str, mount: Callable[[], int]) -> int:
    """What `mount` answers, 0 when it has mounted something at `mountpoint`: it lies over the dead mounts there then,
    which cannot be mounted over otherwise. Raises OSError (root, Linux 5.2), Unavailable."""
    path = os.fsencode(mountpoint)

    def mount_and_clone() -> tuple[int, int]:
        failed = mount()
        if failed:
            return failed, -1
        return 0, checked(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, path, _CLONE_MOUNT))

    failed, clone = beneath(mountpoint, mount_and_clone)
    if failed:
        return failed
    try:
        # One is enough. A daemon that is killed again and again would leave more than the kernel allows for.
        while _mounted_types(mountpoint)[-2:] == [control.FUSE_TYPE] * 2 and is_dead(mountpoint):
            _detach(mountpoint)
        checked(_libc.syscall(_SYS_MOVE_MOUNT, clone, b"", _AT_FDCWD, path, _MOVE_FROM_DESCRIPTOR))
    finally:
        os.close(clone)
    return 0


def _detach(mountpoint: str) -> None:
    checked(_libc.umount2(os.fsencode(mountpoint), _DETACH_NOFOLLOW))


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


def _mounted_types(mountpoint: str) -> list[str]:
    """What /proc says is mounted there, the topmost last: the one way to ask about a mount that answers nothing."""
    found = []
    with open("/proc/thread-self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields, _, filesystem = line.partition(" - ")
            if _unescape(fields.split(" ")[4]) == mountpoint:
                found.append(filesystem.split(" ", 1)[0])
    return found


def _unescape(field: str) -> str:
    for character in " \t\n\\":
        field = field.replace(f"\\{ord(character):03o}", character)
    return field
