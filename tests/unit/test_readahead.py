"""Files that will be hashed are read before, in order, and no further ahead than it is bounded to."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from dedupfs import readahead
from dedupfs.backing import Backing
from dedupfs.model import Ino
from dedupfs.readahead import ReadAhead

_PATIENCE_S = 10.0


def becomes(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while not true() and time.monotonic() < deadline:
        time.sleep(0.001)
    return true()


class Told(Backing):
    """Notes what is asked for, as soon as it was."""

    def __init__(self, source: Path) -> None:
        super().__init__(str(source))
        self.asked: list[bytes] = []
        self.hold = threading.Event()
        self.hold.set()

    def will_need(self, path: bytes, most_bytes: int) -> int:
        assert self.hold.wait(_PATIENCE_S)
        try:
            return super().will_need(path, most_bytes)
        finally:
            self.asked.append(path)


@pytest.fixture
def backing(tmp_path: Path) -> Iterator[Told]:
    backing = Told(tmp_path)
    yield backing
    backing.close()


@pytest.fixture
def ahead(backing: Told) -> Iterator[ReadAhead]:
    ahead = ReadAhead(backing)
    yield ahead
    backing.hold.set()
    ahead.stop()


def make(directory: Path, count: int, size_bytes: int) -> list[tuple[Ino, bytes]]:
    paths = [directory / f"{number:03d}" for number in range(count)]
    for path in paths:
        path.write_bytes(os.urandom(size_bytes))
    return [(Ino(path.stat().st_ino), path.name.encode()) for path in paths]


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A directory that is not in memory, as /tmp may be."""
    with TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


def test_the_kernel_reads_it(on_disk: Path) -> None:
    [(ino, path)] = make(on_disk, 1, 100_000)
    backing = Backing(str(on_disk))
    ahead = ReadAhead(backing)
    fd = os.open(on_disk / os.fsdecode(path), os.O_RDONLY)

    def in_memory() -> bool:
        try:
            return os.preadv(fd, [bytearray(1)], 90_000, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False

    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert not in_memory()
        ahead.add(ino, path)
        assert becomes(in_memory)
    finally:
        os.close(fd)
        ahead.stop()
        backing.close()


def test_as_many_as_may_be_ahead_and_then_one_for_each_that_is_taken(
    ahead: ReadAhead, backing: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "_MOST_FILES", 4)
    files = make(tmp_path, 10, 10)
    for file in files:
        ahead.add(*file)
    assert becomes(lambda: len(backing.asked) == 4)
    for taken, (ino, _) in enumerate(files):
        ahead.take(ino)
        assert becomes(lambda: len(backing.asked) == min(4 + taken + 1, 10))  # noqa: B023 (it is called at once)
    assert backing.asked == [path for _, path in files]


def test_no_more_bytes_than_may_be_ahead(
    ahead: ReadAhead, backing: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "_MOST_BYTES", 10_000)
    files = make(tmp_path, 6, 6_000)
    for file in files:
        ahead.add(*file)
    assert becomes(lambda: len(backing.asked) == 2)
    ahead.take(files[0][0])
    assert becomes(lambda: len(backing.asked) == 3)
    ahead.take(files[3][0])  # waited for nothing yet
    ahead.take(files[1][0])
    assert becomes(lambda: len(backing.asked) == 4)
    assert backing.asked == [files[number][1] for number in (0, 1, 2, 4)]


def test_one_that_is_taken_while_it_is_asked_for_does_not_count(
    ahead: ReadAhead, backing: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "_MOST_BYTES", 1)
    one, other = make(tmp_path, 2, 10)
    backing.hold.clear()
    ahead.add(*one)
    assert becomes(lambda: not ahead._waiting)
    ahead.take(one[0])
    backing.hold.set()
    ahead.add(*other)
    assert becomes(lambda: backing.asked == [one[1], other[1]])


def test_what_is_not_there_or_no_file_holds_nothing_up(ahead: ReadAhead, backing: Told, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("000")
    [file] = make(tmp_path, 1, 10)
    for ino, path in [(Ino(1), b"missing"), (Ino(2), b"missing/below"), (Ino(3), b"fifo"), (Ino(4), b"link"), file]:
        ahead.add(ino, path)
    assert becomes(lambda: len(backing.asked) == 5)
    assert backing.asked[-1] == file[1]


def test_after_the_end_nothing_is_read(backing: Told, tmp_path: Path) -> None:
    ahead = ReadAhead(backing)
    one, other = make(tmp_path, 2, 10)
    ahead.add(*one)
    assert becomes(lambda: backing.asked == [one[1]])
    ahead.stop()
    ahead.add(*other)
    assert backing.asked == [one[1]]
    assert not any(thread.name == "readahead" for thread in threading.enumerate())
