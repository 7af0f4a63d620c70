"""Which pages the kernel keeps: decided by real files and handles, without a kernel that has any."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedupfs import kernelcache
from dedupfs.kernelcache import KernelPages
from dedupfs.openfiles import Handle, Key, OpenFiles


class Files:
    """A table of open files with real files in it, and what is known of the kernel's pages of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._openfiles = OpenFiles()
        self.pages = KernelPages(self._openfiles)
        self._times = iter(range(1, 100))
        self.change("file")

    def open(self, name: str = "file", *, writes: bool = False) -> Handle:
        fd = os.open(self._directory / name, os.O_RDONLY)
        handle = self._openfiles.register(Key.of(os.fstat(fd)), fd, writes=writes)
        handle.known_as = name.encode()
        return handle

    def may_stay(self, name: str = "file", *, writes: bool = False) -> bool:
        """Of an open that is followed by a close at once."""
        handle = self.open(name, writes=writes)
        try:
            return self.pages.may_stay(handle)
        finally:
            self.close(handle)

    def close(self, handle: Handle) -> None:
        self._openfiles.release(handle, lambda: None)

    def change(self, name: str) -> None:
        path, time = self._directory / name, next(self._times)
        path.touch()
        os.utime(path, ns=(time, time))

    def link(self, name: str, new: str) -> None:
        os.link(self._directory / name, self._directory / new)

    def finish(self) -> None:
        for handle in self._openfiles.handles():
            self.close(handle)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    yield files
    files.finish()


def test_pages_of_a_file_that_did_not_change(files: Files) -> None:
    assert [files.may_stay() for _ in range(3)] == [False, True, True]
    files.change("file")
    assert [files.may_stay() for _ in range(3)] == [False, True, True]


def test_what_is_written_through_the_mount_is_in_the_pages(files: Files) -> None:
    writer = files.open(writes=True)
    assert not files.pages.may_stay(writer)
    files.change("file")
    files.pages.written(writer)
    files.close(writer)
    assert files.may_stay()


def test_no_page_is_dropped_under_a_writer(files: Files) -> None:
    writer = files.open(writes=True)
    for writes in (False, True):
        files.change("file")
        assert files.may_stay(writes=writes)
    files.close(writer)
    files.change("file")
    reader = files.open()
    assert not files.may_stay()
    files.close(reader)


def test_a_writer_by_another_name_has_other_pages(files: Files) -> None:
    files.link("file", "other")
    assert not files.may_stay()
    writer = files.open("other", writes=True)
    files.change("file")
    assert not files.may_stay()
    files.close(writer)


def test_a_file_that_is_forgotten(files: Files) -> None:
    assert not files.may_stay()
    files.pages.forget(b"file")
    assert not files.may_stay()


def test_not_all_files_are_remembered(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelcache, "_MOST_FILES", 2)
    for name in ("one", "two"):
        files.change(name)
        assert not files.may_stay(name)
    assert files.may_stay("one")
    assert not files.may_stay("file")  # which is remembered instead of "two"
    assert files.may_stay("one")
    assert not files.may_stay("two")
