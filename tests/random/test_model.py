"""Random operations on the mount, and the same on a plain directory of the same filesystem: same answers, same errors,
same tree, same bytes. In between everything is settled, so that what the operations meet are references, and now and
then the daemon ends, or is killed, and starts again.

Contents come from a small pool, so that most files have a duplicate. DEDUPFS_RANDOM=10 runs ten times as long,
DEDUPFS_SEED repeats a run. A failure prints everything that was done in its example; with DEDUPFS_SHRINK=1 hypothesis
reduces that to the few steps that matter, which takes minutes.

Times are compared as far as they are determined: a time that was set, which is long ago here, is the same on both
sides until something sets it to now, which must happen on both.
"""

import errno
import fcntl
import itertools
import mmap
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
import pytest
import xxhash
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from dedupfs import control
from tests.conftest import Mounts
from tests.support import syscalls
from tests.support.mounted import Mounted
from tests.support.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    UTIME_NOW,
    UTIME_OMIT,
)

LENGTH = float(os.environ.get("DEDUPFS_RANDOM", "1"))
SHRINK = os.environ.get("DEDUPFS_SHRINK", "") not in ("", "0")
EXAMPLES = 40
STEPS = 60

_noise = random.Random(1)
_base = _noise.randbytes(70001)
CONTENTS = [
    _base,
    _base[:20000],
    _base[:19999] + b"!",  # same size, another last byte
    _base[:4096],
    _base[4096:8192],
    _base[:4095],  # too small to be shared
    _base[:100],
    bytes(12288),
    bytes(8192) + _base[:4096] + bytes(10000),
    b"",
]

DIRECTORIES = [b"d", b"e", b"d/f", b"e/g"]
FILES = [b"a", b"b", b"c", b"d/a", b"d/b", b"e/a", b"d/f/a", b"e/g/b", b"e/\xff\xfe name"]
ODD = [b"missing/a", b"a/b", b"d/" + b"n" * 256, b".", b"d/."]

# A number stands for a file that exists, if there is any: most random names would not lead anywhere.
Where = bytes | int
paths = st.one_of(st.integers(0, 9), st.sampled_from(FILES))
existing = st.integers(0, 9)
anything = st.one_of(st.integers(0, 9), st.sampled_from(FILES + DIRECTORIES), st.sampled_from(ODD))
contents = st.integers(0, len(CONTENTS) - 1)
offsets = st.sampled_from([0, 1, 4095, 4096, 5000, 8192, 19999, 20000, 70001, 100_000])
sizes = st.sampled_from([0, 1, 100, 4095, 4096, 4097, 8192, 12288, 19999, 20000, 70001, 200_000])
# libfuse does not pass on the order to change neither; tests/mount/calls.py gives it.
OWNERS = [owners for owners in itertools.product((-1, 0, 1000), repeat=2) if owners != (-1, -1)]
modes = st.sampled_from([0o644, 0o600, 0o444, 0o755, 0o4755, 0o2775, 0o1777, 0])
# 2001, with nanoseconds
times = st.sampled_from([10**18 + 123_456_789, 10**18 + 86400 * 10**9 + 1, UTIME_NOW, UTIME_OMIT])
xattr_names = st.sampled_from([b"user.one", b"user.two"])
xattr_values = st.sampled_from([b"", b"value", bytes(1000)])
handles = st.integers(0, 3)

OPEN_FLAGS = [
    os.O_RDONLY,
    os.O_WRONLY,
    os.O_RDWR,
    os.O_RDWR | os.O_CREAT,
    os.O_RDWR | os.O_CREAT | os.O_EXCL,
    os.O_RDWR | os.O_TRUNC,
    os.O_RDONLY | os.O_TRUNC,
    os.O_RDONLY | os.O_CREAT,
    os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    os.O_WRONLY | os.O_APPEND,
    os.O_RDWR | os.O_CREAT | os.O_APPEND,
    os.O_RDWR | os.O_SYNC,
    os.O_RDONLY | os.O_DIRECTORY,
    os.O_RDONLY | os.O_NOFOLLOW,
    os.O_PATH,
]

# Nothing here is older or younger.
_LONG_AGO_NS = 1_500_000_000 * 10**9


class Side:
    """One of the two directories, with the files that are open in it. Every method is an operation."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root)
        self.handles: dict[int, int] = {}

    def at(self, path: bytes) -> bytes:
        return self.root + b"/" + path

    def slots_of(self, path: bytes) -> list[int]:
        """Where this file is open."""
        with suppress(OSError):
            st = os.stat(self.at(path), follow_symlinks=False)
            return [slot for slot, fd in self.handles.items() if os.path.samestat(st, os.fstat(fd))]
        return []

    def has_no_name(self, slot: int) -> bool:
        """Whether an open file is one that libfuse cannot tell us of: removed, and not opened by a request of its own
        that it would go by."""
        found, flags = os.fstat(self.handles[slot]), fcntl.fcntl(self.handles[slot], fcntl.F_GETFL)
        return not found.st_nlink and bool(flags & os.O_PATH or stat.S_ISDIR(found.st_mode))

    # -- names

    def rename(self, old: bytes, new: bytes, flags: int) -> None:
        syscalls.renameat2(self.at(old), self.at(new), flags)

    def link(self, old: bytes, new: bytes) -> None:
        os.link(self.at(old), self.at(new), follow_symlinks=False)

    def unlink(self, path: bytes) -> None:
        os.unlink(self.at(path))

    def symlink(self, target: bytes, path: bytes) -> None:
        os.symlink(target, self.at(path))

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(self.at(path))

    def mkdir(self, path: bytes, mode: int) -> None:
        os.mkdir(self.at(path), mode)

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self.at(path))

    def mkfifo(self, path: bytes) -> None:
        os.mkfifo(self.at(path))

    def listdir(self, path: bytes) -> list[bytes]:
        return sorted(os.listdir(self.at(path)))

    # -- attributes

    def stat(self, path: bytes) -> object:
        return _seen(os.stat(self.at(path)))

    def lstat(self, path: bytes) -> object:
        return _seen(os.lstat(self.at(path)))

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self.at(path), mode)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        os.chown(self.at(path), uid, gid, follow_symlinks=False)

    def utimens(self, path: bytes, atime_ns: int, mtime_ns: int, follow: bool) -> None:
        syscalls.utimens(self.at(path), atime_ns, mtime_ns, follow_symlinks=follow)

    def setxattr(self, path: bytes, name: bytes, value: bytes, flags: int) -> None:
        os.setxattr(self.at(path), name, value, flags)

    def removexattr(self, path: bytes, name: bytes) -> None:
        os.removexattr(self.at(path), name)

    def xattrs(self, path: bytes) -> dict[str, bytes]:
        full = self.at(path)
        return {
            name: os.getxattr(full, name, follow_symlinks=False)
            for name in sorted(os.listxattr(full, follow_symlinks=False))
        }

    # -- whole files

    def read(self, path: bytes) -> bytes:
        fd = os.open(self.at(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return _read_all(fd)
        finally:
            os.close(fd)

    def write(self, path: bytes, data: bytes, offset: int, flags: int) -> None:
        fd = os.open(self.at(path), flags | os.O_NONBLOCK, 0o644)
        try:
            position = 0
            while position < len(data):
                position += os.pwrite(fd, data[position : position + 65536], offset + position)
        finally:
            os.close(fd)

    def truncate(self, path: bytes, size_bytes: int) -> None:
        os.truncate(self.at(path), size_bytes)

    def copy(self, path: bytes, new: bytes) -> int:
        """What cp does: copy_file_range to the end into a file that was created or truncated."""
        source = os.open(self.at(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            target = os.open(self.at(new), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
            try:
                total = 0
                while count := os.copy_file_range(source, target, 1 << 30):
                    total += count
                return total
            finally:
                os.close(target)
        finally:
            os.close(source)

    def map_and_close(self, path: bytes, data: bytes, offset: int) -> None:
        """Write through a mapping that outlives the descriptor."""
        fd = os.open(self.at(path), os.O_RDWR | os.O_NONBLOCK)
        try:
            mapping = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        with mapping:
            end = min(len(mapping), offset + len(data))
            if offset < end:
                mapping[offset:end] = data[: end - offset]

    # -- open files

    def open(self, slot: int, path: bytes, flags: int) -> None:
        self.close(slot)
        self.handles[slot] = os.open(self.at(path), flags | os.O_NONBLOCK, 0o644)

    def close(self, slot: int) -> None:
        if slot in self.handles:
            os.close(self.handles.pop(slot))

    def handle_stat(self, slot: int) -> object:
        return _seen(os.fstat(self.handles[slot]))

    def handle_pread(self, slot: int, offset: int, length: int) -> bytes:
        return os.pread(self.handles[slot], length, offset)

    def handle_pwrite(self, slot: int, data: bytes, offset: int) -> int:
        return os.pwrite(self.handles[slot], data, offset)

    def handle_seek(self, slot: int, offset: int, whence: int) -> int:
        return os.lseek(self.handles[slot], offset, whence)

    def handle_read(self, slot: int, length: int) -> bytes:
        return os.read(self.handles[slot], length)

    def handle_write(self, slot: int, data: bytes) -> int:
        return os.write(self.handles[slot], data)

    def handle_truncate(self, slot: int, size_bytes: int) -> None:
        os.ftruncate(self.handles[slot], size_bytes)

    def handle_allocate(self, slot: int, mode: int, offset: int, length: int) -> None:
        syscalls.fallocate(self.handles[slot], mode, offset, length)

    def handle_chmod(self, slot: int, mode: int) -> None:
        os.fchmod(self.handles[slot], mode)

    def handle_utimens(self, slot: int, atime_ns: int, mtime_ns: int) -> None:
        syscalls.futimens(self.handles[slot], atime_ns, mtime_ns)

    def handle_sync(self, slot: int, data_only: bool) -> None:
        (os.fdatasync if data_only else os.fsync)(self.handles[slot])

    def handle_map(self, slot: int, data: bytes, offset: int) -> None:
        with mmap.mmap(self.handles[slot], 0) as mapping:
            end = min(len(mapping), offset + len(data))
            if offset < end:
                mapping[offset:end] = data[: end - offset]
            mapping.flush()

    def handle_read_map(self, slot: int) -> bytes:
        with mmap.mmap(self.handles[slot], 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
            return bytes(mapping)

    def handle_copy(self, slot: int, offset: int, target: int, target_offset: int, length: int) -> int:
        total = 0
        while total < length:
            count = os.copy_file_range(
                self.handles[slot], self.handles[target], length - total, offset + total, target_offset + total
            )
            if not count:
                break
            total += count
        return total

    def handle_holes(self, slot: int) -> int:
        """SEEK_DATA and SEEK_HOLE need not find the same holes on both sides, but only holes."""
        fd = self.handles[slot]
        size = os.fstat(fd).st_size
        position = 0
        while position < size:
            try:
                data = os.lseek(fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = size
            assert position <= data <= size, f"SEEK_DATA({position}) is {data}, of {size} bytes"
            assert not any(os.pread(fd, data - position, position)), f"data in the hole at {position}"
            if data == size:
                break
            position = os.lseek(fd, data, os.SEEK_HOLE)
            assert data < position <= size, f"SEEK_HOLE({data}) is {position}, of {size} bytes"
        os.lseek(fd, 0, os.SEEK_SET)
        return size

    # -- everything

    def tree(self) -> dict[bytes, object]:
        """What is there, whole."""
        found: dict[bytes, object] = {b"..": self.lstat(b"..")}
        for path in self.walk():
            entry: list[object] = [self.lstat(path), self.xattrs(path)]
            mode = os.lstat(self.at(path)).st_mode
            if stat.S_ISREG(mode):
                entry.append(_short(self.read(path)))
            elif stat.S_ISLNK(mode):
                entry.append(self.readlink(path))
            found[path] = entry
        return found

    def walk(self) -> list[bytes]:
        found = []
        for directory, subdirectories, names in os.walk(os.path.dirname(self.root)):
            for name in subdirectories + names:
                found.append(os.path.relpath(os.path.join(directory, name), self.root))
        return sorted(found)

    def files(self) -> list[bytes]:
        return [path for path in self.walk() if stat.S_ISREG(os.lstat(self.at(path)).st_mode)]

    def remove(self) -> None:
        for slot in list(self.handles):
            self.close(slot)
        for directory in [path for path in self.walk() if stat.S_ISDIR(os.lstat(self.at(path)).st_mode)]:
            os.chmod(self.at(directory), 0o755)
        shutil.rmtree(os.path.dirname(self.root))


def _read_all(fd: int) -> bytes:
    parts = []
    position = 0
    while part := os.pread(fd, 1 << 20, position):
        parts.append(part)
        position += len(part)
    return b"".join(parts)


def _seen(found: os.stat_result) -> tuple[object, ...]:
    """What of a stat is determined by what was done."""
    size = "-" if stat.S_ISDIR(found.st_mode) else found.st_size
    mtime = found.st_mtime_ns if found.st_mtime_ns < _LONG_AGO_NS else "recent"
    return oct(found.st_mode), found.st_nlink, found.st_uid, found.st_gid, size, mtime


def _short(value: object) -> object:
    """Something that can be shown and compared for something long."""
    if isinstance(value, bytes) and len(value) > 64:
        return f"{len(value)} bytes, {xxhash.xxh3_128_hexdigest(value)}"
    return value


def _outcome(call: Callable[..., object], *arguments: object) -> object:
    try:
        return _short(call(*arguments))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except ValueError as error:
        return str(error)  # mmap of an empty file


class Operations(RuleBasedStateMachine):
    """One example: a fresh directory on both sides."""

    mounted: ClassVar[Mounted]
    plain_parent: ClassVar[Path]
    numbers: ClassVar[Iterator[int]]

    def __init__(self) -> None:
        super().__init__()
        self.number = next(self.numbers)
        name = f"example-{self.number}"
        # a directory of its own above it, where links to .. lead
        self.mount = Side(self.mounted.path(name, "top"))
        self.plain = Side(self.plain_parent / name / "top")
        self.sides = (self.mount, self.plain)
        self.trace: list[str] = []
        self.failed = False
        for side in self.sides:
            os.makedirs(side.root)

    # -- running

    def both(self, operation: str, *arguments: Any) -> object:
        """Do it on both sides; answers what it gave."""
        shown = f"{operation}({', '.join(repr(_short(argument)) for argument in arguments)})"
        mount, plain = (_outcome(getattr(side, operation), *arguments) for side in self.sides)
        self.trace.append(f"{shown} -> {plain}")
        if mount == "ESTALE" and operation.startswith("handle_") and self.plain.has_no_name(arguments[0]):
            return plain
        self.demand(mount == plain, f"{shown}\n  mount: {mount}\n  plain: {plain}")
        return plain

    def demand(self, condition: bool, message: str) -> None:
        if not condition:
            self.failed = True
            # What depends on a race does not happen again, and hypothesis would only say that it did not.
            print(*self.trace, message, sep="\n", end="\n\n")
            raise AssertionError(message)

    def find(self, where: Where) -> bytes:
        if isinstance(where, bytes):
            return where
        found = self.plain.files()
        return found[where % len(found)] if found else b"a"

    def slot(self, number: int) -> int:
        slots = sorted(self.plain.handles)
        return slots[number % len(slots)]

    def close_passed_through(self, path: bytes) -> None:
        """A name that a file gets while it is open in passthrough shows only later what is written."""
        if "passthrough=on" in self.mounted.options:
            for slot in self.plain.slots_of(path):
                self.both("close", slot)

    def settle(self) -> None:
        socket = os.getxattr(self.mounted.mountpoint, control.CONTROL_XATTR)
        self.trace.append("settle")
        control.call(os.fsdecode(socket), "settle", {}, lambda phase, done, total: None)

    def compare(self) -> None:
        mount, plain = (side.tree() for side in self.sides)
        for path in sorted(mount.keys() | plain.keys()):
            self.demand(
                mount.get(path) == plain.get(path), f"{path!r}\n  mount: {mount.get(path)}\n  plain: {plain.get(path)}"
            )

    def compare_answers(self) -> None:
        """What the xattrs say against what can be seen on the plain side. Nothing is open."""
        by_content: dict[str, list[bytes]] = {}
        for path in self.plain.files():
            by_content.setdefault(xxhash.xxh3_128_hexdigest(self.plain.read(path)), []).append(path)
        top = os.path.relpath(self.mount.root, os.fsencode(self.mounted.mountpoint))
        for digest, same in by_content.items():
            inodes = {os.lstat(self.plain.at(path)).st_ino for path in same}
            for path in same:
                answers = {
                    name: os.getxattr(self.mount.at(path), b"user.dedupfs." + name)
                    for name in (b"digest", b"refs", b"duplicates", b"state")
                }
                others = [os.path.normpath(top + b"/" + other) + b"\0" for other in same if other != path]
                expected = {
                    b"digest": digest.encode(),
                    b"refs": b"%d" % len(inodes),
                    b"duplicates": b"".join(sorted(others)),
                    b"state": answers[b"state"],
                }
                self.demand(answers == expected, f"{path!r}\n  answers: {answers}\n  expected: {expected}")

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.compare()
                for slot in list(self.plain.handles):
                    self.both("close", slot)
                if self.number % 10 == 5:
                    self.trace.append("remount")
                    self.mounted.restart()
                elif self.number % 10 == 0:
                    self.trace.append("kill and mount again")
                    self.mounted.kill()
                    self.mounted.start()
                    self.compare()
                self.settle()
                self.compare()
                self.compare_answers()
        finally:
            for side in self.sides:
                side.remove()

    # -- names

    @initialize()
    def populate(self) -> None:
        for directory in DIRECTORIES:
            self.both("mkdir", directory, 0o755)
        for path, content in zip(FILES[:6], itertools.cycle([1, 1, 2, 0]), strict=False):
            self.both("write", path, CONTENTS[content], 0, os.O_WRONLY | os.O_CREAT)

    @rule(old=anything, new=anything, flags=st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE, 3]))
    def rename(self, old: Where, new: Where, flags: int) -> None:
        old, new = self.find(old), self.find(new)
        self.both("rename", old, new, flags)
        self.both("lstat", old)
        self.both("lstat", new)

    @rule(old=anything, new=anything)
    def link(self, old: Where, new: Where) -> None:
        old, new = self.find(old), self.find(new)
        self.close_passed_through(old)
        self.both("link", old, new)
        self.both("lstat", old)
        self.both("lstat", new)

    @rule(path=anything)
    def unlink(self, path: Where) -> None:
        self.both("unlink", self.find(path))

    @rule(goal=st.sampled_from([b"a", b"../a", b"d", b"missing", b"..", b"b"]), path=paths)
    def symlink(self, goal: bytes, path: Where) -> None:
        path = self.find(path)
        self.both("symlink", goal, path)
        self.both("readlink", path)

    @rule(path=st.sampled_from(DIRECTORIES + FILES[:3]), mode=modes)
    def mkdir(self, path: bytes, mode: int) -> None:
        self.both("mkdir", path, mode)
        self.both("lstat", path)

    @rule(path=anything)
    def rmdir(self, path: Where) -> None:
        self.both("rmdir", self.find(path))

    @rule(path=paths)
    def mkfifo(self, path: Where) -> None:
        self.both("mkfifo", self.find(path))

    @rule(path=st.sampled_from([b".", *DIRECTORIES, b"a"]))
    def listdir(self, path: bytes) -> None:
        self.both("listdir", path)

    # -- attributes

    @rule(path=anything)
    def stat(self, path: Where) -> None:
        path = self.find(path)
        self.both("stat", path)
        self.both("lstat", path)

    @rule(path=anything, mode=modes)
    def chmod(self, path: Where, mode: int) -> None:
        path = self.find(path)
        self.both("chmod", path, mode)
        self.both("lstat", path)

    @rule(path=anything, owners=st.sampled_from(OWNERS))
    def chown(self, path: Where, owners: tuple[int, int]) -> None:
        path = self.find(path)
        self.both("chown", path, *owners)
        self.both("lstat", path)

    @rule(path=anything, atime_ns=times, mtime_ns=times, follow=st.booleans())
    def utimens(self, path: Where, atime_ns: int, mtime_ns: int, follow: bool) -> None:
        path = self.find(path)
        self.both("utimens", path, atime_ns, mtime_ns, follow)
        self.both("lstat", path)

    @rule(mtime_ns=times)
    def utimens_everywhere(self, mtime_ns: int) -> None:
        """So that a time that changes on one side only is noticed."""
        for path in self.plain.walk():
            self.both("utimens", path, UTIME_OMIT, mtime_ns, False)

    @rule(path=anything, name=xattr_names, value=xattr_values, flags=st.sampled_from([0, 0, 1, 2]))
    def setxattr(self, path: Where, name: bytes, value: bytes, flags: int) -> None:
        path = self.find(path)
        self.both("setxattr", path, name, value, flags)
        self.both("xattrs", path)

    @rule(path=anything, name=xattr_names)
    def removexattr(self, path: Where, name: bytes) -> None:
        path = self.find(path)
        self.both("removexattr", path, name)
        self.both("xattrs", path)

    # -- whole files

    @rule(path=paths)
    def read(self, path: Where) -> None:
        self.both("read", self.find(path))

    @rule(path=paths, others=st.lists(paths, max_size=2), content=contents)
    def write_copies(self, path: Where, others: list[Where], content: int) -> None:
        for where in [path, *others]:
            found = self.find(where)
            self.both("write", found, CONTENTS[content], 0, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            self.both("stat", found)

    @rule(path=existing, content=contents, offset=offsets)
    def overwrite(self, path: Where, content: int, offset: int) -> None:
        path = self.find(path)
        self.both("write", path, CONTENTS[content], offset, os.O_WRONLY)
        self.both("stat", path)

    @rule(path=existing, content=contents)
    def append(self, path: Where, content: int) -> None:
        path = self.find(path)
        self.both("write", path, CONTENTS[content], 0, os.O_WRONLY | os.O_APPEND)
        self.both("stat", path)

    @rule(path=anything, size_bytes=sizes)
    def truncate(self, path: Where, size_bytes: int) -> None:
        path = self.find(path)
        self.both("truncate", path, size_bytes)
        self.both("stat", path)

    @rule(path=existing, new=paths)
    def copy(self, path: Where, new: Where) -> None:
        path, new = self.find(path), self.find(new)
        self.both("copy", path, new)
        self.both("stat", new)

    @rule(path=existing, content=contents, offset=offsets)
    def map_and_close(self, path: Where, content: int, offset: int) -> None:
        path = self.find(path)
        self.both("map_and_close", path, CONTENTS[content], offset)
        self.both("read", path)

    # -- open files

    @rule(slot=handles, path=paths, flags=st.sampled_from(OPEN_FLAGS))
    def open(self, slot: int, path: Where, flags: int) -> None:
        path = self.find(path)
        self.both("open", slot, path, flags)
        self.both("stat", path)

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles)
    def close(self, slot: int) -> None:
        self.both("close", self.slot(slot))

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles)
    def handle_stat(self, slot: int) -> None:
        self.both("handle_stat", self.slot(slot))

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles, offset=offsets, length=sizes)
    def handle_pread(self, slot: int, offset: int, length: int) -> None:
        self.both("handle_pread", self.slot(slot), offset, length)

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles, content=contents, offset=offsets)
    def handle_pwrite(self, slot: int, content: int, offset: int) -> None:
        slot = self.slot(slot)
        self.both("handle_pwrite", slot, CONTENTS[content], offset)
        self.both("handle_stat", slot)

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles, offset=offsets, whence=st.sampled_from([os.SEEK_SET, os.SEEK_END]), length=sizes)
    def handle_seek_and_read(self, slot: int, offset: int, whence: int, length: int) -> None:
        slot = self.slot(slot)
        self.both("handle_seek", slot, -offset if whence == os.SEEK_END else offset, whence)
        self.both("handle_read", slot, length)

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles, content=contents)
    def handle_write(self, slot: int, content: int) -> None:
        slot = self.slot(slot)
        self.both("handle_write", slot, CONTENTS[content])
        self.both("handle_stat", slot)

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles, size_bytes=sizes)
    def handle_truncate(self, slot: int, size_bytes: int) -> None:
        slot = self.slot(slot)
        self.both("handle_truncate", slot, size_bytes)
        self.both("handle_stat", slot)

    @precondition(lambda self: self.plain.handles)
    @rule(
        slot=handles,
        mode=st.sampled_from(
            [
                0,
                FALLOC_FL_KEEP_SIZE,
                FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                FALLOC_FL_ZERO_RANGE,
                FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
            ]
        ),
        offset=offsets,
        length=sizes,
    )
    def handle_allocate(self, slot: int, mode: int, offset: int, length: int) -> None:
        slot = self.slot(slot)
        self.both("handle_allocate", slot, mode, offset, length)
        self.both("handle_stat", slot)

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles, mode=modes)
    def handle_chmod(self, slot: int, mode: int) -> None:
        slot = self.slot(slot)
        self.both("handle_chmod", slot, mode)
        self.both("handle_stat", slot)

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles, atime_ns=times, mtime_ns=times)
    def handle_utimens(self, slot: int, atime_ns: int, mtime_ns: int) -> None:
        slot = self.slot(slot)
        self.both("handle_utimens", slot, atime_ns, mtime_ns)
        self.both("handle_stat", slot)

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles, data_only=st.booleans())
    def handle_sync(self, slot: int, data_only: bool) -> None:
        self.both("handle_sync", self.slot(slot), data_only)

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles, content=contents, offset=offsets)
    def handle_map(self, slot: int, content: int, offset: int) -> None:
        slot = self.slot(slot)
        self.both("handle_map", slot, CONTENTS[content], offset)
        self.both("handle_stat", slot)

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles)
    def handle_read_map(self, slot: int) -> None:
        self.both("handle_read_map", self.slot(slot))

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles)
    def handle_holes(self, slot: int) -> None:
        self.both("handle_holes", self.slot(slot))

    @precondition(lambda self: self.plain.handles)
    @rule(slot=handles, offset=offsets, to=handles, to_offset=offsets, length=sizes)
    def handle_copy(self, slot: int, offset: int, to: int, to_offset: int, length: int) -> None:
        slot, to = self.slot(slot), self.slot(to)
        self.both("handle_copy", slot, offset, to, to_offset, length)
        self.both("handle_stat", to)

    # -- in between

    @rule()
    def settle_all(self) -> None:
        self.settle()

    @rule()
    def settle_and_compare(self) -> None:
        self.settle()
        self.compare()

    @rule()
    def compare_now(self) -> None:
        self.compare()


@pytest.mark.timeout(900 * max(1, LENGTH))
def test_operations_against_a_plain_directory(mounts: Mounts, mounted: Mounted, rng: random.Random) -> None:
    plain = mounts.filesystem.directory("plain")
    Operations.mounted, Operations.plain_parent, Operations.numbers = mounted, plain, itertools.count(1)
    run_state_machine_as_test(
        hypothesis.seed(rng.getrandbits(64))(Operations),
        settings=hypothesis.settings(
            max_examples=max(1, round(EXAMPLES * LENGTH)),
            stateful_step_count=STEPS,
            database=None,
            phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if SHRINK else [])],
        ),
    )
    shutil.rmtree(plain)
