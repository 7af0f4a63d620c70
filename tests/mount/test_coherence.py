"""What the kernel keeps of files that are read and written through the daemon: it never shows what was there before a
write, and shows what came past the mount."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import Mounts
from tests.support.flavours import ONE_FLAVOUR
from tests.support.tools import needs_root

PAGE = 4096
THROUGH_US = "passthrough=off"
PATIENCE_S = 10.0


# linux/fs.h: FIFREEZE and FITHAW, _IOWR('X', 119 and 120, int)
FREEZE, THAW = 0xC0045877, 0xC0045878


@contextlib.contextmanager
def frozen(filesystem: Path) -> Iterator[None]:
    """Who writes to this filesystem waits for the end; who reads does not. No process is started meanwhile, for that
    closes what is open here, which asks the daemon."""
    fd = os.open(filesystem, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, THAW, 0)
    finally:
        os.close(fd)


@needs_root
@ONE_FLAVOUR
def test_a_reader_does_not_bring_back_what_a_write_replaces(mounts: Mounts) -> None:
    """While the write is on its way, the kernel is asked for attributes, and for the page that is written."""
    path = mounts.new(THROUGH_US).start().path("file")
    old, new = bytes(PAGE), b"new!" * (PAGE // 4)
    path.write_bytes(old * 2)
    os.utime(path, ns=(1, 1))
    with open(path, "r+b", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        fd = file.fileno()
        assert os.pread(fd, 2 * PAGE, 0) == old * 2
        os.pwrite(fd, new, PAGE)  # the file has another time now than the kernel knows
        with frozen(mounts.filesystem.root):
            writing = pool.submit(os.pwrite, fd, new, 0)
            patience = time.monotonic() + PATIENCE_S
            while os.pread(fd, PAGE, 0) != new and time.monotonic() < patience:
                pass  # not even in the kernel's page yet
            os.stat(path)
            during = os.pread(fd, PAGE, 0)
        assert writing.result() == PAGE
        assert during == new
        assert os.pread(fd, PAGE, 0) == new


@ONE_FLAVOUR
def test_what_came_past_the_mount_shows_at_the_next_open(mounts: Mounts) -> None:
    """As many bytes as before, so that the length does not tell."""
    mounted = mounts.new(THROUGH_US).start()
    path, below = mounted.path("file"), mounted.below("file")
    for number in range(3):
        content = bytes([number]) * 3 * PAGE
        if number:
            with open(below, "r+b") as file:
                file.write(content)
            os.utime(below, ns=(number, number))
        else:
            path.write_bytes(content)
        assert path.read_bytes() == content
        assert path.read_bytes() == content
    mounted.run("scan", mounted.mountpoint)  # so that the index hears of it as well
