"""A disk whose power can be cut: what was not flushed is lost, or part of it is, as on a real one with a write cache.

A FUSE file system with one file in it, and a loop device over that file. Writes are kept in order until the filesystem
on the disk asks for a flush. `cut` makes an image of what a power cut at this instant would leave; the disk goes on.
The same disk can be told to fail, or to be slow.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dedupfs import fusefs

from .filesystems import Unsupported, run, unmount
from .mounted import REPOSITORY

SECTOR_BYTES = 512
_NAME = "disk"

fuse: Any = vars(fusefs)["fuse"]  # the binding, of the library that was chosen there


class Disk:
    """The caller's side: a block device at `device`."""

    def __init__(self, process: "subprocess.Popen[str]", device: Path) -> None:
        self._process = process
        self.device = device

    def _order(self, **words: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer == "done\n", f"the disk has died: {answer}"

    def cut(self, image: Path, seed: str) -> None:
        """Write to `image` what is left when the power goes now. `seed` decides what of the unflushed survives."""
        self._order(cut=os.fspath(image), seed=seed)

    def fail(self, *kinds: str) -> None:
        """From now on fail these kinds of requests ("read", "write", "flush") with EIO; without any: work again."""
        self._order(fail=kinds)

    def delay(self, seconds: float) -> None:
        """Let each read, write and flush take so much longer."""
        self._order(delay_s=seconds)


@contextlib.contextmanager
def disk(image: Path) -> Iterator[Disk]:
    """A disk that begins with the content of `image`, which holds from then on what is durable.

    Raises Unsupported without root, FUSE or loop devices.
    """
    if os.geteuid() != 0:
        raise Unsupported("a loop device needs root")
    directory = image.with_suffix(".disk")
    directory.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, image, directory],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    device = ""
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise Unsupported("the file system of the disk does not come up")
        attached = run("losetup", "--find", "--show", directory / _NAME)
        if attached.returncode:
            raise Unsupported(f"no loop device over a FUSE file: {attached.stderr.strip()}")
        device = attached.stdout.strip()
        yield Disk(process, Path(device))
    finally:
        if device:
            run("losetup", "--detach", device)
        with contextlib.suppress(RuntimeError):
            unmount(directory)
        process.communicate(timeout=20)
        shutil.rmtree(directory)


# --- the disk's side


class _Platters(fuse.Operations):  # type: ignore[misc]
    """What is on the disk: `current` as the host reads it, `durable` as of the last flush, and what lies between."""

    use_ns = True

    def __init__(self, image: Path) -> None:
        self._durable = os.open(image, os.O_RDWR)
        self._image = image
        current = image.with_suffix(".current")
        run("cp", "--reflink=auto", "--sparse=always", image, current)
        self._current = os.open(current, os.O_RDWR)
        current.unlink()
        self._size_bytes = os.fstat(self._durable).st_size
        self._unflushed: list[tuple[int, bytes]] = []
        self._lock = threading.Lock()
        self._failing: frozenset[str] = frozenset()
        self._delay_s = 0.0

    # the file system

    def init(self, path: str) -> None:
        print("ready", flush=True)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}
        if path != "/" + _NAME:
            raise fuse.FuseOSError(errno.ENOENT)
        return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": self._size_bytes}

    def open(self, path: str, fi: Any) -> int:
        fi.direct_io = 1  # the host's page cache is not part of the disk
        return 0

    def read(self, path: str, size: int, offset: int, fi: Any) -> bytes:
        self._serve("read")
        return os.pread(self._current, size, offset)

    def write(self, path: str, data: bytes, offset: int, fi: Any) -> int:
        self._serve("write")
        with self._lock:
            self._unflushed.append((offset, data))
            return os.pwrite(self._current, data, offset)

    def fsync(self, path: str, datasync: int, fi: Any) -> int:
        self._serve("flush")
        with self._lock:
            for offset, data in self._unflushed:
                os.pwrite(self._durable, data, offset)
            self._unflushed.clear()
        return 0

    def _serve(self, kind: str) -> None:
        if self._delay_s:
            time.sleep(self._delay_s)
        if kind in self._failing:
            raise fuse.FuseOSError(errno.EIO)

    # orders

    def obey(self) -> None:
        for line in sys.stdin:
            words = json.loads(line)
            if "cut" in words:
                self._cut(Path(words["cut"]), random.Random(words["seed"]))
            elif "fail" in words:
                self._failing = frozenset(words["fail"])
            else:
                self._delay_s = words["delay_s"]
            print("done", flush=True)

    def _cut(self, image: Path, rng: random.Random) -> None:
        """A cache loses everything, or writes out what it likes in whatever order, down to single sectors."""
        share = rng.choice((0.0, 0.5, 0.9))
        with self._lock:
            run("cp", "--reflink=auto", "--sparse=always", self._image, image)
            target = os.open(image, os.O_RDWR)
            try:
                for offset, data in self._unflushed:
                    if rng.random() < share:
                        end = len(data)
                        if rng.random() < 0.2:
                            end = rng.randrange(0, len(data), SECTOR_BYTES)
                        os.pwrite(target, data[:end], offset)
            finally:
                os.close(target)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.disk", description="Serve a disk as a file.")
    parser.add_argument("image", type=Path)
    parser.add_argument("directory")
    chosen = parser.parse_args()
    platters = _Platters(chosen.image)
    threading.Thread(target=platters.obey, daemon=True).start()
    fuse.FUSE(platters, chosen.directory, foreground=True, nothreads=True, raw_fi=True, fsname="test-disk")


if __name__ == "__main__":
    _main()
