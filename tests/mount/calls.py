"""System calls with their results written down, to be made in the mount and in a plain directory.

    python -m tests.mount.calls DIRECTORY USER

makes the calls of every case below, as that user (a number), each in DIRECTORY/<name of the case>, and prints JSON: for
each case what each call gave. `populate` makes such a directory beforehand, as root.
"""

import array
import contextlib
import errno
import fcntl
import functools
import itertools
import json
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support import syscalls
from tests.support.syscalls import (
    FALLOC_FL_COLLAPSE_RANGE,
    FALLOC_FL_INSERT_RANGE,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    UTIME_NOW,
    UTIME_OMIT,
)
from tests.support.tools import OTHER_GROUP, USER

# A group that the ordinary user is not in.
FOREIGN_GROUP = 54399
ANOTHER_USER = 54400

# So far apart that any clock shows it.
_TICK_S = 0.012

# 2001: of a file whose times a user may not set they are told as they are.
_MADE_S = 10**9

CONTENT = random.Random(30).randbytes(20_000)


def populate(place: Path, owner: int, *, for_group: bool = False) -> None:
    """What every case finds: files of one content (which will be shared), and one of everything else. `for_group`: the
    owner's group may do what he may."""
    place.mkdir()

    def make(name: str, mode: int, user: int = owner, group: int = owner, content: bytes = CONTENT) -> None:
        path = place / name
        path.write_bytes(content)
        os.chown(path, user, group)
        os.chmod(path, mode)
        os.utime(path, (_MADE_S, _MADE_S))

    def make_directory(name: str, mode: int, user: int = owner, group: int = owner) -> None:
        path = place / name
        path.mkdir()
        os.chown(path, user, group)
        os.chmod(path, mode)

    for name in ("file", "other", "third"):
        make(name, 0o644)
    make("small", 0o644, content=b"0123456789")
    make("empty", 0o644, content=b"")
    make("suid", 0o6755)
    make("readonly", 0o444)
    make("roots", 0o644, 0, 0)
    make("secret", 0o600, 0, 0)
    make("everybodys", 0o6777, 0, 0)
    make("groups", 0o664, 0, OTHER_GROUP)
    make("foreign", 0o664, 0, FOREIGN_GROUP)
    make_directory("directory", 0o755)
    make("directory/inner", 0o644)
    make_directory("void", 0o755)
    make_directory("roots_directory", 0o755, 0, 0)
    make("roots_directory/file", 0o666, 0, 0)
    make_directory("closed", 0o700, 0, 0)
    make("closed/file", 0o666, 0, 0)
    make_directory("sticky", 0o1777, 0, 0)
    make("sticky/theirs", 0o666, ANOTHER_USER, ANOTHER_USER)
    make("sticky/own", 0o644)
    make_directory("setgid", 0o2775, 0, OTHER_GROUP)
    make_directory("setgid_foreign", 0o2777, 0, FOREIGN_GROUP)
    for name, target in (("link", "file"), ("dangling", "nowhere"), ("loop", "loop"), ("to_directory", "directory")):
        os.symlink(target, place / name)
        os.chown(place / name, owner, owner, follow_symlinks=False)
    os.mkfifo(place / "fifo", 0o644)
    os.chown(place / "fifo", owner, owner)
    os.chown(place, owner, owner)
    for path in (place, *place.rglob("*")) if for_group else ():
        st = path.lstat()
        if st.st_uid == owner and not stat.S_ISLNK(st.st_mode):
            path.chmod(stat.S_IMODE(st.st_mode) | (st.st_mode & 0o700) >> 3)


# --- how calls are written down


def seen(st: os.stat_result) -> dict[str, object]:
    """What of a stat two filesystems of the same kind must agree on."""
    return {
        "mode": oct(st.st_mode),
        "nlink": st.st_nlink,
        "owner": f"{st.st_uid}:{st.st_gid}",
        "size": None if stat.S_ISDIR(st.st_mode) else st.st_size,
        "device": st.st_rdev,
    }


def _shown(value: object) -> object:
    if isinstance(value, os.stat_result):
        return seen(value)
    if isinstance(value, (bytes, bytearray)):
        return repr(bytes(value)) if len(value) <= 40 else f"{len(value)} bytes, {hash_of(bytes(value))}"
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    return value


def hash_of(value: bytes) -> str:
    return f"{random.Random(value).getrandbits(64):016x}"


class Place:
    """The directory of one case, and what its calls gave."""

    def __init__(self, top: str) -> None:
        self.top = top
        self.results: dict[str, object] = {}
        self.is_root = os.geteuid() == 0
        self._open: list[int] = []

    def __getitem__(self, name: str) -> str:
        return f"{self.top}/{name}"

    def note(self, label: str, value: object) -> None:
        number = 2
        while label in self.results:
            label = f"{label.split(' #')[0]} #{number}"
            number += 1
        self.results[label] = _shown(value)

    def call(self, label: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Make a call and note its result, or its errno. Answers the result, None after an error."""
        try:
            result = function(*arguments, **keywords)
        except OSError as error:
            self.note(label, errno.errorcode.get(error.errno or 0, str(error)))
            return None
        except (ValueError, NotImplementedError) as error:
            self.note(label, type(error).__name__)
            return None
        self.note(label, result)
        return result

    def open(self, label: str, name: str, flags: int, mode: int = 0o666) -> int | None:
        """Like `call`; the number of the descriptor is no result. It is closed when the case is over."""
        try:
            fd = os.open(self[name], flags | os.O_NONBLOCK, mode)
        except OSError as error:
            self.note(label, errno.errorcode[error.errno or 0])
            return None
        self.note(label, "open")
        self._open.append(fd)
        return fd

    def fd(self, name: str, flags: int = os.O_RDWR, mode: int = 0o666) -> int:
        """A descriptor for calls on it; opening it is expected to work."""
        fd = os.open(self[name], flags, mode)
        self._open.append(fd)
        return fd

    def lstat(self, label: str, name: str) -> None:
        self.call(f"{label}: lstat {name}", os.lstat, self[name])

    def changes(self, label: str, names: list[str], function: Callable[..., object], *arguments: object) -> None:
        """Make a call and note which times of these files it changed.

        Not of the change time of a directory: a file in it may be shared at any moment.
        """
        before = {name: os.lstat(self[name]) for name in names if os.path.lexists(self[name])}
        time.sleep(_TICK_S)
        self.call(label, function, *arguments)
        for name in before:
            try:
                after = os.lstat(self[name])
            except OSError as error:
                self.note(f"{label}: times of {name}", errno.errorcode[error.errno or 0])
                continue
            changed = [
                field
                for field in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")
                if getattr(before[name], field) != getattr(after, field)
                and not (field == "st_ctime_ns" and stat.S_ISDIR(after.st_mode))
            ]
            self.note(f"{label}: times of {name}", " ".join(field[3:8] for field in changed) or "none")

    def fresh(self, name: str, mode: int = 0o644, content: bytes = b"content") -> str:
        """A new file of ours."""
        with open(self[name], "wb") as file:
            file.write(content)
        os.chmod(self[name], mode)
        return self[name]

    def close(self) -> None:
        for fd in self._open:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._open.clear()


Case = Callable[[Place], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# --- opening


_OPEN_FLAGS = {
    "RDONLY": os.O_RDONLY,
    "WRONLY": os.O_WRONLY,
    "RDWR": os.O_RDWR,
    "WRONLY|APPEND": os.O_WRONLY | os.O_APPEND,
    "RDONLY|TRUNC": os.O_RDONLY | os.O_TRUNC,
    "RDWR|TRUNC": os.O_RDWR | os.O_TRUNC,
    "RDONLY|DIRECTORY": os.O_RDONLY | os.O_DIRECTORY,
    "RDWR|DIRECTORY": os.O_RDWR | os.O_DIRECTORY,
    "RDONLY|NOFOLLOW": os.O_RDONLY | os.O_NOFOLLOW,
    "RDWR|NOFOLLOW": os.O_RDWR | os.O_NOFOLLOW,
    "PATH": os.O_PATH,
    "PATH|NOFOLLOW": os.O_PATH | os.O_NOFOLLOW,
    "RDONLY|NOATIME": os.O_RDONLY | os.O_NOATIME,
    "RDWR|SYNC": os.O_RDWR | os.O_SYNC,
    "RDONLY|CREAT": os.O_RDONLY | os.O_CREAT,
    "RDWR|CREAT|NOFOLLOW": os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW,
    "RDWR|CREAT|EXCL": os.O_RDWR | os.O_CREAT | os.O_EXCL,
    "WRONLY|CREAT|TRUNC": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "accmode 3": 3,
}
_OPEN_TARGETS = [
    *("file", "readonly", "roots", "secret", "everybodys", "groups", "foreign", "directory", "link", "to_directory"),
    *("dangling", "loop", "fifo", "missing", "missing/file", "file/below", "closed/file", "roots_directory/file"),
    *("roots_directory/new", "directory/", "file/", "new/", ".", "..", "n" * 255, "n" * 256, "sticky/theirs"),
    *("directory/../file", "void/../missing", "to_directory/inner", "loop/file", "fifo/x"),
]


@case
def opening(place: Place) -> None:
    for target in _OPEN_TARGETS:
        for words, flags in _OPEN_FLAGS.items():
            place.open(f"open {target[:30]} {words}", target, flags)
        place.close()
        if target not in (".", ".."):
            place.call(f"afterwards {target[:30]}", os.stat, place[target.rstrip("/")])
    place.call("open a long path", os.open, place["d/" * 2100], os.O_RDONLY)
    place.open("open nothing", "", os.O_RDWR)
    place.open("O_TMPFILE", "directory", os.O_TMPFILE | os.O_RDWR)
    place.open("O_DIRECT", "other", os.O_DIRECT | os.O_RDONLY)


@case
def opening_creates(place: Place) -> None:
    for umask, mode in itertools.product((0, 0o022, 0o077, 0o777), (0o666, 0o777, 0o4755, 0o2755, 0o1777, 0)):
        old = os.umask(umask)
        name = f"{umask:o}-{mode:o}"
        place.open(f"{name}: open", name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        place.call(f"{name}: mkdir", os.mkdir, place[f"{name}.d"], mode)
        place.call(f"{name}: mkfifo", os.mkfifo, place[f"{name}.p"], mode)
        place.call(f"{name}: mknod", os.mknod, place[f"{name}.n"], stat.S_IFREG | mode)
        os.umask(old)
        for suffix in ("", ".d", ".p", ".n"):
            place.lstat(name, name + suffix)
    fd = place.fd("readonly from birth", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0)
    place.call("write to what may not be opened", os.write, fd, b"content")
    place.open("reopen it", "readonly from birth", os.O_RDONLY)


@case
def descriptors_allow_what_they_were_opened_for(place: Place) -> None:
    for words, flags in (("read", os.O_RDONLY), ("write", os.O_WRONLY), ("path", os.O_PATH)):
        fd = place.fd("file", flags)
        place.call(f"{words}: pread", os.pread, fd, 10, 0)
        place.call(f"{words}: pwrite", os.pwrite, fd, b"x", 0)
        place.call(f"{words}: pwrite nothing", os.pwrite, fd, b"", 0)
        place.call(f"{words}: ftruncate", os.ftruncate, fd, 20_000)
        place.call(f"{words}: fallocate", syscalls.fallocate, fd, 0, 0, 10)
        place.call(f"{words}: fchmod", os.fchmod, fd, 0o640)
        place.call(f"{words}: fchown", os.fchown, fd, -1, -1)
        place.call(f"{words}: futimens", syscalls.futimens, fd, UTIME_NOW, UTIME_NOW)
        place.call(f"{words}: fstat", os.fstat, fd)
        place.call(f"{words}: fsync", os.fsync, fd)
        place.call(f"{words}: fgetxattr", os.getxattr, fd, "user.none")
        place.call(f"{words}: fsetxattr", os.setxattr, fd, "user.x", b"x")
        place.call(f"{words}: lseek", os.lseek, fd, 5, os.SEEK_SET)
        place.call(f"{words}: SEEK_DATA", os.lseek, fd, 0, os.SEEK_DATA)
        for prot, flag in itertools.product((mmap.PROT_READ, mmap.PROT_WRITE), (mmap.MAP_SHARED, mmap.MAP_PRIVATE)):
            label = f"{words}: mmap {prot} {flag}"
            place.call(label, lambda *mapping: bool(mmap.mmap(fd, 100, *mapping)), flag, prot)  # noqa: B023
    fd = place.fd("directory", os.O_RDONLY)
    place.call("directory: read", os.read, fd, 10)
    place.call("directory: write", os.write, fd, b"x")
    place.call("directory: ftruncate", os.ftruncate, fd, 0)
    place.call("directory: fsync", os.fsync, fd)
    place.call("directory: fchmod", os.fchmod, fd, 0o750)
    place.call("directory: fstat", os.fstat, fd)


@case
def offsets(place: Place) -> None:
    fd = place.fd("file")
    for offset in (-1, 0, 19_999, 20_000, 20_001, 1 << 40, (1 << 63) - 1):
        place.call(f"pread at {offset}", os.pread, fd, 10, offset)
        place.call(f"SEEK_SET {offset}", os.lseek, fd, offset, os.SEEK_SET)
        place.call(f"SEEK_DATA {offset}", os.lseek, fd, offset, os.SEEK_DATA)
        place.call(f"SEEK_HOLE {offset}", os.lseek, fd, offset, os.SEEK_HOLE)
    place.call("SEEK_END", os.lseek, fd, -10, os.SEEK_END)
    place.call("read to the end", os.read, fd, 100)
    place.call("read at the end", os.read, fd, 100)
    place.call("SEEK_CUR", os.lseek, fd, -30_000, os.SEEK_CUR)
    place.call("pwrite at -1", os.pwrite, fd, b"x", -1)
    place.call("pwrite beyond the end", os.pwrite, fd, b"x", 50_000)
    place.call("pwrite at the end of the world", os.pwrite, fd, b"x", (1 << 63) - 2)
    place.call("what lies between", os.pread, fd, 60_000, 0)
    place.call("size", os.fstat, fd)
    place.call("unknown whence", os.lseek, fd, 0, 17)


# --- modes and owners


@case
def setgid_directories(place: Place) -> None:
    for directory in ("setgid", "setgid_foreign"):
        for mode in (0o644, 0o2755, 0o2644, 0o6755):
            name = f"{directory}/{mode:o}"
            place.open(f"create {name}", name, os.O_WRONLY | os.O_CREAT, mode)
            place.lstat("created", name)
            place.call(f"mkdir {name}", os.mkdir, place[name + ".d"], mode)
            place.lstat("made", name + ".d")
            place.call(f"mknod {name}", os.mknod, place[name + ".n"], stat.S_IFREG | mode)
            place.lstat("made", name + ".n")
        place.call("symlink", os.symlink, "x", place[f"{directory}/link"])
        place.lstat("made", f"{directory}/link")
        place.call("mkfifo", os.mkfifo, place[f"{directory}/fifo"])
        place.lstat("made", f"{directory}/fifo")
        place.call("link", os.link, place["file"], place[f"{directory}/linked"])
        place.lstat("linked", f"{directory}/linked")
        place.call("rename", os.rename, place["third"], place[f"{directory}/renamed"])
        place.lstat("renamed", f"{directory}/renamed")
        place.call("mkdir deeper", os.mkdir, place[f"{directory}/644.d/deeper"])
        place.lstat("made", f"{directory}/644.d/deeper")


@case
def chmod(place: Place) -> None:
    for name, mode in itertools.product(
        ("file", "roots", "groups", "foreign", "directory", "setgid", "fifo", "link", "to_directory", "sticky/theirs"),
        (0o600, 0o4755, 0o2755, 0o2644, 0o1777, 0),
    ):
        place.call(f"chmod {name} {mode:o}", os.chmod, place[name], mode)
        place.call(f"{name} is", os.stat, place[name])
    for name in ("missing", "dangling", "loop", "file/x", "closed/file"):
        place.call(f"chmod {name}", os.chmod, place[name], 0o600)
    path = place.fresh("of a foreign group")
    if place.is_root:
        os.chown(path, 0, FOREIGN_GROUP)
    place.call("setgid", os.chmod, path, 0o2755)
    place.lstat("setgid", "of a foreign group")
    fd = place.fd("other")
    place.call("fchmod", os.fchmod, fd, 0o6711)
    place.call("fstat", os.fstat, fd)
    place.lstat("fchmod", "other")


@case
def chown(place: Place) -> None:
    owners = [(-1, -1), (USER, -1), (-1, USER), (-1, OTHER_GROUP), (-1, FOREIGN_GROUP), (0, 0), (ANOTHER_USER, 0)]
    for name in ("file", "suid", "everybodys", "directory", "fifo"):
        for uid, gid in owners:
            with contextlib.suppress(OSError):
                os.chmod(place[name], 0o6755)
            place.call(f"chown {name} {uid}:{gid}", os.chown, place[name], uid, gid)
            place.lstat("chown", name)
    for mode in (0o6755, 0o2755, 0o2745, 0o6644, 0o4644, 0o1777):
        path = place.fresh(f"mode {mode:o}", mode)
        place.call(f"chown {mode:o}", os.chown, path, -1, OTHER_GROUP)
        place.lstat("chown", f"mode {mode:o}")
    for name in ("link", "dangling", "loop", "missing", "closed/file", "roots", "groups"):
        place.call(f"chown {name}", os.chown, place[name], -1, OTHER_GROUP)
        place.call(f"lchown {name}", os.lchown, place[name], -1, OTHER_GROUP)
        place.lstat("lchown", name)
    fd = place.fd("other")
    os.fchmod(fd, 0o6755)
    place.call("fchown", os.fchown, fd, -1, OTHER_GROUP)
    place.call("fstat", os.fstat, fd)


def _write(path: str) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.write(b"x")


def _append(path: str) -> None:
    with open(path, "ab", buffering=0) as file:
        file.write(b"x")


def _write_nothing(path: str) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.write(b"")


def _write_mapped(path: str) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[0:1] = b"y"
        mapping.flush()


def _truncate_open(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def _ftruncate(path: str) -> None:
    with open(path, "r+b") as file:
        os.ftruncate(file.fileno(), 5)


def _allocate(path: str) -> None:
    with open(path, "r+b") as file:
        syscalls.fallocate(file.fileno(), 0, 0, 30_000)


def _punch(path: str) -> None:
    with open(path, "r+b") as file:
        syscalls.fallocate(file.fileno(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1)


def _copy_into(path: str) -> None:
    with open(Path(path).with_name("third"), "rb") as source, open(path, "r+b") as target:
        os.copy_file_range(source.fileno(), target.fileno(), 10, 0, 0)


def _copy_whole_into(path: str) -> None:
    with open(Path(path).with_name("third"), "rb") as source, open(path, "wb") as target:
        os.copy_file_range(source.fileno(), target.fileno(), 1 << 20)


_CHANGES: dict[str, Callable[[str], None]] = {
    "write": _write,
    "append": _append,
    "write nothing": _write_nothing,
    "write mapped": _write_mapped,
    "O_TRUNC": _truncate_open,
    "truncate": lambda path: os.truncate(path, 3),
    "truncate to the same": lambda path: os.truncate(path, os.stat(path).st_size),
    "truncate to more": lambda path: os.truncate(path, 40_000),
    "truncate to nothing": lambda path: os.truncate(path, 0),
    "ftruncate": _ftruncate,
    "fallocate": _allocate,
    "punch": _punch,
    "copy_file_range": _copy_into,
    "copy whole": _copy_whole_into,
}


@case
def set_id_bits_go_when_content_changes(place: Place) -> None:
    for label, change in _CHANGES.items():
        for mode in (0o6755, 0o4644, 0o2755, 0o2644):
            name = f"{label} {mode:o}"
            place.fresh(name, mode, CONTENT)
            place.call(name, change, place[name])
            place.lstat("changed", name)
        # one that is shared
        shutil.copyfile(place["suid"], place[f"{label} shared"])
        os.chmod(place[f"{label} shared"], 0o6755)
        place.call(f"{label} shared", change, place[f"{label} shared"])
        place.lstat("changed", f"{label} shared")
    for label, change in list(_CHANGES.items())[:6]:
        place.call(f"root's: {label}", change, place["everybodys"])
        place.lstat(f"root's: {label}", "everybodys")
    fd = place.fd("suid")
    place.call("pwrite", os.pwrite, fd, b"x", 0)
    place.call("fstat", os.fstat, fd)
    place.call("bits again", os.fchmod, fd, 0o6755)
    place.call("pwrite again", os.pwrite, fd, b"x", 0)
    place.call("fstat again", os.fstat, fd)


@case
def access(place: Place) -> None:
    for name in ("file", "roots", "secret", "groups", "foreign", "closed", "closed/file", "directory", "dangling"):
        for mode in (os.F_OK, os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK):
            place.call(f"access {name} {mode}", os.access, place[name], mode)
    script = place.fresh("script", 0o644, b"#!/bin/sh\necho ran\n")
    for mode in (0o644, 0o744, 0o711, 0o055):
        os.chmod(script, mode)
        place.call(f"run {mode:o}", lambda: subprocess.run([script], capture_output=True).stdout)
    shutil.copyfile("/bin/sleep", place["sleep"])
    os.chmod(place["sleep"], 0o755)
    running = subprocess.Popen([place["sleep"], "10"])
    place.open("write to what runs", "sleep", os.O_WRONLY)
    place.call("truncate what runs", os.truncate, place["sleep"], 5)
    place.call("unlink what runs", os.unlink, place["sleep"])
    running.kill()
    running.wait()
    shutil.copyfile("/bin/true", place["true"])
    os.chmod(place["true"], 0o755)
    with open(place["true"], "ab"):
        place.call("run what is written to", lambda: subprocess.run([place["true"]]).returncode)


# --- size


@case
def truncating(place: Place) -> None:
    names = ["file", "link", "readonly", "roots", "groups", "directory", "missing", "dangling", "loop", "closed/file"]
    for name in [*names, "file/x", "everybodys", "fifo"]:
        for size in (-1, 0, 5, 10_000, 1 << 20):
            place.call(f"truncate {name} {size}", os.truncate, place[name], size)
            place.call(f"{name} is", os.stat, place[name])
    for name in ("other", "third"):
        for size in (19_999, 4096, 30_000, 20_000):
            place.call(f"truncate {name} {size}", os.truncate, place[name], size)
            place.call("content", Path(place[name]).read_bytes)
    place.call("too much", os.truncate, place["small"], 1 << 62)
    place.call("size after too much", os.stat, place["small"])
    fd = place.fd("small")
    for size in (-1, 3, 8):
        place.call(f"ftruncate {size}", os.ftruncate, fd, size)
        place.call("content", os.pread, fd, 20, 0)


@case
def allocating(place: Place) -> None:
    modes = {
        "allocate": 0,
        "keep size": FALLOC_FL_KEEP_SIZE,
        "punch": FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
        "punch without keep": FALLOC_FL_PUNCH_HOLE,
        "zero": FALLOC_FL_ZERO_RANGE,
        "zero and keep": FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
        "collapse": FALLOC_FL_COLLAPSE_RANGE,
        "insert": FALLOC_FL_INSERT_RANGE,
        "unknown": 0x8000,
    }
    ranges = [(0, 4096), (4096, 8192), (100, 10), (18_000, 10_000), (50_000, 1000), (-1, 10), (0, 0), (0, -5)]
    for label, mode in modes.items():
        for offset, length in ranges:
            name = f"{label} {offset} {length}"
            shutil.copyfile(place["file"], place[name])
            with open(place[name], "r+b") as file:
                place.call(name, syscalls.fallocate, file.fileno(), mode, offset, length)
                place.call(f"{name}: stat", os.fstat, file.fileno())
            place.call(f"{name}: content", Path(place[name]).read_bytes)
            os.unlink(place[name])
    with open(place["other"], "r+b") as file:
        place.call("posix_fallocate", os.posix_fallocate, file.fileno(), 0, 30_000)
        place.call("too much", syscalls.fallocate, file.fileno(), 0, 0, 1 << 62)
    place.call("size", os.stat, place["other"])


@case
def holes(place: Place) -> None:
    """Of files of our own: a file that is shared has the holes of whoever was first."""
    pattern = random.Random(place.top.rpartition("/")[0] + str(os.geteuid())).randbytes(4096)
    fd = place.fd("sparse", os.O_RDWR | os.O_CREAT)
    for block in (3, 4, 10, 40):
        os.pwrite(fd, pattern, block * 65_536)
    os.ftruncate(fd, 4 << 20)
    os.fsync(fd)

    def segments() -> list[int]:
        found = [0]
        with contextlib.suppress(OSError):
            for whence in itertools.cycle((os.SEEK_DATA, os.SEEK_HOLE)):
                found.append(os.lseek(fd, found[-1], whence))
        return found

    # Filesystems allocate ahead of a writer, differently each time; punching it out makes it comparable.
    for start in (0, 8 * 65_536, 20 * 65_536):
        syscalls.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, 65_536)
    place.call("the first hole", lambda: segments()[1])
    place.call("data in the middle of a hole", os.lseek, fd, 65_536 + 5, os.SEEK_DATA)
    place.call("a hole in data", os.lseek, fd, 3 * 65_536 + 5, os.SEEK_HOLE)
    place.call("a hole in a hole", os.lseek, fd, 8 * 65_536 + 5, os.SEEK_HOLE)
    place.call("data after the last", os.lseek, fd, 50 * 65_536, os.SEEK_DATA)
    place.call("the hole at the end", os.lseek, fd, (4 << 20) - 1, os.SEEK_HOLE)
    place.call("data beyond the end", os.lseek, fd, 4 << 20, os.SEEK_DATA)
    place.call("a hole beyond the end", os.lseek, fd, 4 << 20, os.SEEK_HOLE)
    place.call("zeros", os.pread, fd, 8192, 8 * 65_536)
    place.call("few blocks", lambda: os.fstat(fd).st_blocks * 512 < 1 << 20)
    place.call("blocks of a shared file", lambda: os.stat(place["file"]).st_blocks * 512 >= 20_000)


@case
def limits(place: Place) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, before[1]))
    try:
        fd = place.fd("file")
        place.call("write up to the limit", os.pwrite, fd, bytes(10_000), 20_000)
        place.call("write beyond", os.pwrite, fd, b"x", 25_000)
        place.call("truncate beyond", os.truncate, place["file"], 30_000)
        place.call("ftruncate beyond", os.ftruncate, fd, 30_000)
        place.call("fallocate beyond", syscalls.fallocate, fd, 0, 0, 30_000)
        place.call("truncate below", os.truncate, place["other"], 24_000)
        place.call("size", os.stat, place["file"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- times


@case
def setting_times(place: Place) -> None:
    moments = {"set": 10**18 + 123_456_789, "now": UTIME_NOW, "omit": UTIME_OMIT, "old": -(10**18) + 1, "0": 0}

    def described(name: str) -> list[object]:
        st = os.lstat(place[name])
        return [ns if ns < 15 * 10**17 else "recent" for ns in (st.st_atime_ns, st.st_mtime_ns)]

    for name in ("file", "directory", "fifo", "roots", "everybodys", "groups", "readonly", "sticky/theirs", "link"):
        for (first, atime_ns), (second, mtime_ns) in itertools.product(moments.items(), moments.items()):
            place.call(f"{name}: {first}, {second}", syscalls.utimens, place[name].encode(), atime_ns, mtime_ns)
            place.call(f"{name}: times after {first}, {second}", described, name)
    for name in ("link", "dangling", "loop"):
        place.call(f"{name} itself", syscalls.utimens, place[name].encode(), 5, 7, follow_symlinks=False)
        place.call(f"{name}: times", described, name)
    for name in ("dangling", "loop", "missing", "closed/file"):
        place.call(name, syscalls.utimens, place[name].encode(), 5, 7)
    for name in ("other", "roots"):
        fd = place.fd(name, os.O_RDONLY)
        place.call(f"futimens {name}", syscalls.futimens, fd, 5, 7)
        place.call(f"futimens {name} now", syscalls.futimens, fd, UTIME_OMIT, UTIME_NOW)
        place.call(f"{name}: times", described, name)
    for seconds in (2**31 - 1, 2**31, 2**33, 2**34 + 2**33, 2**35, -(2**31), -(2**31) - 1):
        place.call(f"{seconds} s", syscalls.utimens, place["third"].encode(), seconds * 10**9, seconds * 10**9)
        place.call(f"{seconds} s: times", lambda: os.stat(place["third"]).st_mtime_ns)
    place.call("too many ns", syscalls.utimens, place["third"].encode(), UTIME_NOW, 10**9 * 3 + 10**9 - 1)


def _read(path: str) -> None:
    """From the disk, as far as that can be wished: what the kernel keeps, nobody hears of."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.read(10)


@case
def what_changes_times(place: Place) -> None:
    old = 10**18
    os.link(place["third"], place["second name"])
    with open(place["plain"], "wb") as file:
        file.write(os.urandom(20_000))
    for name in ("plain", "file", "other", "second name"):
        for label, change in _CHANGES.items():
            os.utime(place[name], ns=(old, old))
            if name == "other":
                shutil.copyfile(place["suid"], place[name])  # whole again, and perhaps shared
                os.utime(place[name], ns=(old, old))
            place.changes(f"{name}: {label}", [name, "."], change, place[name])
    for name in ("roots", "groups", "small", "readonly", "directory/inner"):
        if place.is_root or name in ("small", "readonly", "directory/inner"):
            os.utime(place[name], ns=(old, old))
            place.changes(f"{name}: read", [name], _read, place[name])
            place.changes(f"{name}: read again", [name], _read, place[name])
    of_a_file: dict[str, Callable[[str], object]] = {
        "chmod": lambda path: os.chmod(path, 0o640),
        "chown": lambda path: os.chown(path, -1, OTHER_GROUP),
        "setxattr": lambda path: os.setxattr(path, "user.x", b"x"),
        "removexattr": lambda path: os.removexattr(path, "user.x"),
        "open and close": lambda path: os.close(os.open(path, os.O_RDWR)),
        "stat": os.stat,
        "link": lambda path: os.link(path, path + ".2"),
        "unlink the link": lambda path: os.unlink(path + ".2"),
        "rename": lambda path: os.rename(path, path + ".3"),
        "rename back": lambda path: os.rename(path + ".3", path),
    }
    for label, call in of_a_file.items():
        place.changes(label, ["small", "small.3", "."], call, place["small"])
    of_a_directory: dict[str, Callable[[str], object]] = {
        "create": lambda path: os.close(os.open(path + "/new", os.O_CREAT | os.O_WRONLY)),
        "unlink": lambda path: os.unlink(path + "/new"),
        "mkdir": lambda path: os.mkdir(path + "/new"),
        "rmdir": lambda path: os.rmdir(path + "/new"),
        "symlink": lambda path: os.symlink("x", path + "/new"),
        "rename": lambda path: os.rename(path + "/new", path + "/newer"),
        "mkfifo": lambda path: os.mkfifo(path + "/new"),
        "change a file": lambda path: _append(path + "/inner"),
        "chmod a file": lambda path: os.chmod(path + "/inner", 0o600),
        "exchange": lambda path: syscalls.renameat2(f"{path}/inner".encode(), f"{path}/new".encode(), RENAME_EXCHANGE),
        "rename over": lambda path: os.rename(path + "/newer", path + "/inner"),
        "failing mkdir": lambda path: os.mkdir(path + "/new"),
    }
    for label, call in of_a_directory.items():
        place.changes(f"directory: {label}", ["directory", "."], call, place["directory"])


# --- names


def _make(place: Place, kind: str, name: str) -> None:
    path = place[name]
    match kind:
        case "file":
            place.fresh(name)
        case "shared":
            shutil.copyfile(place["file"], path)
        case "directory":
            os.mkdir(path)
        case "full directory":
            os.mkdir(path)
            place.fresh(f"{name}/inside")
        case "symlink":
            os.symlink("file", path)
        case "fifo":
            os.mkfifo(path)


_KINDS = ("file", "shared", "directory", "full directory", "symlink", "fifo", "missing")


@case
def renaming(place: Place) -> None:
    flag_words = {"": 0, "NOREPLACE": RENAME_NOREPLACE, "EXCHANGE": RENAME_EXCHANGE, "both": 3, "unknown": 1 << 10}
    for (old, new), (words, flags) in itertools.product(itertools.product(_KINDS, _KINDS), flag_words.items()):
        _make(place, old, "old")
        _make(place, new, "new")
        label = f"rename {old} to {new} {words}"
        place.call(label, syscalls.renameat2, place["old"].encode(), place["new"].encode(), flags)
        for name in ("old", "new"):
            place.lstat(label, name)
            with contextlib.suppress(OSError):
                os.unlink(place[name])
            shutil.rmtree(place[name], ignore_errors=True)
    place.call("list", lambda: sorted(os.listdir(place.top)))


@case
def renaming_special(place: Place) -> None:
    def rename(label: str, old: str, new: str, flags: int = 0) -> None:
        place.call(label, syscalls.renameat2, place[old].encode(), place[new].encode(), flags)

    rename("into itself", "directory", "directory/below")
    rename("exchange with below", "directory", "directory/inner", RENAME_EXCHANGE)
    rename("over what holds it", "directory/inner", "directory")
    rename("to itself", "file", "file")
    rename("to itself, not replacing", "file", "file", RENAME_NOREPLACE)
    rename("to itself, exchanging", "file", "file", RENAME_EXCHANGE)
    rename("directory to itself", "directory", "directory")
    rename("dot", "directory/.", "void")
    rename("to dot", "directory", "void/.")
    rename("dot dot", "directory/..", "void")
    rename("file with a slash", "file/", "new")
    rename("file to a name with a slash", "file", "new/")
    rename("directory with slashes", "void/", "void2/")
    rename("too long", "file", "n" * 256)
    rename("longest", "other", "n" * 255)
    rename("missing parent", "file", "missing/x")
    rename("file as parent", "file", "small/x")
    rename("loop", "loop/x", "y")
    rename("root's to ours", "roots_directory/file", "taken")
    rename("ours to root's", "file", "roots_directory/given")
    rename("root's file in our directory", "roots", "roots2")
    rename("another's in a sticky directory", "sticky/theirs", "sticky/ours")
    rename("over another's in a sticky directory", "sticky/own", "sticky/theirs")
    rename("exchange with another's", "small", "sticky/theirs", RENAME_EXCHANGE)
    rename("own in a sticky directory", "sticky/own", "sticky/own2")
    rename("out of a closed directory", "closed/file", "taken")
    rename("whiteout", "third", "third2", RENAME_WHITEOUT)
    for name in ("third", "third2"):
        with contextlib.suppress(OSError):
            os.unlink(place[name])
    os.mkdir(place["d1"])
    os.mkdir(place["d1/sub"], 0o555)
    rename("a directory that we may not write to, elsewhere", "d1/sub", "void2/sub")
    rename("the same, in place", "d1/sub", "d1/sub2")
    rename("root's directory", "roots_directory", "roots_directory2")
    rename("root's directory elsewhere", "roots_directory2", "d1/roots_directory")
    for name in sorted(os.listdir(place.top)):
        place.lstat("afterwards", name)


@case
def renaming_hard_links(place: Place) -> None:
    for what, label in itertools.product(("small", "file"), ("closed", "open")):
        one, two = f"{what} one", f"{what} two"
        shutil.copyfile(place[what], place[one])
        os.link(place[one], place[two])
        fds = [place.fd(one), place.fd(two)] if label == "open" else []
        place.call(f"{label}: one name to the other", os.rename, place[one], place[two])
        place.lstat(label, one)
        place.lstat(label, two)
        for fd in fds:
            place.call(f"{label}: fstat", os.fstat, fd)
        place.close()
        for name in (one, two):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place[name])
    for what in ("small", "file"):
        one, two = f"{what} one", f"{what} two"
        os.rename(place[what], place[one])
        os.link(place[one], place[two])
        place.call("exchange", syscalls.renameat2, place[one].encode(), place[two].encode(), RENAME_EXCHANGE)
        place.call("noreplace", syscalls.renameat2, place[one].encode(), place[two].encode(), RENAME_NOREPLACE)
        place.call("over another", os.rename, place[two], place["other"])
        place.lstat("over another", one)
        place.lstat("over another", "other")
        place.call("rename over one of two", os.rename, place.fresh("new"), place["other"])
        place.lstat("rename over one of two", one)
        place.lstat("rename over one of two", "other")


@case
def linking(place: Place) -> None:
    for name in ("file", "small", "link", "dangling", "fifo", "directory", "missing", "roots", "secret", "groups"):
        place.call(f"link {name}", os.link, place[name], place[f"{name}.2"], follow_symlinks=False)
        place.lstat("linked", name)
        place.lstat("linked", f"{name}.2")
    for name in ("sticky/theirs", "suid", "everybodys", "closed/file", "roots_directory/file"):
        place.call(f"link {name}", os.link, place[name], place["linked " + name.replace("/", "-")])
    place.call("follow", os.link, place["link"], place["followed"], follow_symlinks=True)
    place.lstat("follow", "followed")
    place.call("over a file", os.link, place["file"], place["small"])
    place.call("over itself", os.link, place["file"], place["file"])
    place.call("over a directory", os.link, place["file"], place["directory"])
    place.call("over a symlink", os.link, place["file"], place["dangling"])
    place.call("into root's", os.link, place["file"], place["roots_directory/x"])
    place.call("missing parent", os.link, place["file"], place["missing/x"])
    place.call("too long", os.link, place["file"], place["n" * 256])
    place.call("with a slash", os.link, place["file"], place["x/"])
    place.call("write through the one", Path(place["small"]).write_bytes, b"changed")
    place.call("read through the other", Path(place["small.2"]).read_bytes)
    place.call("truncate the shared one", os.truncate, place["file"], 5)
    place.call("its other name", Path(place["file.2"]).read_bytes)
    place.call("chmod the one", os.chmod, place["file.2"], 0o600)
    place.lstat("the other", "file")
    place.call("unlink the one", os.unlink, place["file"])
    place.lstat("the other", "file.2")
    fd = place.fd("other", os.O_RDONLY)
    os.unlink(place["other"])
    place.call("link what is unlinked", os.link, f"/proc/self/fd/{fd}", place["again"], follow_symlinks=True)


@case
def removing(place: Place) -> None:
    names = ["file", "link", "dangling", "loop", "fifo", "directory", "void", "missing", "roots", "secret"]
    names += ["sticky/theirs", "sticky/own", "roots_directory/file", "closed/file", "small/", "to_directory/", "."]
    names += ["other/x", "n" * 256, "", "roots_directory", "void/.", "directory/.."]
    for name in names:
        place.call(f"unlink {name[:30]}", os.unlink, place[name])
        place.call(f"rmdir {name[:30]}", os.rmdir, place[name])
        place.call(f"{name[:30]} is", os.path.lexists, place[name])
    place.call("parent", os.lstat, place["."])
    os.mkdir(place["gone"])
    fd = place.fd("gone", os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir(place["gone"])
    place.call("fstat of a removed directory", lambda: os.fstat(fd).st_nlink)
    place.call("create in a removed directory", os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
    place.call("mkdir in a removed directory", os.mkdir, "x", dir_fd=fd)
    place.call("list a removed directory", os.listdir, fd)
    place.call("look in a removed directory", os.stat, "x", dir_fd=fd)
    fd = place.fd("third", os.O_PATH)
    os.unlink(place["third"])
    place.call("fstat of a removed file by O_PATH", lambda: os.fstat(fd).st_nlink)


@case
def directories(place: Place) -> None:
    for name in ("file", "directory", "link", "dangling", "loop", "void/", "new/", "missing/x", "file/x", "n" * 256):
        place.call(f"mkdir {name[:30]}", os.mkdir, place[name])
    for name in ("roots_directory/x", "closed/x", "sticky/x", ".", "..", "new/.."):
        place.call(f"mkdir {name}", os.mkdir, place[name])
    place.call("links", lambda: [os.stat(place[name]).st_nlink for name in (".", "directory", "new", "sticky")])
    place.call("list", lambda: sorted(os.listdir(place.top)))
    place.call("list a file", os.listdir, place["file"])
    place.call("list closed", os.listdir, place["closed"])
    place.call("list missing", os.listdir, place["missing"])
    with os.scandir(place.top) as entries:
        kinds = {
            entry.name[:30]: (
                entry.is_file(follow_symlinks=False),
                entry.is_dir(follow_symlinks=False),
                entry.is_symlink(),
                entry.inode() == os.lstat(entry.path).st_ino,
            )
            for entry in entries
        }
    place.note("types and inodes", [f"{name}: {kinds[name]}" for name in sorted(kinds)])
    for odd in (b"\xff\xfe", b"new\nline", b"back\\slash", b"caf\xc3\xa9", b" ", b"-rf", b".hidden", b"..."):
        path = place.top.encode() + b"/void/" + odd
        place.call(f"create {odd!r}", lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)), path)
        place.call(f"stat {odd!r}", os.stat, path)
    place.call("odd names", lambda: sorted(os.listdir(place["void"].encode())))
    # what stays is listed exactly once, whatever comes and goes meanwhile
    os.mkdir(place["busy"])
    for number in range(100):
        place.fresh(f"busy/stays {number}")
        place.fresh(f"busy/goes {number}")
    with os.scandir(place["busy"]) as entries:
        listed = []
        for number, entry in enumerate(entries):
            listed.append(entry.name)
            if number < 80:
                os.unlink(place[f"busy/goes {number}"])
                place.fresh(f"busy/comes {number}")
    staying = sorted(name for name in listed if name.startswith("stays"))
    place.note("all that stay", staying == sorted(f"stays {number}" for number in range(100)))
    place.note("none twice", len(listed) == len(set(listed)))
    place.call("afterwards", lambda: len(os.listdir(place["busy"])))


@case
def symbolic_links(place: Place) -> None:
    for target in ("x", "", "a" * 4095, "a" * 4096, "/absolute", "\udcff", "trailing/"):
        name = f"to {target[:10]} {len(target)}"
        place.call(f"symlink {name!r}", os.symlink, target, place["s"])
        place.call(f"readlink {name!r}", lambda: os.fsencode(os.readlink(place["s"])))
        place.lstat(repr(name), "s")
        with contextlib.suppress(OSError):
            os.unlink(place["s"])
    for name in ("file", "directory", "link", "dangling", "roots_directory/x", "missing/x", "file/x", "x/"):
        place.call(f"symlink at {name}", os.symlink, "x", place[name])
    for name in ("file", "directory", "link", "missing", "fifo"):
        place.call(f"readlink {name}", os.readlink, place[name])
    os.symlink("file", place["chain 0"])
    for number in range(1, 45):
        os.symlink(f"chain {number - 1}", place[f"chain {number}"])
    for number in (38, 39, 40, 41, 44):
        place.call(f"chain of {number + 1}", os.stat, place[f"chain {number}"])
    place.call("through a link to a directory", os.stat, place["to_directory/inner"])
    place.call("link with a slash", os.lstat, place["to_directory/"])
    place.call("link to a file with a slash", os.lstat, place["link/"])
    os.symlink(place["secret"], place["sticky/mine"])
    place.call("follow a link in a sticky directory", os.stat, place["sticky/mine"])
    place.call("write through a dangling link", Path(place["dangling"]).write_bytes, b"made")
    place.call("what it made", os.lstat, place["nowhere"])


# --- open files without a name


@case
def unlinked_while_open(place: Place) -> None:
    for name in ("file", "small", "fresh"):
        if name == "fresh":
            place.fresh(name)
        fd, reader = place.fd(name), place.fd(name, os.O_RDONLY)
        place.call(f"{name}: unlink", os.unlink, place[name])
        place.call(f"{name}: fstat", os.fstat, fd)
        place.call(f"{name}: lstat", os.lstat, place[name])
        place.call(f"{name}: read", os.pread, reader, 100, 0)
        place.call(f"{name}: write", os.pwrite, fd, b"written", 3)
        place.call(f"{name}: read by the other", os.pread, reader, 30, 0)
        place.call(f"{name}: ftruncate", os.ftruncate, fd, 5)
        place.call(f"{name}: fstat of the other", os.fstat, reader)
        place.call(f"{name}: fchmod", os.fchmod, fd, 0o600)
        place.call(f"{name}: fchown", os.fchown, fd, -1, OTHER_GROUP)
        place.call(f"{name}: futimens", syscalls.futimens, fd, 5, 7)
        place.call(f"{name}: fsetxattr", os.setxattr, fd, "user.x", b"x")
        place.call(f"{name}: fgetxattr", os.getxattr, fd, "user.x")
        place.call(f"{name}: flistxattr", lambda fd: [n for n in os.listxattr(fd) if n.startswith("user")], fd)
        place.call(f"{name}: fallocate", syscalls.fallocate, fd, 0, 0, 9000)
        place.call(f"{name}: fsync", os.fsync, fd)
        place.call(f"{name}: everything", os.fstat, fd)
        place.call(f"{name}: mtime", lambda fd: os.fstat(fd).st_mtime_ns > 7, fd)
        place.call(f"{name}: reopen", lambda fd: os.pread(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), 10, 0), fd)
        place.call(f"{name}: create again", Path(place[name]).write_bytes, b"another")
        place.call(f"{name}: old content", os.pread, fd, 10, 0)
        place.call(f"{name}: new content", Path(place[name]).read_bytes)
        with mmap.mmap(fd, 0) as mapping:
            mapping[0:3] = b"map"
        place.call(f"{name}: mapped", os.pread, fd, 10, 0)
        place.call("list", lambda: sorted(os.listdir(place.top)))
        place.close()
    # replaced while open
    fd = place.fd("other")
    place.call("rename over", os.rename, place["third"], place["other"])
    place.call("fstat of what was replaced", os.fstat, fd)
    place.call("its content", os.pread, fd, 10, 0)
    place.call("write to it", os.pwrite, fd, b"x", 0)
    place.call("what replaced it", Path(place["other"]).read_bytes)
    # a directory with nothing but an open file that is unlinked
    fd = place.fd("directory/inner")
    place.call("unlink in a directory", os.unlink, place["directory/inner"])
    place.call("list it", os.listdir, place["directory"])
    place.call("rmdir it", os.rmdir, place["directory"])
    place.call("the file", os.pread, fd, 10, 0)
    place.call("write the file", os.pwrite, fd, b"x", 0)
    # one of two names
    path = place.fresh("one")
    os.link(path, place["two"])
    fd = place.fd("one")
    os.unlink(path)
    place.call("fstat with a name left", os.fstat, fd)
    place.lstat("the name left", "two")
    place.call("write with a name left", os.pwrite, fd, b"new", 0)
    place.call("read by the name left", Path(place["two"]).read_bytes)
    place.call("unlink the name left", os.unlink, place["two"])
    place.call("fstat without a name", os.fstat, fd)


# --- reading and writing


@case
def appending(place: Place) -> None:
    for name in ("file", "small"):
        os.link(place[name], place[f"{name} two"])
        first = place.fd(name, os.O_RDWR | os.O_APPEND)
        second = place.fd(f"{name} two", os.O_WRONLY | os.O_APPEND)
        third = place.fd(name, os.O_WRONLY)
        place.call("append", os.write, first, b"one")
        place.call("position", os.lseek, first, 0, os.SEEK_CUR)
        place.call("append by another name", os.write, second, b"two")
        place.call("append at the start", os.pwrite, first, b"three", 0)
        place.call("not append", os.pwrite, third, b"four", 1)
        place.call("truncate", os.ftruncate, third, 12)
        place.call("append after that", os.write, first, b"five")
        place.call("position after that", os.lseek, first, 0, os.SEEK_CUR)
        place.call("append to a longer file", lambda fd=third: os.pwrite(fd, b"six", 30))
        place.call("append by another name after that", os.write, second, b"seven")
        place.call("content", Path(place[name]).read_bytes)
        place.call("content by another name", Path(place[f"{name} two"]).read_bytes)
        place.call("sizes", lambda: [os.stat(place[n]).st_size for n in (name, f"{name} two")])  # noqa: B023
    fd = place.fd("other", os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    place.call("append from now on", os.pwrite, fd, b"end", 0)
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    place.call("not any more", os.pwrite, fd, b"start", 0)
    place.call("both", lambda: os.pread(fd, 5, 0) + os.pread(fd, 10, 20_000))


@case
def copying_ranges(place: Place) -> None:
    source, target = place.fd("file", os.O_RDONLY), place.fd("other")

    def content() -> bytes:
        return Path(place["other"]).read_bytes()

    copy = functools.partial(os.copy_file_range, source, target)
    place.call("part", copy, 100, 50, 7)
    place.call("content", content)
    place.call("nothing", copy, 0, 0, 0)
    place.call("from the end", copy, 10, 20_000, 0)
    place.call("beyond the end", copy, 100, 19_990, 25_000)
    place.call("content", content)
    place.call("overlapping", os.copy_file_range, target, target, 100, 0, 50)
    place.call("within", os.copy_file_range, target, target, 50, 0, 100)
    place.call("content", content)
    place.call("to a read-only one", os.copy_file_range, target, source, 10, 0, 0)
    place.call("to an appending one", os.copy_file_range, source, place.fd("small", os.O_WRONLY | os.O_APPEND), 5, 0, 0)
    place.call("from a directory", os.copy_file_range, place.fd("directory", os.O_RDONLY), target, 10, 0, 0)
    place.call("from a fifo", os.copy_file_range, place.fd("fifo", os.O_RDWR), target, 10, 0, 0)
    new = place.fd("new", os.O_RDWR | os.O_CREAT)
    place.call("whole", os.copy_file_range, source, new, 1 << 30, 0, 0)
    place.call("whole: content", Path(place["new"]).read_bytes)
    place.call("whole: stat", os.fstat, new)
    place.call("write to the copy", os.pwrite, new, b"copy", 0)
    place.call("the original", os.pread, source, 4, 0)
    place.call("the copy", os.pread, new, 8, 0)
    positioned = place.fd("positioned", os.O_RDWR | os.O_CREAT)
    place.call("by position", os.copy_file_range, source, positioned, 5000)
    place.call("positions", lambda: [os.lseek(fd, 0, os.SEEK_CUR) for fd in (source, positioned)])
    place.call("sendfile", os.sendfile, positioned, source, 0, 100)
    place.call("sendfile: content", lambda: Path(place["positioned"]).read_bytes())
    place.call("splice", _splice, source, place.fd("spliced", os.O_RDWR | os.O_CREAT))
    place.call("splice: content", Path(place["spliced"]).read_bytes)


def _splice(source: int, target: int) -> int:
    reader, writer = os.pipe()
    try:
        os.splice(source, writer, 5000, offset_src=100)
        return os.splice(reader, target, 5000)
    finally:
        os.close(reader)
        os.close(writer)


@case
def mapping(place: Place) -> None:
    fd = place.fd("file")
    reader = place.fd("file", os.O_RDONLY)
    with mmap.mmap(fd, 0) as shared, mmap.mmap(reader, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as private:
        shared[100:106] = b"mapped"
        place.call("read what is mapped", os.pread, reader, 10, 98)
        place.call("seen in another mapping", lambda: private[98:108])
        place.call("write under the mapping", os.pwrite, fd, b"written", 104)
        place.call("seen in the mapping", lambda: shared[98:112])
        place.call("append under the mapping", os.pwrite, fd, b"beyond", 20_000)
        place.call("flush", lambda: shared.flush())
    place.call("content", Path(place["file"]).read_bytes)
    place.call("others", Path(place["other"]).read_bytes)
    with mmap.mmap(place.fd("third"), 0, mmap.MAP_PRIVATE) as private:
        private[0:5] = b"never"
    place.call("private", Path(place["third"]).read_bytes)
    place.call("map nothing", lambda: mmap.mmap(place.fd("empty"), 0))


@case
def direct(place: Place) -> None:
    buffer = mmap.mmap(-1, 8192)
    fd = place.open("open", "other", os.O_RDWR | os.O_DIRECT)
    if fd is not None:
        place.call("read", os.preadv, fd, [buffer], 0)
        place.call("what was read", lambda: buffer[:8192])
        place.call("write", os.pwritev, fd, [buffer], 4096)
        place.call("content", Path(place["other"]).read_bytes)
        place.call("unaligned", os.pwrite, fd, b"abc", 5)


# --- locks


@case
def locks(place: Place) -> None:
    first, second = place.fd("file"), place.fd("file")
    place.call("flock", fcntl.flock, first, fcntl.LOCK_EX)
    place.call("flock by another", fcntl.flock, second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    place.call("flock shared by another", fcntl.flock, second, fcntl.LOCK_SH | fcntl.LOCK_NB)
    place.call("downgrade", fcntl.flock, first, fcntl.LOCK_SH)
    place.call("flock shared by another now", fcntl.flock, second, fcntl.LOCK_SH | fcntl.LOCK_NB)
    place.call("unlock", fcntl.flock, first, fcntl.LOCK_UN)
    place.call("lock of a reader", fcntl.flock, place.fd("other", os.O_RDONLY), fcntl.LOCK_EX)
    place.call("lock of a directory", fcntl.flock, place.fd("directory", os.O_RDONLY), fcntl.LOCK_EX)

    def ofd(fd: int, kind: int, start: int, length: int) -> None:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0))

    place.call("range", ofd, first, fcntl.F_WRLCK, 0, 100)
    place.call("the same range", ofd, second, fcntl.F_RDLCK, 99, 1)
    place.call("another range", ofd, second, fcntl.F_WRLCK, 100, 0)
    place.call("range beyond", ofd, first, fcntl.F_RDLCK, 1 << 40, 5)
    place.call("unlock range", ofd, first, fcntl.F_UNLCK, 0, 50)
    place.call("range now free", ofd, second, fcntl.F_WRLCK, 0, 50)
    place.call("write lock of a reader", ofd, place.fd("third", os.O_RDONLY), fcntl.F_WRLCK, 0, 1)

    def in_a_child(function: Callable[[], object]) -> str:
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                function()
                os.write(writer, b"had")
            except OSError as error:
                os.write(writer, errno.errorcode[error.errno or 0].encode())
            finally:
                os._exit(0)
        os.wait()
        answer = os.read(reader, 100).decode()
        os.close(reader)
        os.close(writer)
        return answer

    small = place.fd("small")
    fcntl.lockf(small, fcntl.LOCK_EX, 5, 0)
    exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB
    place.call("POSIX lock", lambda: in_a_child(lambda: fcntl.lockf(small, exclusive, 5, 0)))
    place.call("POSIX lock beside", lambda: in_a_child(lambda: fcntl.lockf(small, exclusive, 5, 5)))
    os.close(os.open(place["small"], os.O_RDONLY))
    place.call("gone when any descriptor is closed", lambda: in_a_child(lambda: fcntl.lockf(small, exclusive, 5, 0)))
    place.call("lease", lambda: fcntl.fcntl(place.fd("empty", os.O_RDONLY), 1024, fcntl.F_RDLCK))


# --- extended attributes and ACLs


@case
def extended_attributes(place: Place) -> None:
    def get(name: str, attribute: str) -> None:
        place.call(f"get {attribute} of {name}", os.getxattr, place[name], attribute, follow_symlinks=False)

    def put(name: str, attribute: str, value: bytes, flags: int = 0) -> None:
        place.call(
            f"set {attribute[:20]} of {name}: {len(value)}, {flags}",
            os.setxattr,
            place[name],
            attribute,
            value,
            flags,
            follow_symlinks=False,
        )

    targets = ("file", "directory", "readonly", "roots", "groups", "fifo", "link", "sticky", "missing", "closed/file")
    for name in targets:
        get(name, "user.none")
        put(name, "user.one", b"1", os.XATTR_REPLACE)
        put(name, "user.one", b"1", os.XATTR_CREATE)
        put(name, "user.one", b"2", os.XATTR_CREATE)
        put(name, "user.one", b"22", os.XATTR_REPLACE)
        put(name, "user.empty", b"")
        get(name, "user.one")
        get(name, "user.empty")
        place.call(f"list {name}", lambda name=name: _listed(place[name]))
        place.call(f"remove from {name}", os.removexattr, place[name], "user.one", follow_symlinks=False)
        place.call(f"remove again from {name}", os.removexattr, place[name], "user.one", follow_symlinks=False)
    for attribute in ("user.", "user", "", "nonsense.x", "trusted.x", "security.x", "system.x", "system.posix_acl_x"):
        put("file", attribute, b"x")
        get("file", attribute)
        place.call(f"remove {attribute!r}", os.removexattr, place["file"], attribute)
    for length in (255, 256):
        put("other", "user." + "n" * (length - 5), b"x")
    for length in (100, 3000, 5000, 65_536, 65_537):
        put("third", "user.long", bytes(length))
        place.call(f"length {length}", lambda: len(os.getxattr(place["third"], "user.long")))
    put("small", "user.flags", b"x", 3)
    put("small", "user.flags", b"x", 8)
    place.call("too small a buffer", _getxattr_into, place["other"], "user." + "n" * 250, 0)
    os.setxattr(place["other"], "user.value", b"0123456789")
    for size in (0, 1, 9, 10, 11):
        place.call(f"buffer of {size}", _getxattr_into, place["other"], "user.value", size)
    fd = place.fd("other", os.O_RDONLY)
    place.call("fsetxattr", os.setxattr, fd, "user.fd", b"x")
    place.call("fgetxattr", os.getxattr, fd, "user.fd")
    place.call("fremovexattr", os.removexattr, fd, "user.fd")


def _listed(path: str) -> list[str]:
    # a machine with labels puts one on every file
    return sorted(name for name in os.listxattr(path, follow_symlinks=False) if not name.startswith("security."))


def _getxattr_into(path: str, name: str, size: int) -> int:
    buffer = array.array("B", bytes(max(size, 1)))
    address, _ = buffer.buffer_info()
    return syscalls.getxattr(path.encode(), name.encode(), address, size)


_ACL_HEADER = struct.pack("<I", 2)
_ACCESS, _DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def _acl(*entries: tuple[int, int, int]) -> bytes:
    """Entries of tag, permissions and id, in the form the kernel takes."""
    return _ACL_HEADER + b"".join(struct.pack("<HHI", *entry) for entry in entries)


_OWNER, _NAMED_USER, _OWNING_GROUP, _NAMED_GROUP, _MASK, _OTHERS = 1, 2, 4, 8, 16, 32
_NOBODY = 0xFFFFFFFF


@case
def access_control_lists(place: Place) -> None:
    named = _acl(
        (_OWNER, 7, _NOBODY),
        (_NAMED_USER, 6, ANOTHER_USER),
        (_OWNING_GROUP, 5, _NOBODY),
        (_MASK, 7, _NOBODY),
        (_OTHERS, 0, _NOBODY),
    )
    minimal = _acl((_OWNER, 6, _NOBODY), (_OWNING_GROUP, 4, _NOBODY), (_OTHERS, 4, _NOBODY))
    for name in ("file", "directory", "roots", "fifo", "missing"):
        for kind in (_ACCESS, _DEFAULT):
            for label, value in (("named", named), ("minimal", minimal), ("nonsense", b"nonsense"), ("empty", b"")):
                place.call(f"{kind[17:]} of {name}: {label}", os.setxattr, place[name], kind, value)
                place.call(f"{kind[17:]} of {name} after {label}", os.getxattr, place[name], kind)
                place.call(f"{name} after {kind[17:]} {label}", os.stat, place[name])
            place.call(f"{kind[17:]} of {name}: remove", os.removexattr, place[name], kind)
    # chmod goes to the mask
    os.setxattr(place["other"], _ACCESS, named)
    place.call("chmod", os.chmod, place["other"], 0o640)
    place.call("mask", os.getxattr, place["other"], _ACCESS)
    place.lstat("mask", "other")
    # what is made below a default ACL takes it, and not the umask
    os.setxattr(place["directory"], _DEFAULT, named)
    for umask in (0o077, 0):
        old = os.umask(umask)
        for mode in (0o666, 0o600, 0o777, 0o2755):
            name = f"directory/{umask:o} {mode:o}"
            place.open(f"{name}: open", name, os.O_WRONLY | os.O_CREAT, mode)
            place.call(f"{name}: mkdir", os.mkdir, place[f"{name}.d"], mode)
            place.call(f"{name}: mkfifo", os.mkfifo, place[f"{name}.p"], mode)
            for suffix in ("", ".d", ".p"):
                place.lstat(name, name + suffix)
                for kind in (_ACCESS, _DEFAULT):
                    place.call(f"{name}{suffix}: {kind[17:]}", os.getxattr, place[name + suffix], kind)
        os.umask(old)
    place.call("symlink", os.symlink, "x", place["directory/link"])
    place.lstat("symlink", "directory/link")
    place.call("list", lambda: _listed(place["directory"]))


@case
def access_control_lists_decide(place: Place) -> None:
    """`secret` and the rest were given ACLs by root before (see `prepare_acls`)."""
    for name in ("secret", "roots", "closed", "closed/file", "groups", "everybodys"):
        for mode in (os.R_OK, os.W_OK, os.X_OK):
            place.call(f"access {name} {mode}", os.access, place[name], mode)
        place.open(f"read {name}", name, os.O_RDONLY)
        place.open(f"write {name}", name, os.O_WRONLY)


def prepare_acls(place: Path) -> None:
    def named(tag: int, permissions: int, who: int, mask: int = 7, others: int = 0) -> bytes:
        return _acl(
            (_OWNER, 6, _NOBODY),
            *([(tag, permissions, who)] if tag == _NAMED_USER else []),
            (_OWNING_GROUP, 0, _NOBODY),
            *([(tag, permissions, who)] if tag == _NAMED_GROUP else []),
            (_MASK, mask, _NOBODY),
            (_OTHERS, others, _NOBODY),
        )

    os.setxattr(place / "secret", _ACCESS, named(_NAMED_USER, 4, USER))
    os.setxattr(place / "roots", _ACCESS, named(_NAMED_USER, 0, USER, others=6))
    os.setxattr(place / "closed", _ACCESS, named(_NAMED_USER, 5, USER))
    os.setxattr(place / "groups", _ACCESS, named(_NAMED_GROUP, 6, OTHER_GROUP, mask=4))
    os.setxattr(place / "everybodys", _ACCESS, named(_NAMED_GROUP, 7, FOREIGN_GROUP, others=6))


# --- special files, the filesystem


@case
def special_files(place: Place) -> None:
    for label, kind in {
        "fifo": stat.S_IFIFO,
        "socket": stat.S_IFSOCK,
        "character": stat.S_IFCHR,
        "block": stat.S_IFBLK,
        "regular": stat.S_IFREG,
        "directory": stat.S_IFDIR,
        "nothing": 0,
    }.items():
        device = os.makedev(1, 3) if label == "character" else os.makedev(7, 250)
        place.call(f"mknod {label}", os.mknod, place[label + " new"], kind | 0o640, device)
        place.lstat("mknod", label + " new")
    place.call("over a file", os.mknod, place["file"], stat.S_IFIFO | 0o644)
    place.call("null", lambda: os.write(os.open(place["character new"], os.O_WRONLY), b"x"))
    place.call("no such device", os.open, place["block new"], os.O_RDONLY)
    place.call("open a socket", os.open, place["socket new"], os.O_RDONLY)
    place.open("fifo for writing, nobody reads", "fifo", os.O_WRONLY | os.O_NONBLOCK)
    place.call("rename", os.rename, place["fifo"], place["fifo 2"])
    place.call("chmod", os.chmod, place["fifo 2"], 0o600)
    place.lstat("chmod", "fifo 2")
    place.call("truncate", os.truncate, place["fifo 2"], 0)
    reader = place.fd("fifo 2", os.O_RDONLY | os.O_NONBLOCK)
    writer = place.fd("fifo 2", os.O_WRONLY | os.O_NONBLOCK)
    place.call("through the fifo", lambda: (os.write(writer, b"through"), os.read(reader, 10)))
    os.chdir(place.top)
    with socket.socket(socket.AF_UNIX) as listener:
        place.call("bind", listener.bind, "bound")
        place.lstat("bind", "bound")
        listener.listen()
        with socket.socket(socket.AF_UNIX) as client:
            place.call("connect", client.connect, "bound")
    os.chdir("/")


@case
def the_filesystem(place: Place) -> None:
    for name in (".", "file", "directory", "fifo"):
        found = os.statvfs(place[name])
        place.note(f"statvfs {name}", [found.f_bsize, found.f_frsize, found.f_blocks, found.f_namemax, found.f_files])
    place.call("statvfs of nothing", os.statvfs, place["missing"])
    fd = place.fd("file")
    place.note("fstatvfs", [os.fstatvfs(fd).f_bsize, os.fstatvfs(fd).f_namemax])
    for name in ("PC_LINK_MAX", "PC_NAME_MAX", "PC_PATH_MAX", "PC_CHOWN_RESTRICTED", "PC_NO_TRUNC"):
        place.call(name, os.pathconf, place["."], name)
    place.call("sync a directory", os.fsync, place.fd("directory", os.O_RDONLY))
    place.call("fdatasync", os.fdatasync, fd)
    place.call("fadvise", os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_WILLNEED)
    flags = array.array("L", [0])
    place.call("FS_IOC_GETFLAGS", fcntl.ioctl, fd, 0x80086601, flags)
    place.call("FICLONE", fcntl.ioctl, place.fd("new", os.O_RDWR | os.O_CREAT), 0x40049409, fd)
    place.call("an unknown ioctl", fcntl.ioctl, fd, 0x1234)
    place.call("device is one", lambda: len({os.lstat(place[name]).st_dev for name in (".", "file", "directory")}))
    place.call("blksize", lambda: os.stat(place["file"]).st_blksize)


# --- running


@contextlib.contextmanager
def _as_user(user: int) -> Iterator[None]:
    """For the rest of the process: there is no way back."""
    if user:
        os.setgroups([user, OTHER_GROUP if user == USER else USER])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    yield


def main(directory: str, user: str) -> None:
    results = {}
    os.umask(0o022)
    with _as_user(int(user)):
        for name, function in CASES.items():
            place = Place(f"{directory}/{name}")
            try:
                function(place)
            except Exception as error:  # noqa: BLE001 - what is in the way of one case is told, and all others are made
                place.note("stopped", repr(error).replace(directory, ""))
            finally:
                place.close()
            results[name] = place.results
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
