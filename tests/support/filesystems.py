"""Filesystems of the kinds that dedupfs promises to work on, each on a loop device of its own.

Making one needs root and loop devices; without them, the filesystem that temporary files are on stands in for its own
kind. An image is made once a session and kind, and each test gets an empty directory on it.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("ext4", "xfs", "btrfs")

# Sparse: what matters is what the tests write. XFS refuses less than 300 MiB. ext4 gets an inode for every 4 KiB,
# enough for several directories of 100,000 entries.
_IMAGE_BYTES = {"ext4": 3 << 30, "xfs": 3 << 30, "btrfs": 2 << 30}
_MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096", "-i", "4096", "-m", "0"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}

# Not /tmp, which is memory on many machines.
_PARENT = Path(os.environ.get("TMPDIR", "/var/tmp"))
_PREFIX = "dedupfs-tests."

_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_IMMUTABLE_OR_APPEND = 0x10 | 0x20


class Unsupported(Exception):
    """This machine or this user cannot provide the filesystem; `str()` says why."""


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A mounted filesystem. `own`: it is the tests' alone, so it may be filled, frozen or remounted."""

    kind: str
    root: Path
    own: bool
    _numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)

    def directory(self, label: str) -> Path:
        """An empty directory that nobody else uses; any user may pass through it."""
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in label)[:60]
        path = self.root / f"{next(self._numbers):04d}-{safe}"
        path.mkdir(mode=0o755)
        return path


def run(*command: str | Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a tool and capture what it says. Not finding it is `Unsupported`; failing is the caller's to judge."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise Unsupported(f"{command[0]} is not installed (scripts/setup --test)") from None


# --- mounts


def mountpoints() -> list[Path]:
    """Where something is mounted in this process's namespace, the latest last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        escaped = line.split(b" ")[4]
        found.append(Path(os.fsdecode(escaped.decode("unicode_escape").encode("latin-1"))))
    return found


def is_mountpoint(path: Path) -> bool:
    return path.absolute() in mountpoints()


def unmount(path: Path, *, patience_s: float = 5) -> None:
    """Take the topmost mount off `path`; one that stays busy for so long, or whose daemon is dead, goes lazily."""
    root = os.geteuid() == 0
    deadline = time.monotonic() + patience_s
    while True:
        result = run("umount", path) if root else run("fusermount3", "-u", path)
        if result.returncode == 0:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    lazy = run("umount", "-l", path) if root else run("fusermount3", "-u", "-z", path)
    if lazy.returncode != 0:
        raise RuntimeError(f"cannot unmount {path}: {result.stderr.strip()}; lazily: {lazy.stderr.strip()}")


# --- trees


def _clear_protection(path: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        flags = struct.unpack("l", fcntl.ioctl(descriptor, _FS_IOC_GETFLAGS, bytes(struct.calcsize("l"))))[0]
        if flags & _IMMUTABLE_OR_APPEND:
            fcntl.ioctl(descriptor, _FS_IOC_SETFLAGS, struct.pack("l", flags & ~_IMMUTABLE_OR_APPEND))
    except OSError:
        pass  # a filesystem without such flags
    finally:
        os.close(descriptor)


def _remove(path: Path) -> subprocess.CompletedProcess[str]:
    # not shutil.rmtree, which recurses and gives up on a deep tree
    return run("rm", "-rf", "--one-file-system", "--", path)


def remove_tree(path: Path) -> None:
    """Remove a directory with all below it, immutable blobs too. Nothing may be mounted in it."""
    if _remove(path).returncode == 0:
        return
    for directory, subdirectories, files in os.walk(os.fsencode(path)):
        for name in subdirectories + files:
            full = os.path.join(directory, name)
            with contextlib.suppress(OSError):
                mode = os.lstat(full).st_mode
                if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                    _clear_protection(full)
    result = _remove(path)
    if result.returncode != 0:
        raise RuntimeError(f"cannot remove {path}: {result.stderr.strip()}")


def make_work_directory() -> Path:
    """A directory on disk for this process alone. What runs that were killed have left is removed on the way."""
    for leftover in _PARENT.glob(_PREFIX + "*"):
        owner = leftover.name.removeprefix(_PREFIX).split(".")[0]
        if owner.isdigit() and not Path("/proc", owner).exists() and os.access(leftover, os.W_OK):
            with contextlib.suppress(OSError, RuntimeError):  # another run may be at the same
                remove_work_directory(leftover)
    path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}.", dir=_PARENT))
    path.chmod(0o755)  # the tests act as other users too
    return path


def remove_work_directory(path: Path) -> None:
    """Remove a directory made by `make_work_directory`, with the mounts in it."""
    for mountpoint in reversed(mountpoints()):
        if mountpoint.is_relative_to(path):
            unmount(mountpoint, patience_s=1)
    for image in path.glob("*.image"):
        _detach(image)
    remove_tree(path)


def fill(path: Path) -> None:
    """Take every block that can still be had, for a file that is not in any mount of dedupfs."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return  # there is not even room for a name
    try:
        for size_bytes in (1 << 20, 4096):
            while True:
                try:
                    os.write(fd, bytes(size_bytes))
                    os.fsync(fd)
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    break
    finally:
        os.close(fd)


# --- loop devices


def _detach(image: Path) -> None:
    """Free the loop devices of an image; `mount -o loop` lets go of them itself, except after a failure."""
    listed = run("losetup", "--noheadings", "--output", "NAME", "--associated", image)
    for device in listed.stdout.split():
        run("losetup", "--detach", device)


def make_filesystem(kind: str, image: Path) -> None:
    made = run(*_MKFS[kind], image)
    if made.returncode != 0:
        raise RuntimeError(f"mkfs.{kind}: {made.stderr.strip()}")


@contextlib.contextmanager
def mounted_device(kind: str, device: Path, root: Path, *options: str) -> Iterator[None]:
    """Mount a block device, or an image, for as long as the context lasts."""
    if not device.is_block_device():
        options = (*options, "loop")
    mounted = run("mount", "-t", kind, "-o", ",".join(options) or "defaults", device, root)
    if mounted.returncode != 0:
        raise Unsupported(f"cannot mount {device} with {kind}: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        unmount(root)


@contextlib.contextmanager
def tmpfs(directory: Path) -> Iterator[Path]:
    """Mount a small tmpfs at a new directory, for as long as the context lasts: it goes whoever still uses it."""
    directory.mkdir()
    mounted = run("mount", "-t", "tmpfs", "-o", "size=16m", "none", directory)
    if mounted.returncode != 0:
        raise RuntimeError(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        run("umount", "--lazy", directory)


@contextlib.contextmanager
def loop_filesystem(
    kind: str, directory: Path, *, size_bytes: int | None = None, patience_s: float = 5
) -> Iterator[Filesystem]:
    """Make a filesystem in an image below `directory` and mount it there, for as long as the context lasts.

    Raises Unsupported when this machine or this user cannot.
    """
    if os.geteuid() != 0:
        raise Unsupported(f"a loop device with {kind} needs root")
    descriptor, name = tempfile.mkstemp(prefix=f"{kind}-", suffix=".image", dir=directory)
    image = Path(name)
    os.truncate(descriptor, size_bytes or _IMAGE_BYTES[kind])
    os.close(descriptor)
    root = image.with_suffix("")
    try:
        make_filesystem(kind, image)
        root.mkdir()
        mounted = run("mount", "-t", kind, "-o", "loop", image, root)
        if mounted.returncode != 0:
            raise Unsupported(f"cannot mount a loop device with {kind}: {mounted.stderr.strip()}")
        try:
            root.chmod(0o755)
            yield Filesystem(kind, root, own=True)
        finally:
            unmount(root, patience_s=patience_s)
    finally:
        _detach(image)
        image.unlink()
        with contextlib.suppress(FileNotFoundError):
            root.rmdir()


class FilesystemPool:
    """The filesystems of one test session: made when first asked for, gone at `close`."""

    def __init__(self) -> None:
        self.directory = make_work_directory()
        self._stack = contextlib.ExitStack()
        self._known: dict[str, Filesystem | Unsupported] = {}

    def get(self, kind: str) -> Filesystem:
        """Raises Unsupported when there is no way to have it here."""
        if kind not in self._known:
            try:
                self._known[kind] = self._make(kind)
            except Unsupported as problem:
                self._known[kind] = problem
        known = self._known[kind]
        if isinstance(known, Unsupported):
            raise known
        return known

    def _make(self, kind: str) -> Filesystem:
        if os.geteuid() == 0:
            return self._stack.enter_context(loop_filesystem(kind, self.directory))
        here = run("stat", "--file-system", "--format=%T", self.directory).stdout.strip()
        if here not in (kind, "ext2/ext3" if kind == "ext4" else kind):
            raise Unsupported(f"a loop device with {kind} needs root, and {self.directory} is on {here}")
        root = self.directory / kind
        root.mkdir()
        return Filesystem(kind, root, own=False)

    def close(self) -> None:
        try:
            self._stack.close()
        finally:
            remove_work_directory(self.directory)
