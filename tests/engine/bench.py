"""One source and its engine, without FUSE: what apps do as methods, and the checks that every test owes its store.

Everything runs in the test's own thread unless a test starts the engine's threads, so that the order of things is the
test's to choose. `Tampered` is a backing whose system calls a test can watch, hold up, or make fail; `Killed` stands
for SIGKILL at one of them.
"""

import errno
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dedupfs import fsck as checker
from dedupfs.backing import Backing
from dedupfs.config import MountOptions, Share
from dedupfs.digest import DescriptorHasher, hash_descriptor, proceed
from dedupfs.engine import Engine
from dedupfs.model import Caller, ContentKey, Digest
from dedupfs.openfiles import Handle, Key

PATIENCE_S = 20.0

BLOCK = 4096


def me() -> Caller:
    """What the kernel passes on of an app: here the test itself."""
    return Caller(uid=os.geteuid(), gid=os.getegid(), pid=os.getpid(), umask=0o022)


ME = me()


def content(label: str, size_bytes: int = 3 * BLOCK + 100) -> bytes:
    """Bytes that differ for each label, in every block, and do not end with a block."""
    line = f"{label} {{:012d}}\n"
    count = size_bytes // len(line.format(0)) + 1
    return "".join(line.format(number) for number in range(count)).encode()[:size_bytes]


def silent(phase: str, done: int, total: int | None) -> None:
    """Progress that nobody looks at."""


def impatient(seconds: float = PATIENCE_S) -> Callable[[str, int, int | None], None]:
    """Progress that ends a loop which makes none."""
    deadline = time.monotonic() + seconds

    def progress(phase: str, done: int, total: int | None) -> None:
        assert time.monotonic() < deadline, f"{phase} does not come to an end ({done} done)"

    return progress


def few_bits(count: int) -> DescriptorHasher:
    """A hash of so many bits: equal for many different contents."""

    def weak(fd: int, checkpoint: Callable[[], None] = proceed) -> Digest:
        full = hash_descriptor(fd, checkpoint)
        return Digest(bytes(15) + bytes([full[15] & ((1 << count) - 1)]))

    return weak


class Killed(BaseException):
    """The daemon is gone: no handler may clean up after this, as none would after SIGKILL."""


Hook = Callable[[str, tuple[Any, ...]], None]


def _nothing(name: str, arguments: tuple[Any, ...]) -> None:
    pass


_NO_CALLS = ("close", "directory_of", "is_no_reference", "may_be_at", "may_be_reference", "path_of")


class Tampered(Backing):
    """Calls `before` and `after` with the name and arguments of each method that makes a system call."""

    CALLS = frozenset(
        name
        for name, value in vars(Backing).items()
        if not name.startswith("_") and name not in _NO_CALLS and callable(value)
    )

    def __init__(self, source: str | Path) -> None:
        self.before: Hook = _nothing
        self.after: Hook = _nothing
        super().__init__(str(source))

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in Tampered.CALLS:
            return value

        def call(*arguments: Any, **keywords: Any) -> Any:
            self.before(name, arguments)
            result = value(*arguments, **keywords)
            self.after(name, arguments)
            return result

        return call


def failing_to_list(directory: bytes) -> Hook:
    """A disk that does not give back what is in this directory, for `Tampered.before`."""

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "scandir" and arguments[0] == directory:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return before


class Mortal(Tampered):
    """Dies at the given system call, and every call after it dies too. With `late`, just after it was made.

    Only the calls that change something count: between two of them nothing on disk tells when the kill came.
    """

    # fmt: off
    CHANGES = frozenset((
        "mkdir", "mknod", "symlink", "unlink", "rmdir", "link", "rename", "chmod", "chown", "utime", "set_mtime",
        "utimensat", "futimens", "setxattr", "removexattr", "fset_reference", "fremove_reference", "ftruncate", "punch",
        "fallocate", "copy_range", "clone", "dedupe", "fset_immutable",
    ))
    # fmt: on

    def __init__(self, source: str | Path, death: int) -> None:
        self.armed = False
        self.calls: list[str] = []
        self._death = death
        super().__init__(source)
        self.before = self._count

    @property
    def dead(self) -> bool:
        return len(self.calls) > self._death

    def _count(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.dead:
            raise Killed
        if self.armed and name in self.CHANGES:
            self.calls.append(name)
            if self.dead:
                raise Killed


class Bench:
    """One source. `engine` owns it while it is open; paths are `str`, relative to the source."""

    def __init__(self, source: Path, share: Share = Share.REFERENCE) -> None:
        self.source = source
        self.share = share
        self._engine: Engine | None = None
        self._expected_log: list[str] = []
        self._expected_findings: list[str] | None = []
        self._messages = _Messages()
        logging.getLogger("dedupfs").addHandler(self._messages)

    # -- life ---------------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "the engine is not open"
        return self._engine

    def open(
        self,
        *,
        start: bool = False,
        backing: Backing | None = None,
        hasher: DescriptorHasher = hash_descriptor,
        share: Share | None = None,
        read_only: bool = False,
        settle_rate_mb_s: float = 0,
        quiet_until: Callable[[], str] | None = None,
    ) -> Engine:
        """`quiet_until` takes the place of the clock on the wall."""
        assert self._engine is None, "the engine is open"
        options = MountOptions(share=share or self.share, read_only=read_only, settle_rate_mb_s=settle_rate_mb_s)
        engine = Engine(str(self.source), options, backing=backing, hasher=hasher)
        self._engine = engine
        if quiet_until is not None:
            engine.quiet_until = quiet_until  # type: ignore[method-assign]
        if start:
            engine.start()
        return engine

    def close(self) -> None:
        engine, self._engine = self.engine, None
        engine.close()

    def reopen(self, **how: Any) -> Engine:
        self.close()
        return self.open(**how)

    def crash(self) -> None:
        """What SIGKILL leaves of an engine without threads: what is on disk, and no owner."""
        engine, self._engine = self.engine, None
        engine._as_caller.close()
        engine.index._environment.close()
        for fd, _ in self._open_descriptors():
            os.close(fd)

    def recover(self) -> Engine:
        """Start again after a crash, and reconcile."""
        engine = self.open()
        self.scan()
        return engine

    def settle(self) -> None:
        """Until nothing is pending, and the index knows of everything that happened."""
        self.engine.settle(impatient())
        if not self.engine._running:
            self.engine._work_off(impatient())

    def scan(self) -> dict[str, object]:
        return self.engine.scan(impatient())

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """For what the engine's threads do in their own time."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "it does not happen"
            time.sleep(0.01)

    # -- what apps do -------------------------------------------------------------------------------------------------

    def open_file(self, path: str, flags: int = os.O_RDONLY) -> Handle:
        return self.engine.vfs.open(os.fsencode(path), flags, me())

    def create_file(self, path: str, mode: int = 0o644) -> Handle:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        return self.engine.vfs.create(os.fsencode(path), flags, stat.S_IFREG | mode, me())

    def close_file(self, handle: Handle) -> None:
        self.engine.vfs.io.flush(handle)
        self.engine.vfs.io.release(handle)

    @contextmanager
    def opened(self, path: str, flags: int = os.O_RDONLY) -> Iterator[Handle]:
        handle = self.open_file(path, flags)
        try:
            yield handle
        finally:
            self.close_file(handle)

    @contextmanager
    def opened_new(self, path: str) -> Iterator[Handle]:
        handle = self.create_file(path)
        try:
            yield handle
        finally:
            self.close_file(handle)

    def write_to(self, handle: Handle, data: bytes, offset: int = 0) -> None:
        done = 0
        while done < len(data):
            chunk = memoryview(data)[done : done + (128 << 10)]
            done += self.engine.vfs.io.write(handle, chunk, offset + done, me(), cached=False)

    def read_from(self, handle: Handle) -> bytes:
        found = bytearray()
        buffer = memoryview(bytearray(1 << 16))
        while count := self.engine.vfs.io.read(handle, buffer, len(found)):
            found += buffer[:count]
        return bytes(found)

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A new file, or other content for one that is there (O_TRUNC), written from start to end."""
        try:
            handle = self.create_file(path, mode)
        except FileExistsError:
            handle = self.open_file(path, os.O_WRONLY | os.O_TRUNC)
        try:
            self.write_to(handle, data)
        finally:
            self.close_file(handle)

    def write_at(self, path: str, data: bytes, offset: int) -> None:
        with self.opened(path, os.O_RDWR) as handle:
            self.write_to(handle, data, offset)

    def append(self, path: str, data: bytes) -> None:
        with self.opened(path, os.O_WRONLY | os.O_APPEND) as handle:
            self.write_to(handle, data)

    def read(self, path: str) -> bytes:
        with self.opened(path) as handle:
            return self.read_from(handle)

    def copy(self, path: str, new: str) -> int:
        """As cp does it: copy_file_range of the whole into a new file. Answers how much the first call copied; where it
        may not, the kernel reads and writes."""
        with self.opened(path) as source:
            target = self.create_file(new)
            try:
                size_bytes = os.fstat(source.own_fd).st_size
                done = first = self.engine.vfs.io.copy_range(source, 0, target, 0, size_bytes, me())
                while done < size_bytes:
                    done += self.engine.vfs.io.copy_range(source, done, target, done, size_bytes - done, me())
                return first
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                self.write_to(target, self.read(path))
                return 0
            finally:
                self.close_file(target)

    def truncate(self, path: str, size_bytes: int) -> None:
        self.engine.vfs.truncate(os.fsencode(path), None, size_bytes, me())

    def unlink(self, path: str) -> None:
        self.engine.vfs.unlink(os.fsencode(path))

    def hide(self, path: str, name: str) -> None:
        """What becomes of an unlink of an open file: libfuse renames it to this name, in the same directory."""
        self.engine.vfs.hide(os.fsencode(path), os.fsencode(name))

    def rename(self, path: str, new: str, flags: int = 0) -> None:
        self.engine.vfs.rename(os.fsencode(path), os.fsencode(new), flags)

    def link(self, path: str, new: str) -> None:
        self.engine.vfs.link(os.fsencode(path), os.fsencode(new))

    def mkdir(self, path: str) -> None:
        self.engine.vfs.mkdir(os.fsencode(path), 0o755, me())

    def rmdir(self, path: str) -> None:
        self.engine.vfs.rmdir(os.fsencode(path))

    def names(self, path: str = "") -> list[str]:
        directory = self.engine.vfs.opendir(os.fsencode(path))
        try:
            return sorted(os.fsdecode(entry.name) for entry in self.engine.vfs.readdir(directory, 0))
        finally:
            os.close(directory.fd)

    # -- asking -------------------------------------------------------------------------------------------------------

    def xattr(self, path: str, name: str) -> bytes:
        return self.engine.vfs.getxattr(os.fsencode(path), b"user.dedupfs." + name.encode(), me())

    def state(self, path: str) -> str:
        return self.xattr(path, "state").decode()

    def digest(self, path: str) -> str:
        return self.xattr(path, "digest").decode()

    def refs(self, path: str) -> int:
        return int(self.xattr(path, "refs"))

    def duplicates(self, path: str) -> list[str]:
        return sorted(os.fsdecode(name) for name in self.xattr(path, "duplicates").split(b"\0")[:-1])

    def status(self) -> dict[str, Any]:
        return dict(self.engine.status())

    # -- below --------------------------------------------------------------------------------------------------------

    def below(self, path: str) -> Path:
        """The file in the backing directory: the content, or a reference."""
        return self.source / path

    def put(self, path: str, data: bytes) -> Path:
        """A file made behind dedupfs's back."""
        target = self.below(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        return target

    @property
    def reference_xattr(self) -> str:
        return "trusted.dedupfs.ref" if os.geteuid() == 0 else "user.dedupfs.ref"

    def is_reference(self, path: str) -> bool:
        return self.reference_xattr in os.listxattr(self.below(path), follow_symlinks=False)

    def blobs(self) -> list[str]:
        return sorted(path.name for path in (self.source / ".dedupfs/blobs").rglob("*.*") if path.is_file())

    def the_blob(self) -> Path:
        (path,) = (path for path in (self.source / ".dedupfs/blobs").rglob("*.*") if path.is_file())
        return path

    def blob_of(self, path: str) -> ContentKey:
        fd = os.open(self.below(path), os.O_RDONLY)
        try:
            backing = Backing(str(self.source))
            try:
                reference = backing.fread_reference(fd)
            finally:
                backing.close()
        finally:
            os.close(fd)
        assert reference is not None, f"{path} is no reference"
        return reference.content

    def inside(self, name: str) -> list[str]:
        """What is in a directory of the store."""
        return sorted(os.listdir(self.source / ".dedupfs" / name))

    def key(self, path: str) -> Key:
        return Key.of(os.lstat(self.below(path)))

    def shared_extents(self, one: str, other: str) -> bool:
        """Whether the two files occupy the same blocks."""
        return extents(self.below(one)) == extents(self.below(other))

    # -- the end ------------------------------------------------------------------------------------------------------

    def expect_log(self, *patterns: str) -> None:
        self._expected_log += patterns

    def expect_findings(self, *checks: str) -> None:
        """fsck at the end finds just these; with none, whatever it finds is as meant."""
        self._expected_findings = sorted(checks) if checks else None

    def fsck(self, *, repair: bool = False) -> checker.Report:
        """Of a closed source."""
        assert self._engine is None, "close the engine first"
        return checker.fsck(str(self.source), repair=repair, progress=silent)

    def checks(self, *, repair: bool = False) -> list[str]:
        return sorted(finding.check for finding in self.fsck(repair=repair).findings)

    def finish(self) -> None:
        """Close, and demand a store in order, a log without complaints, and no descriptor left."""
        problems = []
        try:
            if self._engine is not None:
                try:
                    self.settle()
                finally:
                    self.close()
            if self._expected_findings is not None and (self.source / ".dedupfs").exists():
                report = self.fsck()
                if sorted(finding.check for finding in report.findings) != self._expected_findings:
                    listed = [f"{each.check} {each.path!r}: {each.problem}" for each in report.findings]
                    problems.append(f"fsck finds {listed}, expected {self._expected_findings}")
        finally:
            logging.getLogger("dedupfs").removeHandler(self._messages)
        for message in self._messages.seen:
            if not any(re.search(pattern, message) for pattern in self._expected_log):
                problems.append(f"log: {message}")
        problems += [f"left open: {path}" for _, path in self._open_descriptors()]
        assert not problems, "\n".join(problems)

    def _open_descriptors(self) -> list[tuple[int, str]]:
        """Descriptors of this process that lead into the source."""
        found = []
        for entry in os.listdir("/proc/self/fd"):
            try:
                path = os.readlink(f"/proc/self/fd/{entry}")
            except FileNotFoundError:
                continue
            if path.startswith(str(self.source)):
                found.append((int(entry), path))
        return found


class _Messages(logging.Handler):
    """Complaints of dedupfs, which a healthy store gives no reason for."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(f"{record.levelname} {self.format(record)}")


@contextmanager
def in_thread(action: Callable[[], object]) -> Iterator["Running"]:
    """Do something meanwhile; what it raises is raised at the end of the block."""
    running = Running(action)
    try:
        yield running
    finally:
        running.join()


class Running:
    def __init__(self, action: Callable[[], object]) -> None:
        self._error: BaseException | None = None
        self._action = action
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:  # noqa: BLE001 - it is raised in the test's thread
            self._error = error

    def ended(self, within_s: float = 0) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "it hangs"
        if self._error is not None:
            raise self._error


class Meeting:
    """A place where one thread waits until another lets it go on."""

    def __init__(self) -> None:
        self._reached, self._go = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Called by the one who is to be held up; only the first time."""
        if not self._reached.is_set():
            self._reached.set()
            assert self._go.wait(PATIENCE_S), "nobody came"

    def reached(self) -> None:
        assert self._reached.wait(PATIENCE_S), "never got there"

    def release(self) -> None:
        self._go.set()


def extents(path: Path) -> list[tuple[int, int, int]]:
    """Logical offset, physical offset and length of the extents of a file, all in bytes (FIEMAP)."""
    import array
    import fcntl
    import struct

    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        count = 256
        request = array.array("B", struct.pack("=QQIIII", 0, (1 << 64) - 1, 1, 0, count, 0) + bytes(56 * count))
        fcntl.ioctl(fd, 0xC020660B, request)
    finally:
        os.close(fd)
    mapped = struct.unpack_from("=I", request, 20)[0]
    found = []
    for number in range(mapped):
        logical, physical, length = struct.unpack_from("=QQQ", request, 32 + 56 * number)
        found.append((logical, physical, length))
    return found
