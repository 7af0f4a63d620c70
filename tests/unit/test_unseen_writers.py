"""Writers whose I/O the kernel does by itself: what they may have changed the file's stamp tells, or nothing."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dedupfs.digest import StreamDigest
from dedupfs.model import Ino
from dedupfs.openfiles import Handle, InUse, Key, OpenFiles

LONG_AGO_NS = 3600 * 10**9


def nothing() -> None:
    pass


@contextmanager
def writing_unseen(path: Path, stream: StreamDigest | None = None) -> Iterator[Handle]:
    files = OpenFiles()
    handle = files.register(Key(1, Ino(1)), os.open(path, os.O_RDWR), writes=True)
    with handle.inode.lock:
        handle.inode.stream = stream
        handle.inode.written_unseen(handle)
    assert handle.inode.dirty
    yield handle
    files.release(handle, nothing)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was last changed an hour ago, by the clock that is looked at."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    now_ns = path.stat().st_ctime_ns + LONG_AGO_NS
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    return path


def test_who_wrote_nothing_changed_nothing(old: Path) -> None:
    with writing_unseen(old) as handle:
        handle.inode.forget_if_unchanged(handle.own_fd)
        assert not handle.inode.dirty


def test_who_wrote_is_noticed(old: Path) -> None:
    with writing_unseen(old) as handle:
        os.pwrite(handle.own_fd, b"CONTENT", 0)
        handle.inode.forget_if_unchanged(handle.own_fd)
        assert handle.inode.dirty


def test_nothing_is_concluded_while_another_writes(old: Path) -> None:
    files = OpenFiles()
    first, second = (files.register(Key(1, Ino(1)), os.open(old, os.O_RDWR), writes=True) for _ in range(2))
    for handle in (first, second):
        first.inode.written_unseen(handle)
    first.inode.forget_if_unchanged(first.own_fd)
    assert first.inode.dirty
    for handle in (first, second):
        files.release(handle, nothing)


def test_a_file_of_just_now_may_have_been_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stamp of a second write within a tick of the clock is that of the first."""
    path = tmp_path / "file"
    path.write_bytes(b"content")
    now_ns = path.stat().st_ctime_ns + 10**6
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    with writing_unseen(path) as handle:
        handle.inode.forget_if_unchanged(handle.own_fd)
        assert handle.inode.dirty


def test_a_digest_of_what_was_seen_is_not_that_of_the_file(old: Path) -> None:
    with writing_unseen(old, StreamDigest()) as handle:
        assert handle.inode.stream is None


def test_who_has_written_nothing_yet_is_a_writer(old: Path) -> None:
    """Nobody hashes or shares the file while he may begin to at any time."""
    files = OpenFiles()
    key = Key(1, Ino(1))
    handle = files.register(key, os.open(old, os.O_RDWR), writes=True)
    assert not handle.inode.dirty
    with pytest.raises(InUse), files.watch(key):
        pass
    files.release(handle, nothing)
    with files.watch(key):
        pass
