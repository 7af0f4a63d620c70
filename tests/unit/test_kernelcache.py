"""Which pages the kernel keeps: decided by real files and handles, without a kernel that has any."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dedupfs import kernelcache
from dedupfs.backing import RENAME_EXCHANGE, Backing
from dedupfs.fusefs import _Adapter
from dedupfs.kernelcache import KernelPages
from dedupfs.openfiles import Handle, Key, OpenFiles
from tests.support import syscalls


class Files:
    """A table of open files with real files in it, and what is known of the kernel's pages of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.openfiles = OpenFiles()
        self.pages = KernelPages(self.openfiles)
        self._times = iter(range(1, 100))
        self.change("file")

    def open(self, name: str = "file", *, writes: bool = False) -> Handle:
        fd = os.open(self.path(name), os.O_RDONLY)
        handle = self.openfiles.register(Key.of(os.fstat(fd)), fd, writes=writes)
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
        self.openfiles.release(handle, lambda: None)

    def path(self, name: str) -> Path:
        return self._directory / name

    def change(self, name: str) -> None:
        path, time = self.path(name), next(self._times)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
        os.utime(path, ns=(time, time))

    def link(self, name: str, new: str) -> None:
        os.link(self.path(name), self.path(new))

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        source, target = self.path(old), self.path(new)
        is_directory = source.is_dir() or target.is_dir()
        syscalls.renameat2(os.fsencode(source), os.fsencode(target), flags)
        moves = {old.encode(): new.encode()} | ({new.encode(): old.encode()} if flags else {})
        self.pages.moved(moves, is_directory=is_directory)

    def finish(self) -> None:
        for handle in self.openfiles.handles():
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


def test_another_inode_at_a_path_drops_no_page_under_a_writer(files: Files) -> None:
    files.change("folder/file")
    told: list[bytes] = []
    backing = Backing(os.fsencode(files.path(".")))
    adapter = SimpleNamespace(
        _engine=SimpleNamespace(openfiles=files.openfiles, backing=backing),
        session=SimpleNamespace(invalidate=told.append),
    )
    reader, writer = files.open("folder/file"), files.open("folder/file", writes=True)
    _Adapter.replaced(adapter, b"folder/file")  # type: ignore[arg-type]
    assert told == [b"folder"]
    files.close(writer)
    _Adapter.replaced(adapter, b"folder/file")  # type: ignore[arg-type]
    assert told == [b"folder", b"folder/file", b"folder"]
    files.close(reader)
    backing.close()


def test_a_file_that_is_forgotten(files: Files) -> None:
    assert not files.may_stay()
    files.pages.forget(b"file")
    assert not files.may_stay()


def test_pages_go_with_their_file(files: Files) -> None:
    files.change("folder/inner/file")
    files.change("folder besides")
    for name in ("file", "folder/inner/file", "folder besides"):
        assert not files.may_stay(name)
    files.rename("file", "folder/file")
    assert files.may_stay("folder/file")
    files.rename("folder", "other")
    assert all(map(files.may_stay, ["other/file", "other/inner/file", "folder besides"]))


def test_pages_of_a_file_that_is_renamed_over(files: Files) -> None:
    files.change("other")
    assert not files.may_stay("other")
    files.rename("file", "other")  # of which nothing is known
    os.utime(files.path("other"), ns=(2, 2))  # as the one had it that is gone
    assert not files.may_stay("other")


def test_pages_of_files_that_change_places(files: Files) -> None:
    files.change("folder/file")
    for name in ("file", "folder/file"):
        assert not files.may_stay(name)
    files.rename("file", "folder", RENAME_EXCHANGE)
    assert files.may_stay("folder")
    assert files.may_stay("file/file")


def test_nothing_is_left_of_what_moved_and_is_gone(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelcache, "_MOST_FILES", 3)
    files.change("kept")
    assert not files.may_stay("kept")
    for number in range(10):
        folder = f"folder {number}"
        files.change(f"{folder}/file")
        files.may_stay(f"{folder}/file")
        files.rename(folder, "moved")
        files.pages.forget(b"moved/file")
        shutil.rmtree(files.path("moved"))
    assert files.may_stay("kept")


def test_not_all_files_are_remembered(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelcache, "_MOST_FILES", 2)
    for name in ("one", "two"):
        files.change(name)
        assert not files.may_stay(name)
    assert files.may_stay("one")
    assert not files.may_stay("file")  # which is remembered instead of "two"
    assert files.may_stay("one")
    assert not files.may_stay("two")
