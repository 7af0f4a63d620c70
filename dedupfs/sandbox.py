"""Shuts the process that calls it in: nothing to open, nobody to talk to, no rights, little to spend.

Called once, by a worker with one thread, before it touches anything it was sent. What is closed, and by what:

    files       a root directory that does not exist any more (chroot), and Landlock where the kernel has it
    network     a network namespace with nothing in it; a filter of system calls (seccomp) that lets no socket be made;
                Landlock for TCP where there is neither
    rights      an unprivileged user where we were root, no capabilities, no_new_privs; not to be traced by others
    others      Landlock (Linux 6.12): no signals to processes outside
    means       address space, processor time, size of a file; lowest priority for processor and disk
    processes   none can be started, by the same filter, which lets threads be, for decoders want them; where there is
                no such filter, by a limit, and there are no threads either

Files and network have to be closed, by whichever of these ways can be had; else `enter` refuses.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass

from .errors import Unavailable

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_CLONE_NEWUTS = 0x04000000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
# No mount namespace: its copies of all mounts would keep each of them alive after it was unmounted.
_ALONE = _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWNET

_PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_LAST_CAPABILITY = 63

# landlock(7); the same numbers on every architecture
_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
# Which rights each version of Landlock knows: every one is taken away, none given back.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NETWORK_SINCE, _TCP_RIGHTS = 4, 3
_SCOPES_SINCE, _SCOPES = 6, 3  # abstract Unix sockets, signals

_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS, _IOPRIO_IDLE = 1, 3 << 13
_CAPABILITY_HEADER = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process

_NOBODY = 65534

# seccomp(2): instructions for the kernel's filter (code, jumps if true and if false, operand), and what it may answer
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # of struct seccomp_data, little-endian
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_X32_CALLS = 0x40000000
_CLONE_THREAD = 0x00010000
_SYS_CLONE3 = 435
_SYS_IO_URING_SETUP = 425
# architecture; clone; fork and vfork, where there are any, and socket
_FILTERED = {"x86_64": (0xC000003E, 56, (57, 58, 41)), "aarch64": (0xC00000B7, 220, (198,))}


@dataclass(frozen=True, slots=True)
class Limits:
    address_space_bytes: int
    lifetime_cpu_s: int  # for all it ever does; whoever calls may set less for each piece of work


def enter(limits: Limits) -> None:
    """Shut this process in, for good. Raises Unavailable when files or network cannot be closed."""
    machine = platform.machine()
    _lower_priority(machine)
    privileged = os.geteuid() == 0
    alone = int(_libc.unshare(_ALONE if privileged else _ALONE | _CLONE_NEWUSER)) == 0
    rootless = _lose_root_directory()
    _limit_capabilities()
    if privileged:
        _become_nobody()
    _drop_capabilities(machine)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)  # after the change of user, which resets it
    landlock = _restrict()
    filtered = _filter_calls(machine)
    if not rootless and landlock < 1:
        raise Unavailable("the kernel has neither Landlock nor user namespaces: files cannot be closed to a worker")
    if not (alone or filtered) and landlock < _NETWORK_SINCE:
        raise Unavailable("no network namespace, no seccomp, no Landlock 4: the network cannot be closed to a worker")
    if not filtered:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    for what, most in (
        (resource.RLIMIT_AS, limits.address_space_bytes),
        (resource.RLIMIT_CPU, limits.lifetime_cpu_s),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(what, (most, most))


def _lower_priority(machine: str) -> None:
    os.nice(19)
    with suppress(OSError, KeyError):
        _check(_libc.syscall(_SYS_IOPRIO_SET[machine], _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE))


def _lose_root_directory() -> bool:
    """Whether the root directory is now one that was removed: nothing is in it, and nothing can be put there."""
    place = tempfile.mkdtemp(prefix="dedupfs-worker.")
    try:
        os.chdir(place)
    finally:
        os.rmdir(place)
    try:
        os.chroot(".")
    except OSError:
        return False
    return True


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _limit_capabilities() -> None:
    """Let no program that is started ever have any. Needs rights, so it comes before they go."""
    for capability in range(_LAST_CAPABILITY):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # EPERM without rights, EINVAL beyond the last


def _drop_capabilities(machine: str) -> None:
    with suppress(KeyError):
        _check(_libc.syscall(_SYS_CAPSET[machine], _CAPABILITY_HEADER, bytes(24)))


def _restrict() -> int:
    """Take away every right that Landlock knows. Answers its version, 0 where there is none."""
    version = int(
        _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_CREATE_RULESET_VERSION)
    )
    if version < 1:
        return 0
    files = _FILE_RIGHTS[max(known for known in _FILE_RIGHTS if known <= version)]
    rights = struct.pack("=Q", files)
    if version >= _NETWORK_SINCE:
        rights += struct.pack("=Q", _TCP_RIGHTS)
    if version >= _SCOPES_SINCE:
        rights += struct.pack("=Q", _SCOPES)
    ruleset = _check(_libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, rights, ctypes.c_size_t(len(rights)), 0))
    try:
        _check(_libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return version


def _filter_calls(machine: str) -> bool:
    """Let every system call fail that starts a process or makes a socket, and let those be that start a thread. Whether
    that can be had.

    What clone3 would do lies in memory, where a filter cannot look: it is said not to exist, and the C library takes
    clone. Of what is asked of an io_uring no filter hears: there is none.
    """
    if machine not in _FILTERED:
        return False
    architecture, clone, others = _FILTERED[machine]
    refuse, unknown = _FAIL | errno.EPERM, _FAIL | errno.ENOSYS
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, refuse),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, _X32_CALLS),
        (_RETURN, 0, 0, refuse),
        (_EQUAL, 0, 1, _SYS_CLONE3),
        (_RETURN, 0, 0, unknown),
    ]
    for number in (*others, _SYS_IO_URING_SETUP):
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, refuse)]
    program += [
        (_EQUAL, 1, 0, clone),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    filtered = struct.pack("@HP", len(program), ctypes.addressof(code))
    return int(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filtered, 0, 0)) == 0


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, value, 0, 0, 0))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
